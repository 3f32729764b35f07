"""The target between its limits: no evidence, endless evidence, agreement, disagreement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax.algo.targets import chunk_prior, posterior_target
from omniopd_jax.types import Anchors

ANCHORS = Anchors(
    start_BxM=np.array([[0, 3, 0], [2, 0, 0]], np.int32),
    is_valid_BxM=np.array([[True, True, False], [True, False, False]]),
)
LOGPROB = np.log(np.random.default_rng(0).uniform(0.05, 1.0, size=(2, 6))).astype(np.float32)


def test_the_prior_is_the_geometric_mean_of_the_chunk_s_probabilities():
    expected = np.zeros((2, 3))
    for row, slot, start in ((0, 0, 0), (0, 1, 3), (1, 0, 2)):
        expected[row, slot] = np.prod(np.exp(LOGPROB[row, start : start + 3].astype(np.float64))) ** (1 / 3)
    np.testing.assert_allclose(chunk_prior(LOGPROB, ANCHORS, chunk_tokens=3), expected, rtol=1e-6)


def test_an_impossible_chunk_has_prior_zero_and_harms_no_other():
    logprob = LOGPROB.copy()
    logprob[0, 1] = -np.inf
    prior = np.asarray(chunk_prior(logprob, ANCHORS, chunk_tokens=3))
    assert prior[0, 0] == 0.0
    np.testing.assert_array_equal(prior[1], chunk_prior(LOGPROB, ANCHORS, chunk_tokens=3)[1])
    assert np.all(np.isfinite(prior))


def test_neither_prior_nor_target_has_a_gradient():
    of_prior = jax.grad(lambda logprob: jnp.sum(chunk_prior(logprob, ANCHORS, chunk_tokens=3)))
    np.testing.assert_array_equal(of_prior(LOGPROB), 0.0)
    of_target = jax.grad(lambda k, prior: jnp.sum(posterior_target(k, jnp.ones(3), prior, prior_strength=1.0)), (0, 1))
    for gradient in of_target(jnp.ones(3), jnp.ones(3)):
        np.testing.assert_array_equal(gradient, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    prior=st.floats(0, 1),
    mean=st.floats(0, 1),
    count=st.integers(1, 40),
    strength=st.floats(0, 10),
)
def test_the_target_is_the_posterior_mean(prior, mean, count, strength):
    target = float(posterior_target(np.float32(mean * count), np.float32(count), np.float32(prior),
                                    prior_strength=strength))  # fmt: skip
    np.testing.assert_allclose(target, (mean * count + strength * prior) / (count + strength), rtol=1e-5, atol=1e-6)
    assert min(prior, mean) - 1e-5 <= target <= max(prior, mean) + 1e-5


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0])
def test_limits(strength):
    prior = np.float32([0.2, 0.9])
    none = np.zeros(2, np.float32)
    np.testing.assert_array_equal(posterior_target(none, none, prior, prior_strength=strength), prior)
    many = np.full(2, 1e6, np.float32)
    np.testing.assert_allclose(posterior_target(0.3 * many, many, prior, prior_strength=strength), 0.3, rtol=1e-4)
    # a lost continuation weakens the evidence instead of counting as disagreement
    ten, three = np.float32(10), np.float32(3)
    full, partial = (posterior_target(n, n, np.float32(0.2), prior_strength=strength) for n in (ten, three))
    assert 1 >= full >= partial >= 0.2
    # all agree, all disagree
    np.testing.assert_allclose(full, (10 + 0.2 * strength) / (10 + strength), rtol=1e-6)
    np.testing.assert_allclose(
        posterior_target(np.float32(0), ten, np.float32(0.2), prior_strength=strength),
        0.2 * strength / (10 + strength),
        rtol=1e-6,
    )
