"""The anchor: exact over the vocabulary, and exactly nothing at the base model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo.divergences import anchor_kl, logprob_and_anchor_kl
from omniopd_jax.algo.entropy import token_logprob

B, T, D, V = 2, 5, 4, 9
WEIGHT = np.cos(np.arange(B * T)).reshape(B, T)


kl_of = jax.jit(anchor_kl, static_argnames=("block_tokens", "logit_softcap"))


def slopes(loss):
    """The gradient in hidden states and unembedding."""
    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def log_softmax(hidden, unembed, softcap):
    with np.errstate(all="ignore"):
        logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def dense_kl(ref_hidden, ref_unembed, hidden, unembed, softcap=None):
    reference = log_softmax(ref_hidden, ref_unembed, softcap)
    student = log_softmax(hidden, unembed, softcap)
    with np.errstate(all="ignore"):
        return np.where(np.exp(reference) > 0, np.exp(reference) * (reference - student), 0.0).sum(-1)


def numeric_gradient(function, point, step=1e-5):
    point = np.asarray(point, np.float64)
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = np.stack([point, point])
        moved[(0, *index)] += step
        moved[(1, *index)] -= step
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    ref_hidden, hidden = rng.normal(size=(2, B, T, D)).astype(np.float32)
    ref_unembed, unembed = (1.5 * rng.normal(size=(2, D, V))).astype(np.float32)
    return ref_hidden, ref_unembed, hidden, unembed


@pytest.mark.parametrize(("block_tokens", "softcap"), [(1, None), (4, 2.0), (4, None), (512, None)])
def test_any_block_gives_the_dense_values(inputs, block_tokens, softcap):
    kl = kl_of(*inputs, block_tokens=block_tokens, logit_softcap=softcap)
    assert kl.shape == (B, T)
    assert kl.dtype == jnp.float32
    np.testing.assert_allclose(kl, dense_kl(*inputs, softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_the_dense_definition(inputs, softcap):
    ref_hidden, ref_unembed, hidden, unembed = inputs

    def loss(hidden, unembed):
        kl = anchor_kl(ref_hidden, ref_unembed, hidden, unembed, block_tokens=4, logit_softcap=softcap)
        return jnp.sum(WEIGHT * kl)

    def dense_loss(hidden, unembed):
        return np.sum(WEIGHT * dense_kl(ref_hidden, ref_unembed, hidden, unembed, softcap))

    actual = slopes(loss)(hidden, unembed)
    expected_hidden = numeric_gradient(lambda h: dense_loss(h, unembed), hidden)
    expected_unembed = numeric_gradient(lambda w: dense_loss(hidden, w), unembed)
    np.testing.assert_allclose(actual[0], expected_hidden, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(actual[1], expected_unembed, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_at_equal_parameters_it_is_exactly_nothing(inputs, wrap):
    _, _, hidden, unembed = inputs

    def loss(hidden_, unembed_):
        kl = anchor_kl(hidden, unembed, hidden_, unembed_, block_tokens=3)
        return jnp.sum(WEIGHT * kl), kl

    gradients, kl = wrap(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, unembed)
    np.testing.assert_array_equal(kl, 0.0)
    jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0.0), gradients)


def test_no_gradient_reaches_the_reference(inputs):
    gradients = slopes(lambda *arrays: jnp.sum(anchor_kl(*arrays)))(*inputs)
    jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0.0), gradients)


def _ban(hidden, unembed):
    hidden, unembed = np.copy(hidden), np.copy(unembed)
    hidden[..., 0] = 1.0
    unembed[:, 5] = 0.0
    unembed[0, 5] = -np.inf
    return hidden, unembed


def test_a_token_banned_on_both_sides_contributes_nothing(inputs):
    reference, student = _ban(*inputs[:2]), _ban(*inputs[2:])

    def loss(hidden, unembed, reference):
        return jnp.sum(WEIGHT * anchor_kl(*reference, hidden, unembed, block_tokens=4))

    without = np.delete(reference[1], 5, 1), np.delete(student[1], 5, 1)
    np.testing.assert_allclose(
        kl_of(*reference, *student), dense_kl(reference[0], without[0], student[0], without[1]), rtol=1e-5
    )
    d_hidden, d_unembed = slopes(loss)(*student, reference)
    expected = slopes(loss)(student[0], without[1], (reference[0], without[0]))
    np.testing.assert_allclose(d_hidden, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.delete(d_unembed, 5, 1), expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(d_unembed[:, 5], 0.0)


def test_a_token_that_only_one_side_bans(inputs):
    reference, student = inputs[:2], _ban(*inputs[2:])
    assert np.all(np.asarray(kl_of(*reference, *student)) == np.inf)
    gradients = slopes(lambda h, w: jnp.sum(anchor_kl(*reference, h, w)))(*student)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    reference, student = _ban(*inputs[:2]), inputs[2:]
    np.testing.assert_allclose(kl_of(*reference, *student), dense_kl(*reference, *student), rtol=1e-5)


def test_one_reading_of_the_logits_equals_two(inputs):
    ref_hidden, ref_unembed, hidden, unembed = inputs
    targets = np.arange(B * T).reshape(B, T) % V

    def together(hidden, unembed):
        logprob, kl = logprob_and_anchor_kl(ref_hidden, ref_unembed, hidden, unembed, targets, block_tokens=4)
        return jnp.sum(WEIGHT * logprob) + jnp.sum(WEIGHT**2 * kl)

    def apart(hidden, unembed):
        kl = anchor_kl(ref_hidden, ref_unembed, hidden, unembed, block_tokens=4)
        return jnp.sum(WEIGHT * token_logprob(hidden, unembed, targets, block_tokens=4)) + jnp.sum(WEIGHT**2 * kl)

    one, two = (jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembed) for loss in (together, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, two)


def test_vocabularies_of_two_sizes_are_refused(inputs):
    ref_hidden, ref_unembed, hidden, unembed = inputs
    with pytest.raises(ValueError, match="share one vocabulary, got 8 and 9"):
        anchor_kl(ref_hidden, ref_unembed[:, :-1], hidden, unembed)
