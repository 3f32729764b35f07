"""Attention against a float64 reference with explicit loops over heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.models.attention import attention, branch_attention, in_blocks

B, Q, S, H, K, E, R, C = 2, 3, 7, 4, 2, 6, 3, 2
SCALE = 0.4


def reference(q, keys, values, is_visible, softcap):
    """One query head over its keys, [Q, E] · [S, E] → [Q, E], float64."""
    scores = SCALE * q @ keys.T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(is_visible, np.exp(scores - scores.max()), 0)
    return weights @ values / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_grouped_heads_masks_and_caps(softcap):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(B, Q, H, E)), rng.normal(size=(B, K, S, E)), rng.normal(size=(B, K, S, E))
    is_visible = rng.random((B, Q, S)) < 0.6
    is_visible[..., 0] = True
    out = attention(*_float32(q, k.swapaxes(2, 3), v), is_visible, scale=SCALE, softcap=softcap)
    for b in range(B):
        for h in range(H):
            group = h // (H // K)
            want = reference(q[b, :, h], k[b, group], v[b, group], is_visible[b], softcap)
            np.testing.assert_allclose(out[b, :, h], want, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_branch_attends_to_its_trunk_and_itself_in_one_softmax(softcap):
    rng = np.random.default_rng(1)
    q, own_k, own_v = (
        rng.normal(size=(B, R, C, H, E)),
        rng.normal(size=(B, R, K, C, E)),
        rng.normal(size=(B, R, K, C, E)),
    )
    k, v = rng.normal(size=(B, K, S, E)), rng.normal(size=(B, K, S, E))
    sees_trunk, sees_own = rng.random((B, R, C, S)) < 0.5, np.broadcast_to(np.tri(C, dtype=bool), (B, R, C, C))
    arrays = _float32(q, k.swapaxes(2, 3), v)
    own = _float32(own_k.swapaxes(3, 4), own_v)
    out = branch_attention(*arrays, sees_trunk, *own, sees_own, scale=SCALE, softcap=softcap)
    for b in range(B):
        for r in range(R):
            for h in range(H):
                group = h // (H // K)
                keys = np.concatenate([k[b, group], own_k[b, r, group]])
                values = np.concatenate([v[b, group], own_v[b, r, group]])
                is_visible = np.concatenate([sees_trunk[b, r], sees_own[b, r]], axis=1)
                want = reference(q[b, r, :, h], keys, values, is_visible, softcap)
                np.testing.assert_allclose(out[b, r, :, h], want, atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_and_has_finite_gradients():
    ones = jnp.ones((1, 2, 2, E))
    is_visible = jnp.zeros((1, 2, 2), bool)

    def total(q):
        return attention(q, ones.swapaxes(2, 3), ones, is_visible, scale=1e4).sum()

    value, gradient = jax.value_and_grad(total)(ones)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_blocks_give_what_the_whole_gives():
    x = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    row = jnp.arange(7.0)[None]  # one row for the whole batch

    def double(arrays):
        return 2 * arrays[0] + arrays[1][..., None]

    for size in (1, 3, 7, 10):
        np.testing.assert_array_equal(in_blocks(double, (x, row), size), double((x, row)))


def _float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)
