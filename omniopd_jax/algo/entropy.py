"""Entropy of the student's predictions and log-probability of its tokens, exact over the full vocabulary.

    H_t = − Σ_v p_t(v) log p_t(v)        log p_t(y_t) = l_t(y_t) − log Σ_v exp l_t(v)        p_t = softmax(l_t)

with logits l_t = h_t · W, computed a block of tokens at a time (`blocks`). H_t is the paper's peak-entropy signal: the
entropy of the distribution that *produced* y_t, so h_t is the hidden state of the token before y_t.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.algo.blocks import block_logits, check_shapes, head_rows, pull_back, scan_blocks
from omniopd_jax.types import Array

_LOWEST = -104.0  # exp of it rounds to 0 in float32


def entropy_and_logprob(
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    targets_BxT: Array,
    *,
    block_tokens: int = 512,
    logit_softcap: float | None = None,
) -> tuple[Array, Array]:
    """Exact entropy and target log-probability of every position, without [B, T, V].

    Differentiable in the hidden states and the unembedding, through both results; the backward pass computes each
    block's logits again. A token whose logit is so low that p = 0 contributes 0, forward and backward.

    Args:
      hidden_BxTxD: hidden states after the final norm; position t predicts targets[:, t].
      unembed_DxV: read in the hidden states' dtype; products are summed in float32.
      targets_BxT: int, in [0, V). Padding may hold any valid id: its results are meant to be masked.
      block_tokens: tokens a block of the scan; any number, it need not divide B·T.
      logit_softcap: l ← cap · tanh(l / cap) where the model has one (Gemma 2), else None.

    Returns:
      (entropy_BxT, logprob_BxT), float32, nats.

    Raises:
      ValueError: shapes that do not belong together.
    """
    check_shapes(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens)
    return _score(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens, logit_softcap, True)


def token_logprob(
    hidden_BxTxD: Array,
    unembed_DxV: Array,
    targets_BxT: Array,
    *,
    block_tokens: int = 512,
    logit_softcap: float | None = None,
) -> Array:
    """`entropy_and_logprob` without the entropy: what an update needs. Returns logprob_BxT, float32, nats."""
    check_shapes(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens)
    scores: Any = _score(hidden_BxTxD, unembed_DxV, targets_BxT, block_tokens, logit_softcap, False)
    return scores[1]


def shifted_weights(logits_nxV: Array) -> tuple[Array, Array, Array, Array]:
    """(peak_nx1, shifted_nxV, weights_nxV, total_nx1): logits less their peak, exp of them, and its sum.

    log p = shifted − log total and p = weights / total; so large logits lose no digits.
    """
    peak = jnp.max(logits_nxV, axis=-1, keepdims=True)
    shifted = logits_nxV - peak
    weights = _where_positive(shifted, jnp.exp(shifted))
    return peak, shifted, weights, jnp.sum(weights, axis=-1, keepdims=True)


def _where_positive(logprobs_nxV: Array, terms_nxV: Array) -> Array:
    """Terms of a sum over the vocabulary, 0 where exp(log-probability) is 0 in float32 (0 · −inf is not a number).

    Besides: where exp and sum meet without a choice between them, XLA's CPU backend makes one kernel of both that
    takes twice as long and a single core (docs/benchmarks.md).
    """
    return jnp.where(logprobs_nxV > _LOWEST, terms_nxV, 0.0)


def target_logit(logits_nxV: Array, targets_n: Array) -> Array:
    """The logit of each row's target, [n, 1]."""
    return jnp.take_along_axis(logits_nxV, targets_n[:, None], axis=-1)


def logprob_gradient(probability_nxV: Array, targets_n: Array) -> Array:
    """d log p(y) / d logits = onehot(y) − p, as a comparison with an iota: it fuses, a scatter would not."""
    vocabulary = jax.lax.broadcasted_iota(targets_n.dtype, probability_nxV.shape, 1)
    return (vocabulary == targets_n[:, None]) - probability_nxV


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _score(
    hidden: Array, unembed: Array, targets: Array, block_tokens: int, softcap: float | None, with_entropy: bool
) -> Any:
    return _score_forward(hidden, unembed, targets, block_tokens, softcap, with_entropy)[0]


def _score_forward(
    hidden: Array, unembed: Array, targets: Array, block_tokens: int, softcap: float | None, with_entropy: bool
) -> Any:
    operand = head_rows(unembed, hidden.dtype)

    def block(_, hidden_nxD, targets_n):
        logits = block_logits(hidden_nxD, operand, softcap)
        peak, _, _, total = shifted_weights(logits)
        log_total = jnp.log(total)
        logprob = target_logit(logits, targets_n) - peak - log_total
        entropy = jnp.zeros_like(logprob[:, 0])
        if with_entropy:
            # grouped so that no array of [n, V] is shared with the sum above and stored for it
            logprobs = logits - (peak + log_total)
            entropy = -jnp.sum(_where_positive(logprobs, jnp.exp(logprobs) * logprobs), axis=-1)
        return None, (entropy, logprob[:, 0], (peak + log_total)[:, 0])

    _, (entropy, logprob, normaliser) = scan_blocks(block, None, (hidden, targets), block_tokens=block_tokens)
    return (entropy, logprob), (hidden, unembed, targets, entropy, normaliser)


def _score_backward(block_tokens: int, softcap: float | None, with_entropy: bool, saved: Any, gradients: Any) -> Any:
    hidden, unembed, targets, entropy, normaliser = saved
    operand = head_rows(unembed, hidden.dtype)

    def block(unembed_gradient, hidden_nxD, targets_n, entropy_n, normaliser_n, d_entropy_n, d_logprob_n):
        logits = block_logits(hidden_nxD, operand, softcap)
        logprobs = logits - normaliser_n[:, None]
        probability = jnp.exp(logprobs)
        gradient = d_logprob_n[:, None] * logprob_gradient(probability, targets_n)
        if with_entropy:
            # dH / d logits = − p (log p + H)
            gradient -= d_entropy_n[:, None] * probability * (logprobs + entropy_n[:, None])
        d_hidden, d_unembed = pull_back(gradient, logits, hidden_nxD, operand, softcap)
        return unembed_gradient + d_unembed, d_hidden

    unembed_gradient, hidden_gradient = scan_blocks(
        block,
        jnp.zeros(unembed.shape, jnp.float32),
        (hidden, targets, entropy, normaliser, *gradients),
        block_tokens=block_tokens,
    )
    return hidden_gradient, unembed_gradient.astype(unembed.dtype), None


_score.defvjp(_score_forward, _score_backward)
