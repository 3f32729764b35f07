"""Softmax attention with grouped heads: plain, and of branches over a trunk that they share.

Keys lie [B, K, E, S] and values [B, K, S, E], the order in which both products are plain matrix products (measured on
CPU: scores of one decoded token four times faster than with keys [B, K, S, E]); no key is repeated for the heads of its
group. Scores and softmax are float32 whatever the inputs are. Masked scores are a large negative number and not -inf,
so a query that sees nothing (padding) yields finite garbage and finite gradients, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.types import Array

MASKED = -1e30
# [B, K, rows, n] · [B, K, n, m], spelt out: from an einsum XLA may choose an order of operands that its CPU backend
# runs ten times slower
_MATMUL = (((3,), (2,)), ((0, 1), (0, 1)))


def _softcap(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attention(
    q_BxQxHxE: Array,
    k_BxKxExS: Array,
    v_BxKxSxE: Array,
    is_visible_BxQxS: Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """softmax(cap(scale · q kᵀ)) v over the visible keys.

    Args:
      q_BxQxHxE: queries; head h belongs to key head h // (H / K).
      is_visible_BxQxS: bool.

    Returns:
      out_BxQxHxE in the dtype of the values.
    """
    b, q, h, e = q_BxQxHxE.shape
    kv_heads, s = v_BxKxSxE.shape[1:3]
    groups = h // kv_heads
    rows = q_BxQxHxE.reshape(b, q, kv_heads, groups, e).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, groups * q, e)
    scores = jax.lax.dot_general(rows, k_BxKxExS, _MATMUL, preferred_element_type=jnp.float32)
    scores = _softcap(scores.reshape(b, kv_heads, groups, q, s) * scale, softcap)
    scores = jnp.where(is_visible_BxQxS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxSxE.dtype)
    out = jax.lax.dot_general(weights.reshape(b, kv_heads, groups * q, s), v_BxKxSxE, _MATMUL)
    return out.reshape(b, kv_heads, groups, q, e).transpose(0, 3, 1, 2, 4).reshape(b, q, h, e)


def branch_attention(
    q_BxRxCxHxE: Array,
    trunk_k_BxKxExS: Array,
    trunk_v_BxKxSxE: Array,
    sees_trunk_BxRxCxS: Array,
    own_k_BxRxKxExJ: Array,
    own_v_BxRxKxJxE: Array,
    sees_own_BxRxCxJ: Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> Array:
    """Attention of branch tokens over their trunk's keys and their branch's own, in one softmax.

    The trunk's keys are read once for all R branches and never copied per branch. J is the number of own keys.

    Returns:
      out_BxRxCxHxE in the dtype of the values.
    """
    b, r, c, h, e = q_BxRxCxHxE.shape
    kv_heads, s = trunk_v_BxKxSxE.shape[1:3]
    j = own_v_BxRxKxJxE.shape[3]
    groups = h // kv_heads
    q = q_BxRxCxHxE.reshape(b, r, c, kv_heads, groups, e)
    rows = q.transpose(0, 3, 1, 4, 2, 5).reshape(b, kv_heads, r * groups * c, e)  # K first: the trunk is shared by R
    to_trunk = jax.lax.dot_general(rows, trunk_k_BxKxExS, _MATMUL, preferred_element_type=jnp.float32)
    to_trunk = to_trunk.reshape(b, kv_heads, r, groups, c, s)
    own_rows = rows.reshape(b, kv_heads, r, groups * c, e).swapaxes(1, 2).reshape(b * r, kv_heads, groups * c, e)
    own_k, own_v = own_k_BxRxKxExJ.reshape(b * r, kv_heads, e, j), own_v_BxRxKxJxE.reshape(b * r, kv_heads, j, e)
    to_own = jax.lax.dot_general(own_rows, own_k, _MATMUL, preferred_element_type=jnp.float32)
    to_own = to_own.reshape(b, r, kv_heads, groups, c, j).swapaxes(1, 2)

    sees_trunk = sees_trunk_BxRxCxS[:, None, :, None]
    to_trunk = jnp.where(sees_trunk, _softcap(to_trunk * scale, softcap), MASKED)
    to_own = jnp.where(sees_own_BxRxCxJ[:, None, :, None], _softcap(to_own * scale, softcap), MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_trunk, to_own], axis=-1), axis=-1).astype(trunk_v_BxKxSxE.dtype)

    trunk_weights = weights[..., :s].reshape(b, kv_heads, r * groups * c, s)
    out = jax.lax.dot_general(trunk_weights, trunk_v_BxKxSxE, _MATMUL).reshape(b, kv_heads, r, groups, c, e)
    own_weights = weights[..., s:].swapaxes(1, 2).reshape(b * r, kv_heads, groups * c, j)
    own_out = jax.lax.dot_general(own_weights, own_v, _MATMUL).reshape(b, r, kv_heads, groups, c, e)
    return (out + own_out.swapaxes(1, 2)).transpose(0, 2, 4, 1, 3, 5).reshape(b, r, c, h, e)


def in_blocks(function: Callable[[Any], Array], arrays: tuple[Array, ...], size: int) -> Array:
    """`function` over blocks of axis 1, one after the other and rematerialised: scores of one block exist at a time.

    Arrays may have 1 in place of B. The last block is padded with zeros, whose results are cut off.
    """
    length = arrays[0].shape[1]
    if length <= size:
        return function(arrays)
    num_blocks = -(-length // size)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, num_blocks * size - length) if axis == 1 else (0, 0) for axis in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(x.shape[0], num_blocks, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(function), tuple(split(x) for x in arrays))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], num_blocks * size, *out.shape[3:])[:, :length]
