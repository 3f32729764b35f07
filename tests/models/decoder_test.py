"""Laws of reading and decoding: caches, trees, branches, padding. Families against transformers: parity_test.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.models import contexts
from omniopd_jax.models.layers import RoutedFeedForward
from omniopd_jax.train import sharding
from tests.models import parity

TOKENS, MASK = parity.tokens_and_mask()
B, S = TOKENS.shape
R, C = 3, 4
BRANCH_TOKENS, BRANCH_MASK = parity.branch_tokens_and_mask(B, R, C)
START = np.array([[3, 9, 9], [8, 12, 24], [1, 9, 19], [5, 5, 20]])

read = parity.quick_jit(models.read)
read_tree = parity.quick_jit(models.read_tree)


@pytest.fixture(scope="module")
def model():
    """Two ropes, a window, soft-caps, norms before and after, q/k norm: every path of the decoder but the experts."""
    return parity.tiny_model("Gemma 3 (text)", attn_logit_softcapping=3.0, final_logit_softcapping=5.0)


@pytest.fixture(scope="module")
def tree(model):
    return read_tree(model, TOKENS, MASK, BRANCH_TOKENS, BRANCH_MASK, START)


def separate_sequences():
    """Each branch with its trunk as one sequence of its own: tokens and mask [B · R, S + C]."""
    tokens, mask = np.zeros((B, R, S + C), int), np.zeros((B, R, S + C), bool)
    for b, r in np.ndindex(B, R):
        start = START[b, r]
        tokens[b, r, :start], mask[b, r, :start] = TOKENS[b, :start], MASK[b, :start]
        tokens[b, r, start : start + C], mask[b, r, start : start + C] = BRANCH_TOKENS[b, r], BRANCH_MASK[b, r]
    return tokens.reshape(B * R, S + C), mask.reshape(B * R, S + C)


def test_a_tree_equals_separate_sequences(model, tree):
    hidden, branch_hidden = tree
    whole, _ = read(model, TOKENS, MASK)
    np.testing.assert_allclose(np.asarray(hidden)[MASK], np.asarray(whole)[MASK], atol=1e-4)
    apart = np.asarray(read(model, *separate_sequences())[0]).reshape(B, R, S + C, -1)
    for b, r in np.ndindex(B, R):
        want = apart[b, r, START[b, r] : START[b, r] + C]
        np.testing.assert_allclose(branch_hidden[b, r][BRANCH_MASK[b, r]], want[BRANCH_MASK[b, r]], atol=1e-4)


def test_branches_decoded_over_a_shared_cache_equal_the_tree(model, tree):
    @parity.quick_jit
    def decode_all(model, tokens, mask, branch_tokens, start):
        _, cache = models.read(model, tokens, mask, cache_length=S + 1)  # a column more than is filled
        stepper = models.for_decoding(model)

        def step(cache, token_BxR):
            hidden, cache = models.decode_branches(stepper, token_BxR, cache)
            return cache, hidden

        return jax.lax.scan(step, models.open_branches(cache, start, C), jnp.moveaxis(branch_tokens, 2, 0))[1]

    decoded = np.moveaxis(np.asarray(decode_all(model, TOKENS, MASK, BRANCH_TOKENS, START)), 0, 2)
    np.testing.assert_allclose(decoded[BRANCH_MASK], np.asarray(tree[1])[BRANCH_MASK], atol=1e-4)


def test_decoding_over_padded_columns_equals_the_full_pass(model):
    """Rows pause (a padded column) and go on: positions and windows count real tokens alone."""
    mask = MASK.copy()
    mask[0, 15:18] = mask[1, 20] = False
    whole, _ = read(model, TOKENS, mask)
    decoded = parity.decoded_hidden(model, TOKENS, mask)
    assert parity.errors(decoded, whole[:, parity.PROMPT :], mask[:, parity.PROMPT :]).max() < 1e-4


def test_branches_do_not_see_each_other_nor_later_trunk_tokens(model, tree):
    other_tokens = BRANCH_TOKENS.copy()
    other_tokens[:, 0] = 7
    other_trunk = TOKENS.copy()
    other_trunk[0, 9:] = 7  # from branches 1 and 2 on
    hidden, branch_hidden = read_tree(model, other_trunk, MASK, other_tokens, BRANCH_MASK, START)
    np.testing.assert_array_equal(branch_hidden[:, 1:], tree[1][:, 1:])
    np.testing.assert_array_equal(hidden[0, :9], tree[0][0, :9])
    assert np.abs(branch_hidden[:, 0] - tree[1][:, 0]).max() > 0.1


def test_no_branches(model):
    none = np.zeros((B, 0, C), int)
    hidden, branch_hidden = models.read_tree(model, TOKENS, MASK, none, none.astype(bool), np.zeros((B, 0), int))
    assert branch_hidden.shape == (B, 0, C, model.config.hidden_size)
    np.testing.assert_allclose(np.asarray(hidden)[MASK], np.asarray(read(model, TOKENS, MASK)[0])[MASK], atol=1e-4)


def test_rows_do_not_depend_on_their_neighbours_or_on_padding(model):
    whole, _ = read(model, TOKENS, MASK)
    order = np.array([2, 0, 3, 1])
    other_padding = np.where(MASK, TOKENS, 50)[order]
    permuted, _ = read(model, other_padding, MASK[order])
    np.testing.assert_allclose(np.asarray(permuted)[MASK[order]], np.asarray(whole)[order][MASK[order]], atol=1e-5)


def test_left_and_right_padding_mean_the_same(model):
    """The same 12 tokens at either end of the row."""
    tokens, mask = np.zeros((2, S), int), np.zeros((2, S), bool)
    tokens[0, :12] = tokens[1, -12:] = TOKENS[0, :12]
    mask[0, :12] = mask[1, -12:] = True
    hidden = np.asarray(read(model, np.tile(tokens, (2, 1)), np.tile(mask, (2, 1)))[0])
    np.testing.assert_allclose(hidden[0, :12], hidden[1, -12:], atol=1e-4)


def test_jit_and_no_jit_agree(model):
    with jax.disable_jit():
        plain, _ = models.read(model, TOKENS, MASK)
    np.testing.assert_allclose(np.asarray(plain)[MASK], np.asarray(read(model, TOKENS, MASK)[0])[MASK], atol=1e-4)


def test_padding_rows_and_empty_branches_have_finite_gradients_and_remat_changes_none(model):
    mask = MASK.copy()
    mask[1] = False

    def loss(params, remat):
        both = models.read_tree(
            dataclasses.replace(model, params=params), TOKENS, mask, BRANCH_TOKENS, BRANCH_MASK, START, remat=remat
        )
        return jnp.mean(jnp.square(both[0])) + jnp.mean(jnp.cos(both[1]))

    gradient = parity.quick_jit(jax.grad(loss), static_argnums=1)
    plain = gradient(model.params, "none")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    for remat in ("full", "dots"):
        again = gradient(model.params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-4 * np.abs(a).max()), plain, again)


def test_remat_computes_again_what_it_says(model):
    """Products of the gradient: "dots" keeps those of the layers, "full" computes them again."""

    def products(remat):
        def loss(params):
            hidden, _ = models.read(dataclasses.replace(model, params=params), TOKENS, MASK, remat=remat)
            return jnp.sum(hidden)

        return str(jax.make_jaxpr(jax.grad(loss))(model.params)).count("dot_general[")

    assert products("none") <= products("dots") < products("full")


def test_scores_in_blocks_change_nothing(model, tree, monkeypatch):
    monkeypatch.setattr(contexts, "QUERY_BLOCKS", (5, 5))
    # a new function object: the block's size is no part of jit's key
    blocked = parity.quick_jit(lambda *arrays: models.read_tree(*arrays))(
        model, TOKENS, MASK, BRANCH_TOKENS, BRANCH_MASK, START
    )
    np.testing.assert_allclose(np.asarray(blocked[0])[MASK], np.asarray(tree[0])[MASK], atol=1e-4)
    np.testing.assert_allclose(np.asarray(blocked[1])[BRANCH_MASK], np.asarray(tree[1])[BRANCH_MASK], atol=1e-4)


def test_scores_of_many_rows_come_in_smaller_blocks():
    assert contexts.query_block(8, 16, 128) == 1024, "no block is larger"
    assert contexts.query_block(8, 16, 4096) == 512, "2**28 scores"
    assert contexts.query_block(16, 16, 6144) == 128, "of 170 what the least block divides"
    assert contexts.query_block(512, 16, 6144) == 128, "no block is smaller"
    axes = jax.sharding.AbstractMesh((1, 64, 1), sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    assert contexts.query_block(512, 16, 6144, sharding.activation_layout(axes)) == 256, "8 rows on each of 64 devices"


def test_a_token_outside_the_vocabulary_is_loud(model):
    tokens = TOKENS.copy()
    tokens[0, 5] = model.config.vocab_size
    hidden, _ = read(model, tokens, MASK)
    assert np.isnan(hidden[0, 5]).all()
    assert np.isfinite(np.asarray(hidden)[1:][MASK[1:]]).all()


def test_a_cache_shorter_than_the_sequence_is_refused(model):
    with pytest.raises(ValueError, match="cache_length=10 is shorter than the 24 tokens"):
        models.read(model, TOKENS, MASK, cache_length=10)


def test_soft_caps_and_unembedding(model):
    values = parity.quick_jit(models.logits)(model, TOKENS, MASK)
    assert values.dtype == jnp.float32
    assert np.abs(values).max() < 5.0
    assert models.unembedding(model).shape == (model.config.hidden_size, model.config.vocab_size)
    assert parity.tiny_model("OLMo 2").params["lm_head"].shape == (48, 96)


def test_init_model_has_the_stated_scale():
    config = parity.case_config(parity.CASES[1])
    params = models.init_model(config, jax.random.key(0), jnp.bfloat16, compute_dtype=jnp.float32).params
    kernel = params["layers"]["attention"]["q_proj"]["kernel"].astype(jnp.float32)
    assert kernel.std() == pytest.approx(config.hidden_size**-0.5, rel=0.1)
    assert (params["final_norm"]["scale"] == 1).all()
    assert params["embedding"].dtype == jnp.bfloat16


def test_routed_layers_equal_a_sum_over_all_experts_in_value_and_gradient():
    config = parity.tiny_model("Qwen3-MoE").config
    layer = RoutedFeedForward(config, 1.0)
    rng = np.random.default_rng(0)
    experts, width, inner = config.num_experts, config.hidden_size, config.mlp_dim
    shapes = dict(gate_proj=(experts, width, inner), up_proj=(experts, width, inner), down_proj=(experts, inner, width))
    params = {name: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params["router"] = {"kernel": jnp.asarray(rng.normal(size=(width, experts)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 5, width)), jnp.float32)

    def dense(params, x):
        probability = jax.nn.softmax(x @ params["router"]["kernel"])
        threshold = jnp.sort(probability, axis=-1)[..., -config.experts_per_token, None]
        weight = jnp.where(probability >= threshold, probability, 0)
        weight = weight / weight.sum(axis=-1, keepdims=True)
        gate = jax.nn.silu(jnp.einsum("bsd,xdf->bsxf", x, params["gate_proj"]))
        up = jnp.einsum("bsd,xdf->bsxf", x, params["up_proj"])
        return jnp.einsum("bsxf,xfd,bsx->bsd", gate * up, params["down_proj"], weight)

    def routed(params, x):
        return layer.apply({"params": params}, x)

    target = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    results = [
        parity.quick_jit(jax.value_and_grad(lambda p, x, f=f: jnp.sum(f(p, x) * target), (0, 1)))(params, x)
        for f in (dense, routed)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *results)
