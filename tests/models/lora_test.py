"""Adapters: off they cost nothing, on they are what peft computes, merged they are one model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.models.lora import adapter_axes
from tests.models import parity

TOKENS, MASK = parity.tokens_and_mask()


@pytest.fixture(scope="module")
def base():
    return parity.tiny_model("SmolLM2")


@pytest.fixture(scope="module")
def adapted(base):
    """Adapters on every linear layer, with a b that is not zero."""
    model = models.add_adapters(base, jax.random.key(1), rank=3, alpha=6.0)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), model.adapters)
    return dataclasses.replace(model, adapters=noisy)


@pytest.fixture(scope="module")
def logprobs(adapted):
    return parity.our_logprobs(adapted, TOKENS, MASK)


def test_fresh_adapters_change_nothing_and_share_the_parameters(base):
    fresh = models.add_adapters(base, jax.random.key(1), rank=3, alpha=6.0)
    assert all(mine is theirs for mine, theirs in zip(*map(jax.tree.leaves, (fresh.params, base.params)), strict=True))
    before, after = (parity.our_logprobs(model, TOKENS, MASK) for model in (base, fresh))
    assert parity.errors(after, before, MASK).max() < 1e-5
    reference = dataclasses.replace(fresh, adapters=None)
    assert reference.adapters is None
    assert reference.params is fresh.params


def test_merged_equals_adapters_on(base, adapted, logprobs):
    merged = models.merge(adapted)
    assert merged.adapters is None
    assert parity.errors(parity.our_logprobs(merged, TOKENS, MASK), logprobs, MASK).max() < 1e-3
    plain = parity.our_logprobs(base, TOKENS, MASK)
    assert parity.errors(logprobs, plain, MASK).max() > 1.0
    assert models.merge(base) is base


def test_export_merges_tensor_by_tensor(adapted, tmp_path):
    models.save_model(tmp_path / "merged", adapted)
    saved, merged = models.load_model(tmp_path / "merged").params, models.merge(adapted).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), saved, merged)


def test_decoding_carries_adapters(adapted):
    full, _ = parity.quick_jit(models.read)(adapted, TOKENS, MASK)
    decoded = parity.decoded_hidden(adapted, TOKENS, MASK)
    assert parity.errors(decoded, full[:, parity.PROMPT :], MASK[:, parity.PROMPT :]).max() < 1e-4


def test_targets_are_a_pattern_matched_whole(base):
    model = models.add_adapters(base, jax.random.key(0), rank=2, alpha=2.0, targets="[qv]_proj")
    assert set(model.adapters["layers"]) == {"attention"}
    assert set(model.adapters["layers"]["attention"]) == {"q_proj", "v_proj"}
    assert model.adapters["layers"]["attention"]["v_proj"]["b"].shape == (2, 2, 2, 12)
    with pytest.raises(models.ModelError, match="'q_pro' matches none of the linear layers q_proj"):
        models.add_adapters(base, jax.random.key(0), rank=2, alpha=2.0, targets="q_pro")


def test_gradients_reach_adapters_alone(adapted):
    def loss(adapters):
        return models.read(dataclasses.replace(adapted, adapters=adapters), TOKENS, MASK)[0].mean()

    gradient = parity.quick_jit(jax.grad(loss))(adapted.adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapted.adapters)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_axes_have_the_tree_of_the_adapters(adapted):
    ranks = jax.tree.map(len, adapter_axes(adapted), is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(jnp.ndim, adapted.adapters)


def test_peft_loads_the_adapter_folder_and_computes_the_same(base, adapted, logprobs, tmp_path):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    models.save_model(tmp_path / "base", base)
    models.save_adapters(tmp_path / "adapters", adapted, base=str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()
    truth = parity.reference_logprobs(theirs, TOKENS, MASK)
    assert parity.errors(logprobs, truth, MASK).max() < 1e-4
    with pytest.raises(models.ModelError, match="no adapters to export"):
        models.save_adapters(tmp_path / "none", base)
