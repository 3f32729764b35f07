"""Softmax attention with grouped heads: plain, and of branches over a trunk that they share.

Keys and values lie [B, K, S, E], the order in which both products are plain matrix products; no key is repeated for
the heads of its group. Scores and softmax are float32 whatever the inputs are. Masked scores are a large negative
number and not -inf, so a query that sees nothing (padding) yields finite garbage and finite gradients, never NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omniopd_jax.types import Array

MASKED = -1e30


def _softcap(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attention(
    q_BxQxHxE: Array,
    k_BxKxSxE: Array,
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
    kv_heads = k_BxKxSxE.shape[1]
    grouped = q_BxQxHxE.reshape(b, q, kv_heads, h // kv_heads, e)
    scores = jnp.einsum("bqkge,bkse->bkgqs", grouped, k_BxKxSxE, preferred_element_type=jnp.float32)
    scores = jnp.where(is_visible_BxQxS[:, None, None], _softcap(scores * scale, softcap), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxSxE.dtype)
    return jnp.einsum("bkgqs,bkse->bqkge", weights, v_BxKxSxE).reshape(b, q, h, e)


def branch_attention(
    q_BxRxCxHxE: Array,
    trunk_k_BxKxSxE: Array,
    trunk_v_BxKxSxE: Array,
    sees_trunk_BxRxCxS: Array,
    own_k_BxRxKxJxE: Array,
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
    kv_heads, s = trunk_k_BxKxSxE.shape[1:3]
    grouped = q_BxRxCxHxE.reshape(b, r, c, kv_heads, h // kv_heads, e)
    to_trunk = jnp.einsum("brckge,bkse->bkgrcs", grouped, trunk_k_BxKxSxE, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("brckge,brkje->bkgrcj", grouped, own_k_BxRxKxJxE, preferred_element_type=jnp.float32)
    to_trunk = jnp.where(sees_trunk_BxRxCxS[:, None, None], _softcap(to_trunk * scale, softcap), MASKED)
    to_own = jnp.where(sees_own_BxRxCxJ[:, None, None], _softcap(to_own * scale, softcap), MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_trunk, to_own], axis=-1), axis=-1).astype(trunk_v_BxKxSxE.dtype)
    out = jnp.einsum("bkgrcs,bkse->brckge", weights[..., :s], trunk_v_BxKxSxE)
    out = out + jnp.einsum("bkgrcj,brkje->brckge", weights[..., s:], own_v_BxRxKxJxE)
    return out.reshape(b, r, c, h, e)
