"""Entropy and log-probability against dense float64, whatever the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo.entropy import entropy_and_logprob, token_logprob
from tests.algo.numeric import numeric_gradient

B, T, D, V = 3, 5, 4, 11


scored = jax.jit(entropy_and_logprob, static_argnames=("block_tokens", "logit_softcap"))
logprob_of = jax.jit(token_logprob, static_argnames=("block_tokens", "logit_softcap"))


def dense(hidden, unembed, targets, softcap=None):
    """float64, [B, T, V] and all."""
    with np.errstate(all="ignore"):
        logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        logprobs = logits - logits.max(-1, keepdims=True)
        logprobs = logprobs - np.log(np.exp(logprobs).sum(-1, keepdims=True))
        entropy = -np.where(np.exp(logprobs) > 0, np.exp(logprobs) * logprobs, 0.0).sum(-1)
    return entropy, np.take_along_axis(logprobs, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembed = (2 * rng.normal(size=(D, V))).astype(np.float32)
    return hidden, unembed, rng.integers(0, V, size=(B, T))


@pytest.fixture(scope="module")
def banned(inputs):
    """Tokens 2 and 7 have logits of −1e30 everywhere; no target is banned."""
    hidden, unembed, targets = (np.copy(x) for x in inputs)
    hidden[..., 0] = 1.0
    unembed[0, [2, 7]] = -1e30
    unembed[1:, [2, 7]] = 0.0
    return hidden, unembed, np.where(np.isin(targets, (2, 7)), 0, targets)


def weighted(hidden, unembed, targets, block_tokens=4, softcap=None):
    """A scalar that hangs on both results of every position with weights of its own."""
    entropy, logprob = scored(hidden, unembed, targets, block_tokens=block_tokens, logit_softcap=softcap)
    return jnp.sum(entropy * jnp.cos(jnp.arange(B * T)).reshape(B, T)) + jnp.sum(
        logprob * jnp.sin(jnp.arange(B * T)).reshape(B, T)
    )


slopes = jax.jit(jax.grad(weighted, argnums=(0, 1)), static_argnums=(3, 4))


def weighted_dense(hidden, unembed, targets, softcap=None):
    entropy, logprob = dense(hidden, unembed, targets, softcap)
    weights = np.arange(B * T).reshape(B, T)
    return np.sum(entropy * np.cos(weights)) + np.sum(logprob * np.sin(weights))


@pytest.mark.parametrize("block_tokens", [1, 4, 7, 512])
def test_any_block_gives_the_dense_values(inputs, block_tokens):
    entropy, logprob = scored(*inputs, block_tokens=block_tokens)
    expected_entropy, expected_logprob = dense(*inputs)
    assert entropy.shape == logprob.shape == (B, T)
    assert entropy.dtype == logprob.dtype == jnp.float32
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logprob, expected_logprob, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logprob, logprob_of(*inputs, block_tokens=block_tokens))


@pytest.mark.parametrize(("block_tokens", "softcap"), [(2, None), (4, 1.5), (512, None)])
def test_gradients_are_those_of_the_dense_definition(inputs, block_tokens, softcap):
    hidden, unembed, targets = inputs
    actual = slopes(hidden, unembed, targets, block_tokens, softcap)
    expected_hidden = numeric_gradient(lambda h: weighted_dense(h, unembed, targets, softcap), hidden)
    expected_unembed = numeric_gradient(lambda w: weighted_dense(hidden, w, targets, softcap), unembed)
    np.testing.assert_allclose(actual[0], expected_hidden, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(actual[1], expected_unembed, rtol=2e-5, atol=2e-5)


def test_the_logprob_path_has_the_same_gradient(inputs):
    hidden, unembed, targets = inputs
    full = jax.jit(
        jax.grad(lambda h, w: jnp.sum(jnp.sin(entropy_and_logprob(h, w, targets, block_tokens=4)[1])), (0, 1))
    )
    lean = jax.jit(jax.grad(lambda h, w: jnp.sum(jnp.sin(token_logprob(h, w, targets, block_tokens=4))), (0, 1)))
    jax.tree.map(np.testing.assert_array_equal, full(hidden, unembed), lean(hidden, unembed))


def test_banned_tokens_contribute_nothing_forward_and_backward(banned):
    hidden, unembed, targets = banned
    entropy, logprob = scored(hidden, unembed, targets, block_tokens=4)
    kept = np.delete(unembed, (2, 7), axis=1)
    renumbered = targets - (targets > 2) - (targets > 7)
    expected_entropy, expected_logprob = dense(hidden, kept, renumbered)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logprob, expected_logprob, rtol=1e-5, atol=1e-6)
    d_hidden, d_unembed = slopes(hidden, unembed, targets)
    kept_hidden, kept_unembed = slopes(hidden, kept, renumbered)
    np.testing.assert_allclose(d_hidden, kept_hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.delete(d_unembed, (2, 7), axis=1), kept_unembed, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d_unembed[:, (2, 7)], 0.0)


def test_a_banned_target_has_no_chance_and_no_nan(banned):
    hidden, unembed, targets = banned
    targets = np.full_like(targets, 2)
    assert np.all(np.asarray(logprob_of(hidden, unembed, targets)) < -1e29)
    gradients = jax.grad(lambda h, w: jnp.sum(token_logprob(h, w, targets)), (0, 1))(hidden, unembed)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_certainty_has_no_entropy_and_indifference_log_v(inputs):
    hidden, _, targets = inputs
    entropy, logprob = scored(hidden, np.zeros((D, V), np.float32), targets)
    np.testing.assert_allclose(entropy, np.log(V), rtol=1e-6)
    np.testing.assert_allclose(logprob, -np.log(V), rtol=1e-6)
    sure = np.zeros((D, V), np.float32)
    sure[:, 3] = 1e4
    entropy, _ = scored(np.ones_like(hidden), sure, targets)
    np.testing.assert_array_equal(entropy, 0.0)


def test_large_logits_keep_their_digits(inputs):
    hidden, unembed, targets = inputs
    shifted = np.concatenate([unembed, np.full((1, V), 200.0, np.float32)])  # every logit 200 higher: nothing changes
    longer = np.concatenate([hidden, np.ones((B, T, 1), np.float32)], axis=-1)
    for actual, expected in zip(scored(longer, shifted, targets), dense(*inputs), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=5e-5, atol=5e-5)


def test_jit_changes_nothing(inputs):
    plain, jitted = (f(*inputs, block_tokens=4) for f in (entropy_and_logprob, scored))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), plain, jitted)


def test_permuting_the_batch_permutes_the_result(inputs):
    hidden, unembed, targets = inputs
    order = np.array([2, 0, 1])
    for whole, permuted in zip(
        scored(hidden, unembed, targets, block_tokens=4),
        scored(hidden[order], unembed, targets[order], block_tokens=4),
        strict=True,
    ):
        np.testing.assert_array_equal(whole[order], permuted)


def test_half_precision_operands_are_summed_in_float32(inputs):
    hidden, unembed, targets = inputs
    half = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(unembed, jnp.bfloat16), np.float32)
    for actual, expected in zip(
        scored(half, unembed, targets),
        dense(np.asarray(half, np.float32), rounded, targets),
        strict=True,
    ):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    gradients = slopes(half, unembed, targets)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32


def test_no_positions_give_empty_results_and_no_gradient(inputs):
    unembed = inputs[1]
    empty = np.zeros((B, 0, D), np.float32), unembed, np.zeros((B, 0), np.int32)
    assert token_logprob(*empty).shape == (B, 0)
    gradient = jax.grad(lambda w: jnp.sum(token_logprob(empty[0], w, empty[2])))(unembed)
    np.testing.assert_array_equal(gradient, 0.0)


def test_memory_grows_with_the_block_and_not_with_the_batch():
    width, vocabulary, block = 8, 4096, 32

    def temporary_bytes(rows, tokens):
        shapes = (
            jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32),
            jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        )

        def loss(hidden, unembed, targets):
            return jnp.sum(jnp.prod(jnp.stack(entropy_and_logprob(hidden, unembed, targets, block_tokens=block)), 0))

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long, many = temporary_bytes(2, 64), temporary_bytes(2, 1024), temporary_bytes(1024, 2)
    a_block_of_logits = 4 * block * vocabulary
    assert short < 3 * a_block_of_logits
    # sixteen times the tokens, in long responses or in many: not one more block
    assert long - short < a_block_of_logits
    assert many - short < a_block_of_logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, y: (h, w.T, y), "unembedding must be"),
        (lambda h, w, y: (h, w, y[:, 1:]), "targets"),
        (lambda h, w, y: (h[0], w, y), "hidden states must be"),
    ],
)
def test_arrays_that_do_not_belong_together_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        entropy_and_logprob(*change(*inputs))
    with pytest.raises(ValueError, match="block_tokens must be at least 1"):
        entropy_and_logprob(*inputs, block_tokens=0)
