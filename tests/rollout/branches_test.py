"""Branches off one cache are what re-reading every prefix would give, and depend on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models, prng
from omniopd_jax.rollout import sampling
from omniopd_jax.rollout.branches import branch_keys, read_trunk, sample_branches
from omniopd_jax.rollout.sampling import SamplingRule

P, T, M, G, C = 4, 12, 3, 2, 5
STOP, BANNED = (5, 9, 13), (0, 1)
START = np.asarray([[0, 4, 11], [2, 7, 0], [0, 0, 0]], np.int32)
VALID = np.asarray([[True, True, True], [True, True, False], [True, False, False]])
FIELDS = ("tokens_BxMxGxC", "mask_BxMxGxC", "logprob_BxMxGxC")


def _trunk_inputs():
    """Three responses of 12, 9 and 0 tokens to prompts of 2, 4 and 0 tokens."""
    tokens = np.random.default_rng(0).integers(2, 61, (3, P + T)).astype(np.int32)
    mask = np.zeros((3, P + T), bool)
    for row, (prompt, response) in enumerate([(2, 12), (4, 9), (0, 0)]):
        mask[row, P - prompt : P + response] = True
    return np.where(mask, tokens, 0), mask


def _keys(indices, seed=0):
    return prng.row_keys(prng.named_key(seed, 0, "branches"), np.asarray(indices, np.int32))


def _branches(model, rows=(0, 1, 2), slots=(0, 1, 2), *, seed=0, **options):
    rows, slots = np.asarray(rows), np.asarray(slots)
    tokens, mask = _trunk_inputs()
    options = dict(num_branches=G, length=C, stop_tokens=STOP, banned_tokens=BANNED) | options
    return sample_branches(
        model,
        read_trunk(model, tokens[rows], mask[rows]),
        START[rows][:, slots],
        VALID[rows][:, slots],
        _keys(rows, seed),
        prompt_width=P,
        **options,
    )


@functools.partial(jax.jit, static_argnums=4)
def _naive_step(model, tokens_AxW, mask_AxW, uniform_A, rule):
    """The next token of each sequence by a full forward pass over it."""
    logits = models.logits(model, tokens_AxW, mask_AxW)
    last = tokens_AxW.shape[1] - 1 - jnp.argmax(mask_AxW[:, ::-1], axis=1)
    drawn = sampling.draw(logits[jnp.arange(len(last)), last], uniform_A[:, None], rule)
    return drawn.token_AxQ[:, 0], drawn.logprob_AxQ[:, 0]


def _naive(model, rule):
    """Every prefix of every branch as a sequence of its own, read anew for each token."""
    trunk_tokens, trunk_mask = _trunk_inputs()
    keys = branch_keys(_keys([0, 1, 2]), START, G)
    places = [(b, m, g) for b in range(3) for m in range(M) for g in range(G)]
    width = P + T + C
    sequences = []
    for b, m, _ in places:
        column = P + START[b, m]
        sequences.append(trunk_tokens[b, :column][trunk_mask[b, :column]].tolist())
    tokens_out = np.zeros((3, M, G, C), np.int32)
    mask_out = np.zeros((3, M, G, C), bool)
    logprob_out = np.zeros((3, M, G, C), np.float32)
    flat_keys = jnp.stack([keys[place] for place in places])
    is_done = [not VALID[b, m] for b, m, _ in places]
    for step in range(C):
        tokens, mask = np.zeros((len(places), width), np.int32), np.zeros((len(places), width), bool)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
        uniform = sampling.uniforms(flat_keys, jnp.full(len(places), step))
        token, logprob = map(np.asarray, _naive_step(model, tokens, mask, uniform, rule))
        for row, place in enumerate(places):
            if not is_done[row]:
                tokens_out[(*place, step)], mask_out[(*place, step)] = token[row], True
                logprob_out[(*place, step)] = logprob[row]
                sequences[row].append(int(token[row]))
                is_done[row] = token[row] in STOP
    return tokens_out, mask_out, logprob_out


@pytest.fixture(scope="module")
def branches(model):
    return _branches(model)


@pytest.mark.parametrize("which", ["model", "windowed_model"])
def test_branches_are_what_rereading_every_prefix_gives(which, request):
    model = request.getfixturevalue(which)
    branches = _branches(model)
    tokens, mask, logprob = _naive(model, SamplingRule(stop_tokens=STOP, banned_tokens=BANNED))
    # The empty response of an empty prompt has no prefix to read; it must only do no harm.
    np.testing.assert_array_equal(branches.tokens_BxMxGxC[:2], tokens[:2])
    np.testing.assert_array_equal(branches.mask_BxMxGxC[:2], mask[:2])
    np.testing.assert_allclose(branches.logprob_BxMxGxC[:2], logprob[:2], atol=1e-5)
    lengths = mask[:2].sum(-1)[VALID[:2]]
    assert set(lengths.ravel()) > {C}, "the case should hold branches that stop and that do not"
    assert len({tuple(row) for row in tokens[:2][VALID[:2]].reshape(-1, C)}) > 8, "the branches should differ"


def test_invalid_slots_are_empty_and_everything_is_finite(branches):
    np.testing.assert_array_equal(np.asarray(branches.mask_BxMxGxC).any(axis=(2, 3)), VALID)
    for field in FIELDS:
        values = np.asarray(getattr(branches, field))
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values[~np.asarray(branches.mask_BxMxGxC)], 0)


def test_a_branch_ends_with_its_first_stop_token(branches):
    tokens, mask = np.asarray(branches.tokens_BxMxGxC), np.asarray(branches.mask_BxMxGxC)
    for place in zip(*np.nonzero(mask[..., 0]), strict=True):
        response = tokens[place][mask[place]].tolist()
        stops = [step for step, token in enumerate(response) if token in STOP]
        assert len(response) == (stops[0] + 1 if stops else C)
        np.testing.assert_array_equal(mask[place], np.arange(C) < len(response))


def test_other_responses_starts_and_branches_do_not_matter(model, branches):
    moved = _branches(model, (1, 2, 0), (1, 2, 0))
    for field in FIELDS:
        expected = np.asarray(getattr(branches, field))[[1, 2, 0]][:, [1, 2, 0]]
        np.testing.assert_allclose(getattr(moved, field), expected, atol=1e-5)
    more = _branches(model, num_branches=G + 2)
    np.testing.assert_array_equal(more.tokens_BxMxGxC[:, :, :G], branches.tokens_BxMxGxC)


def test_a_branchs_key_is_its_responses_key_its_start_and_its_number():
    keys_B, number = _keys([3, 8]), 1
    keys = branch_keys(keys_B, np.asarray([[4, 11], [11, 0]]), 3)
    expected = jax.random.fold_in(jax.random.fold_in(keys_B[1], 11), number)
    np.testing.assert_array_equal(jax.random.key_data(keys[1, 0, number]), jax.random.key_data(expected))
    assert len(np.unique(np.asarray(jax.random.key_data(keys)).reshape(12, -1), axis=0)) == 12


def test_seeds_reproduce_and_differ(model, branches):
    np.testing.assert_array_equal(_branches(model).tokens_BxMxGxC, branches.tokens_BxMxGxC)
    assert (np.asarray(_branches(model, seed=1).tokens_BxMxGxC) != np.asarray(branches.tokens_BxMxGxC)).any()


def test_greedy_branches_repeat_themselves(model):
    tokens = np.asarray(_branches(model, temperature=0.0).tokens_BxMxGxC)
    np.testing.assert_array_equal(tokens[:, :, 0], tokens[:, :, 1])


def test_one_token_branches_are_the_beginnings_of_longer_ones(model, branches):
    short = _branches(model, length=1)
    np.testing.assert_array_equal(short.tokens_BxMxGxC[..., 0], branches.tokens_BxMxGxC[..., 0])


def test_inputs_that_do_not_fit_are_refused_in_one_sentence(model):
    trunk = read_trunk(model, *_trunk_inputs())
    options = dict(prompt_width=P, num_branches=G, length=C)
    with pytest.raises(ValueError, match="as many rows"):
        sample_branches(model, trunk, START[:2], VALID[:2], _keys([0, 1]), **options)
    with pytest.raises(ValueError, match="3 responses need as many keys"):
        sample_branches(model, trunk, START, VALID, _keys([0, 1]), **options)
    with pytest.raises(ValueError, match="prompt_width"):
        sample_branches(model, trunk, START, VALID, _keys([0, 1, 2]), **(options | dict(prompt_width=0)))
    with pytest.raises(ValueError, match="num_branches and length"):
        sample_branches(model, trunk, START, VALID, _keys([0, 1, 2]), **(options | dict(length=0)))


def test_a_branch_adds_its_own_columns_and_no_copy_of_the_trunk():
    """The compiler's own figures for a trunk of 512 columns in four layers; nothing is computed."""
    columns, length, layers, heads, width = 512, 9, 4, 2, 32
    decoder = models.decoder_config(
        dict(
            architectures=["Qwen3ForCausalLM"], vocab_size=64, hidden_size=32, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=width, intermediate_size=32,
            rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=columns,
        )
    )  # fmt: skip
    model = jax.eval_shape(lambda: models.init_model(decoder, jax.random.key(0)))

    def temporaries(num_branches):
        def run(model, tokens, mask, start, is_valid):
            trunk = read_trunk(model, tokens, mask)
            keys = jax.random.split(jax.random.key(0), 1)
            return sample_branches(
                model, trunk, start, is_valid, keys, prompt_width=8, num_branches=num_branches, length=length
            )

        shapes = [((1, columns), "int32"), ((1, columns), "bool"), ((1, 2), "int32"), ((1, 2), "bool")]
        compiled = jax.jit(run).lower(model, *(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = 8, 40
    a_branch = (temporaries(many) - temporaries(few)) / (2 * (many - few))
    a_column = 2 * layers * heads * width * 4  # keys and values
    print(f"{a_branch / 2**10:.1f} KiB a branch, its own columns {(length - 1) * a_column / 2**10:.1f} KiB")
    assert (length - 1) * a_column <= a_branch < 2 * (length - 1) * a_column
