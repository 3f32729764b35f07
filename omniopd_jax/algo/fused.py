"""A loss of token log-probabilities and the KL anchor whose gradient is taken while the logits are there.

The paper's anchor is the forward KL, base model first, exact over the full vocabulary:

    KL(π_ref ‖ π_θ)_t = Σ_v π_ref,t(v) (log π_ref,t(v) − log π_θ,t(v))        d KL / d logits_θ = π_θ − π_ref

A loss that is a sum over tokens, L = Σ_t f_t(log p_t(y_t), KL_t), has ∂L/∂logits_t as soon as the block of token t is
read. So the forward pass multiplies with the heads once each (student, reference) and at once back (towards hidden
states and unembedding): four products, three without a reference. A backward pass of its own would read both heads
again, six and four. What is kept for the backward pass is of the size of the hidden states and of the unembedding. The
idea of taking the gradient in the forward pass is Liger Kernel's (arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.algo.blocks import block_logits, check_shapes, head_rows, pull_back, scan_blocks
from omniopd_jax.algo.entropy import logprob_gradient, shifted_weights, target_logit
from omniopd_jax.types import Array, PyTree

# (logprob_n, kl_n, fields of the same n tokens) → the loss of these tokens, a scalar
BlockLoss = Callable[[Array, Array, PyTree], Array]


def fused_terms(
    block_loss: BlockLoss,
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    targets_BxT: Array,
    fields: PyTree,
    reference: tuple[Array, Array] | None = None,
    *,
    block_tokens: int = 512,
    logit_softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    """`token_logprob`, the KL anchor and a carrier of the loss's gradient.

        carrier, logprob, kl = fused_terms(block_loss, …)
        loss = loss_of(logprob, kl) + carrier        # the carrier is 0; gradients flow through it alone

    The anchor is exactly 0, with a gradient of exactly 0, where both sides hold the same numbers. A token banned on
    both sides (logits so low that p = 0) contributes 0. No gradient flows to the reference.

    Args:
      block_loss: the loss as a sum over tokens, differentiable in its first two arguments. It must not depend on how
        tokens are cut into blocks, and a static function: a new one compiles anew.
      hidden_BxTxD, unembed_DxV, targets_BxT: see `entropy_and_logprob`.
      fields: a pytree of BxT arrays that `block_loss` gets a block at a time (weights, old log-probabilities). Blocks
        are filled up with zeros: fields of zeros must mean a loss of 0.
      reference: (hidden_BxTxD, unembed_DxV) of the frozen model; None: kl is 0.
      block_tokens, logit_softcap: see `entropy_and_logprob`.

    Returns:
      (carrier, logprob_BxT, kl_BxT): a float32 scalar 0, and float32 nats that pass no gradient on.
    """
    check_shapes(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens)
    if reference is not None:
        check_shapes(*reference, targets_BxT, block_tokens)
        if reference[1].shape[1] != unembed_DxV.shape[1]:
            raise ValueError(
                f"reference and student must share one vocabulary, got {reference[1].shape[1]} and "
                f"{unembed_DxV.shape[1]} tokens."
            )
    still = jax.lax.stop_gradient
    setting = (block_loss, block_tokens, logit_softcap)
    terms: Any = _fused(setting, hidden_BxTxD, unembed_DxV, still(targets_BxT), still(fields), still(reference))
    carrier, logprob_BxT, kl_BxT = terms
    return carrier, still(logprob_BxT), still(kl_BxT)


_Setting = tuple[BlockLoss, int, float | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    setting: _Setting, hidden: Array, unembed: Array, targets: Array, fields: PyTree, reference: PyTree
) -> tuple[Array, Array, Array]:
    """Without a gradient asked for: the terms alone."""
    _, block_tokens, softcap = setting
    operand = head_rows(unembed, hidden.dtype)
    ref_hidden, ref_operand = _reference(reference, hidden)

    def block(_, hidden_nxD, targets_n, ref_hidden_nxD):
        terms = _terms(block_logits(hidden_nxD, operand, softcap), targets_n, ref_hidden_nxD, ref_operand, softcap)
        return None, terms[:2]

    _, (logprob, kl) = scan_blocks(block, None, (hidden, targets, ref_hidden), block_tokens=block_tokens)
    return jnp.zeros((), jnp.float32), logprob, kl


def _forward(
    setting: _Setting, hidden: Array, unembed: Array, targets: Array, fields: PyTree, reference: PyTree
) -> tuple[Any, Any]:
    block_loss, block_tokens, softcap = setting
    operand = head_rows(unembed, hidden.dtype)
    ref_hidden, ref_operand = _reference(reference, hidden)
    leaves, structure = jax.tree.flatten(fields)

    def block(unembed_gradient, hidden_nxD, targets_n, ref_hidden_nxD, *leaves_n):
        logits = block_logits(hidden_nxD, operand, softcap)
        logprob, kl, probability, ref_probability = _terms(logits, targets_n, ref_hidden_nxD, ref_operand, softcap)
        fields_n = jax.tree.unflatten(structure, leaves_n)
        d_logprob, d_kl = jax.grad(block_loss, argnums=(0, 1))(logprob, kl, fields_n)
        gradient = d_logprob[:, None] * logprob_gradient(probability, targets_n)
        if ref_probability is not None:
            gradient += d_kl[:, None] * (probability - ref_probability)
        d_hidden, d_unembed = pull_back(gradient, logits, hidden_nxD, operand, softcap)
        return unembed_gradient + d_unembed, (logprob, kl, d_hidden)

    unembed_gradient, (logprob, kl, hidden_gradient) = scan_blocks(
        block,
        jnp.zeros(unembed.shape, jnp.float32),
        (hidden, targets, ref_hidden, *leaves),
        block_tokens=block_tokens,
    )
    # Of one block alone a compiler would ask for the transpose, where the head is tied: a slower product on a CPU.
    # Elsewhere this costs a pass over the head's gradient, where there is one block.
    unembed_gradient = jax.lax.optimization_barrier(unembed_gradient)
    return (jnp.zeros((), jnp.float32), logprob, kl), (hidden_gradient, unembed_gradient.astype(unembed.dtype))


def _backward(setting: _Setting, saved: Any, gradients: Any) -> tuple[Any, ...]:
    del setting
    hidden_gradient, unembed_gradient = saved
    scale = gradients[0]

    def scaled(gradient: Array) -> Array:
        return (gradient * scale).astype(gradient.dtype)

    return scaled(hidden_gradient), scaled(unembed_gradient), None, None, None


_fused.defvjp(_forward, _backward)


def _reference(reference: PyTree, hidden: Array) -> tuple[Array, Array | None]:
    """(hidden states of the reference, its head); without one, nothing of width 0."""
    if reference is None:
        return jnp.zeros((*hidden.shape[:2], 0), hidden.dtype), None
    ref_hidden, ref_unembed = reference
    return ref_hidden, head_rows(ref_unembed, ref_hidden.dtype)


def _terms(
    logits: Array, targets_n: Array, ref_hidden_nxD: Array, ref_operand: Array | None, softcap: float | None
) -> tuple[Array, Array, Array, Array | None]:
    """(logprob_n, kl_n, probability_nxV, the reference's probability_nxV or None) of one block."""
    _, shifted, weights, total = shifted_weights(logits)
    logprob = (target_logit(shifted, targets_n) - jnp.log(total))[:, 0]
    if ref_operand is None:
        return logprob, jnp.zeros_like(logprob), weights / total, None
    ref_logits = block_logits(ref_hidden_nxD, ref_operand, softcap)
    _, ref_shifted, ref_weights, ref_total = shifted_weights(ref_logits)
    # Σ p_ref (log p_ref − log p), the normalisers taken out of the sum: one exp a side and number
    cross = jnp.sum(ref_weights * (ref_shifted - shifted), axis=-1, keepdims=True) / ref_total
    kl = (cross + jnp.log(total) - jnp.log(ref_total))[:, 0]
    return logprob, kl, weights / total, ref_weights / ref_total
