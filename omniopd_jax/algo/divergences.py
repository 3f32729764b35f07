"""Divergences between the student and a white-box teacher, exact over the full vocabulary.

Blocks of tokens as in `entropy`; nothing is ever [B, T, V]. The KL anchor to the base model is in `fused`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.algo.blocks import block_logits, check_shapes, head_rows, pull_back, scan_blocks
from omniopd_jax.types import Array

KINDS = ("reverse_kl", "forward_kl", "jensen_shannon")


def teacher_divergence(
    teacher_hidden_BxTxD: Array,
    teacher_unembed_DxV: Array,
    hidden_BxTxE: Array,
    unembed_ExV: Array,
    *,
    kind: str,
    beta: float = 0.5,
    top_k: int = 0,
    block_tokens: int = 512,
    teacher_logit_softcap: float | None = None,
    logit_softcap: float | None = None,
) -> Array:
    """How far the student p_θ is from the teacher p_T at every position, float32 nats, divergence_BxT.

        reverse_kl       KL(p_θ ‖ p_T)
        forward_kl       KL(p_T ‖ p_θ)
        jensen_shannon   β KL(p_T ‖ m) + (1 − β) KL(p_θ ‖ m)        m = β p_T + (1 − β) p_θ

    GKD's definitions (arXiv 2306.13649, equations 1 and 2), at temperature 1. The backward pass computes each block's
    logits again; no gradient flows to the teacher. With D(p_T, p_θ) and s(v) = dD / dp_θ(v) it is
    dD / dlogits = p_θ (s − Σ_v p_θ(v) s(v)).

    Args:
      teacher_hidden_BxTxD, teacher_unembed_DxV: the teacher after its final norm, at its own width.
      hidden_BxTxE, unembed_ExV: the student; the vocabularies are one.
      kind: see above.
      beta: β of jensen_shannon, 0 < β < 1. Over β it tends to forward_kl as β → 0, over 1 − β to reverse_kl as β → 1.
      top_k: 0: the full vocabulary; k: the teacher's k likeliest tokens and one bucket for all others, on both sides.
        By the data-processing inequality never more than the full divergence.
      block_tokens: tokens a block of the scan.
      teacher_logit_softcap, logit_softcap: l ← cap · tanh(l / cap) where that model has one.

    A token banned on both sides (logits so low that p = 0) contributes 0.

    Raises:
      ValueError: a setting that cannot be, or shapes that do not belong together.
    """
    targets_BxT = jnp.zeros(hidden_BxTxE.shape[:2], jnp.int32)
    check_shapes(hidden_BxTxE, unembed_ExV, targets_BxT, block_tokens)
    check_shapes(teacher_hidden_BxTxD, teacher_unembed_DxV, targets_BxT, block_tokens)
    if teacher_unembed_DxV.shape[1] != unembed_ExV.shape[1]:
        raise ValueError(
            f"teacher and student must share one vocabulary, got {teacher_unembed_DxV.shape[1]} and "
            f"{unembed_ExV.shape[1]} tokens."
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, KINDS))}.")
    if kind == "jensen_shannon" and not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, both excluded, got {beta}.")
    if not 0 <= top_k < unembed_ExV.shape[1]:
        raise ValueError(f"top_k must be 0 (full vocabulary) to {unembed_ExV.shape[1] - 1}, got {top_k}.")
    teacher = jax.lax.stop_gradient((teacher_hidden_BxTxD, teacher_unembed_DxV))
    setting = (kind, float(beta), int(top_k), block_tokens, teacher_logit_softcap, logit_softcap)
    return _taught(*teacher, hidden_BxTxE, unembed_ExV, setting)


_Setting = tuple[str, float, int, int, float | None, float | None]  # kind, β, k, block, the two caps


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _taught(teacher_hidden: Array, teacher_unembed: Array, hidden: Array, unembed: Array, setting: _Setting) -> Any:
    return _taught_forward(teacher_hidden, teacher_unembed, hidden, unembed, setting)[0]


def _taught_forward(
    teacher_hidden: Array, teacher_unembed: Array, hidden: Array, unembed: Array, setting: _Setting
) -> Any:
    *_, block_tokens, teacher_softcap, softcap = setting
    teacher_operand, operand = head_rows(teacher_unembed, teacher_hidden.dtype), head_rows(unembed, hidden.dtype)

    def block(_, teacher_hidden_nxD, hidden_nxE):
        teacher_logits = block_logits(teacher_hidden_nxD, teacher_operand, teacher_softcap)
        return None, _value_and_slope(teacher_logits, block_logits(hidden_nxE, operand, softcap), setting)[0]

    _, value = scan_blocks(block, None, (teacher_hidden, hidden), block_tokens=block_tokens)
    return value, (teacher_hidden, teacher_unembed, hidden, unembed)


def _taught_backward(setting: _Setting, saved: Any, d_value: Array) -> Any:
    teacher_hidden, teacher_unembed, hidden, unembed = saved
    *_, block_tokens, teacher_softcap, softcap = setting
    teacher_operand, operand = head_rows(teacher_unembed, teacher_hidden.dtype), head_rows(unembed, hidden.dtype)

    def block(unembed_gradient, teacher_hidden_nxD, hidden_nxE, d_value_n):
        teacher_logits = block_logits(teacher_hidden_nxD, teacher_operand, teacher_softcap)
        logits = block_logits(hidden_nxE, operand, softcap)
        slope = d_value_n[:, None] * _value_and_slope(teacher_logits, logits, setting)[1]
        d_hidden, d_unembed = pull_back(slope, logits, hidden_nxE, operand, softcap)
        return unembed_gradient + d_unembed, d_hidden

    unembed_gradient, hidden_gradient = scan_blocks(
        block, jnp.zeros(unembed.shape, jnp.float32), (teacher_hidden, hidden, d_value), block_tokens=block_tokens
    )
    no_gradient = (jnp.zeros_like(teacher_hidden), jnp.zeros_like(teacher_unembed))
    return *no_gradient, hidden_gradient, unembed_gradient.astype(unembed.dtype)


_taught.defvjp(_taught_forward, _taught_backward)


def _value_and_slope(teacher_logits_nxV: Array, logits_nxV: Array, setting: _Setting) -> tuple[Array, Array]:
    """(divergence_n, its gradient in the student's logits_nxV)."""
    kind, beta, top_k, *_ = setting
    teacher_logprobs, logprobs = jax.nn.log_softmax(teacher_logits_nxV), jax.nn.log_softmax(logits_nxV)
    if not top_k:
        return _of_logprobs(teacher_logprobs, logprobs, kind, beta)
    top_nxk = jax.lax.top_k(teacher_logprobs, top_k)[1]
    row_nx1 = jnp.arange(top_nxk.shape[0])[:, None]
    is_top_nxV = jnp.zeros(logprobs.shape, bool).at[row_nx1, top_nxk].set(True)

    def bucketed(logprobs_nxV: Array) -> Array:
        tail_n = jax.nn.logsumexp(jnp.where(is_top_nxV, -jnp.inf, logprobs_nxV), axis=-1)
        return jnp.concatenate([jnp.take_along_axis(logprobs_nxV, top_nxk, axis=-1), tail_n[:, None]], axis=-1)

    buckets = bucketed(logprobs)
    value, slope = _of_logprobs(bucketed(teacher_logprobs), buckets, kind, beta)
    # the tail's slope falls on its tokens in proportion to their probability
    share_nxV = jnp.exp(logprobs - buckets[:, -1:])
    return value, (share_nxV * slope[:, -1:]).at[row_nx1, top_nxk].set(slope[:, :-1])


def _of_logprobs(teacher_logprobs: Array, logprobs: Array, kind: str, beta: float) -> tuple[Array, Array]:
    """(divergence, its gradient in logits) of distributions over the last axis."""
    teacher_probability, probability = jnp.exp(teacher_logprobs), jnp.exp(logprobs)

    def mean(of: Array, value: Array) -> Array:  # 0 · log 0 = 0
        return jnp.sum(jnp.where(of > 0, of * value, 0.0), axis=-1, keepdims=True)

    if kind == "forward_kl":
        value = mean(teacher_probability, teacher_logprobs - logprobs)
        return value[..., 0], probability - teacher_probability
    if kind == "reverse_kl":
        value = score_mean = mean(probability, logprobs - teacher_logprobs)
        score = logprobs - teacher_logprobs
    else:
        mixed = jnp.logaddexp(jnp.log(beta) + teacher_logprobs, jnp.log1p(-beta) + logprobs)
        score = (1 - beta) * (logprobs - mixed)
        score_mean = mean(probability, score)
        value = beta * mean(teacher_probability, teacher_logprobs - mixed) + score_mean
    return value[..., 0], jnp.where(probability > 0, probability * (score - score_mean), 0.0)
