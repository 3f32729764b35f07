"""The KL anchor to the frozen base model, exact over the full vocabulary.

    KL(π_ref ‖ π_θ)_t = Σ_v π_ref,t(v) (log π_ref,t(v) − log π_θ,t(v))        d KL / d logits_θ = π_θ − π_ref

The paper's anchor is this forward KL (base model first). Blocks of tokens as in `entropy`; nothing is ever [B, T, V].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.algo.blocks import block_logits, check_shapes, pull_back, scan_blocks, without_neginf
from omniopd_jax.algo.entropy import log_normaliser, logprob_gradient, target_logit
from omniopd_jax.types import Array


def anchor_kl(
    ref_hidden_BxTxD: Array,
    ref_unembed_DxV: Array,
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    *,
    block_tokens: int = 512,
    logit_softcap: float | None = None,
) -> Array:
    """KL(π_ref ‖ π_θ) of every position, float32 nats, kl_BxT.

    Exactly 0, with a gradient of exactly 0, where both sides hold the same numbers. A token banned on both sides
    (−inf logits) contributes 0; one that only the student bans makes the KL inf, with a finite gradient. No gradient
    flows to the reference. Arguments as in `entropy_and_logprob`.
    """
    targets_BxT = jnp.zeros(hidden_BxTxD.shape[:2], jnp.int32)
    return logprob_and_anchor_kl(
        ref_hidden_BxTxD,
        ref_unembed_DxV,
        hidden_BxTxD,
        unembed_DxV,
        targets_BxT,
        block_tokens=block_tokens,
        logit_softcap=logit_softcap,
    )[1]


def logprob_and_anchor_kl(
    ref_hidden_BxTxD: Array,
    ref_unembed_DxV: Array,
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    targets_BxT: Array,
    *,
    block_tokens: int = 512,
    logit_softcap: float | None = None,
) -> tuple[Array, Array]:
    """`token_logprob` and `anchor_kl` of the same positions from one reading of the student's logits.

    An update needs both; apart they cost ten products with an unembedding, together six.

    Returns:
      (logprob_BxT, kl_BxT), float32, nats.
    """
    check_shapes(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens)
    check_shapes(ref_hidden_BxTxD, ref_unembed_DxV, targets_BxT, block_tokens)
    if ref_unembed_DxV.shape[1] != unembed_DxV.shape[1]:
        raise ValueError(
            f"reference and student must share one vocabulary, got {ref_unembed_DxV.shape[1]} and "
            f"{unembed_DxV.shape[1]} tokens."
        )
    reference = jax.lax.stop_gradient((ref_hidden_BxTxD, ref_unembed_DxV))
    return _anchored(*reference, hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens, logit_softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _anchored(
    ref_hidden: Array,
    ref_unembed: Array,
    hidden: Array,
    unembed: Array,
    targets: Array,
    block_tokens: int,
    softcap: float | None,
) -> Any:
    return _anchored_forward(ref_hidden, ref_unembed, hidden, unembed, targets, block_tokens, softcap)[0]


def _anchored_forward(
    ref_hidden: Array,
    ref_unembed: Array,
    hidden: Array,
    unembed: Array,
    targets: Array,
    block_tokens: int,
    softcap: float | None,
) -> Any:
    ref_operand, operand = ref_unembed.astype(ref_hidden.dtype), unembed.astype(hidden.dtype)

    def block(_, ref_hidden_nxD, hidden_nxD, targets_n):
        ref_logits = block_logits(ref_hidden_nxD, ref_operand, softcap)
        logits = block_logits(hidden_nxD, operand, softcap)
        ref_peak, ref_log_total = log_normaliser(ref_logits)
        peak, log_total = log_normaliser(logits)
        ref_logprobs, logprobs = ref_logits - ref_peak - ref_log_total, logits - peak - log_total
        ref_probability = jnp.exp(ref_logprobs)
        kl = jnp.sum(jnp.where(ref_probability > 0, ref_probability * (ref_logprobs - logprobs), 0.0), axis=-1)
        logprob = target_logit(logits, targets_n) - peak - log_total
        return None, (logprob[:, 0], kl, (ref_peak + ref_log_total)[:, 0], (peak + log_total)[:, 0])

    _, (logprob, kl, ref_normaliser, normaliser) = scan_blocks(
        block, None, (ref_hidden, hidden, targets), block_tokens=block_tokens
    )
    return (logprob, kl), (ref_hidden, ref_unembed, hidden, unembed, targets, ref_normaliser, normaliser)


def _anchored_backward(block_tokens: int, softcap: float | None, saved: Any, gradients: Any) -> Any:
    ref_hidden, ref_unembed, hidden, unembed, targets, ref_normaliser, normaliser = saved
    ref_operand, operand = ref_unembed.astype(ref_hidden.dtype), unembed.astype(hidden.dtype)
    finite = without_neginf(operand)

    def block(unembed_gradient, ref_hidden_nxD, hidden_nxD, targets_n, ref_normaliser_n, normaliser_n, d_logprob, d_kl):
        ref_logits = block_logits(ref_hidden_nxD, ref_operand, softcap)
        logits = block_logits(hidden_nxD, operand, softcap)
        ref_probability = jnp.exp(ref_logits - ref_normaliser_n[:, None])
        probability = jnp.exp(logits - normaliser_n[:, None])
        gradient = d_logprob[:, None] * logprob_gradient(probability, targets_n)
        gradient += d_kl[:, None] * (probability - ref_probability)
        d_hidden, d_unembed = pull_back(gradient, (d_logprob != 0) | (d_kl != 0), logits, hidden_nxD, finite, softcap)
        return unembed_gradient + d_unembed, d_hidden

    unembed_gradient, hidden_gradient = scan_blocks(
        block,
        jnp.zeros(unembed.shape, jnp.float32),
        (ref_hidden, hidden, targets, ref_normaliser, normaliser, *gradients),
        block_tokens=block_tokens,
    )
    no_gradient = (jnp.zeros_like(ref_hidden), jnp.zeros_like(ref_unembed))
    return *no_gradient, hidden_gradient, unembed_gradient.astype(unembed.dtype), None


_anchored.defvjp(_anchored_forward, _anchored_backward)
