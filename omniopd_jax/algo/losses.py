"""The one loss of every arm: weighted log-probabilities of a tree, plus the KL anchor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from omniopd_jax.algo.arms import anchor_weights, batch_denominator, chunk_weights
from omniopd_jax.types import Anchors, Array, TokenTree


def tree_loss(
    logprob_BxT: Array,
    branch_logprob_BxRxC: Array,
    anchor_kl_BxT: Array,
    tree: TokenTree,
    *,
    divergence_BxT: Array | None = None,
    clip: float = 0.2,
) -> tuple[Array, dict[str, Array]]:
    """loss = − Σ weight · log π(trunk) − Σ branch_weight · log π(branch) + Σ anchor_weight · KL(π_ref ‖ π), and where
    the tree asks for it + Σ divergence_weight · D(π_teacher, π) − Σ `clipped_ratio`.

    Plain sums: the weights hold the denominators, so the losses, gradients and metrics of micro-batches add up to the
    batch's. A position whose weight is exactly 0 contributes exactly 0 to loss and gradient, whatever is there.

    Args:
      logprob_BxT, branch_logprob_BxRxC: float32, nats, under the parameters being trained; R may be 0.
      anchor_kl_BxT: float32, nats, KL(π_ref ‖ π_θ).
      tree: the weights.
      divergence_BxT: float32, nats, where the tree has weights for it.
      clip: ε of the ratio.

    Returns:
      (loss, metrics): float32 scalars; `loss/*` are the terms as they enter the loss; `anchor/kl_sum` (nats) and
      `anchor/tokens` are sums over the tokens that carry the anchor; `opd/*_sum`, `update/*` the like of other terms.
    """
    loss, metrics = weighted_loss(
        logprob_BxT,
        branch_logprob_BxRxC,
        anchor_kl_BxT,
        weight_BxT=with_confidence(tree.weight_BxT, logprob_BxT, tree.power_BxT),
        branch_weight_BxRxC=with_confidence(
            tree.branch_weight_BxRxC,
            branch_logprob_BxRxC,
            None if tree.branch_power_BxR is None else tree.branch_power_BxR[:, :, None],
        ),
        anchor_weight_BxT=tree.anchor_weight_BxT,
    )
    if tree.divergence_weight_BxT is not None:
        assert divergence_BxT is not None
        divergence = _weighted_sum(tree.divergence_weight_BxT, divergence_BxT)
        is_taught = jnp.asarray(tree.divergence_weight_BxT) != 0
        loss = loss + divergence
        metrics |= {
            "loss/divergence": divergence,
            "opd/divergence_sum": _weighted_sum(is_taught.astype(jnp.float32), divergence_BxT),
            "opd/tokens": jnp.sum(is_taught, dtype=jnp.float32),
        }
    if tree.ratio_weight_BxT is not None:
        surrogate_BxT, is_clipped_BxT = clipped_ratio(
            logprob_BxT, tree.old_logprob_BxT, tree.ratio_weight_BxT, clip=clip
        )
        ratio = -jnp.sum(surrogate_BxT, dtype=jnp.float32)
        loss = loss + ratio
        metrics |= {
            "loss/ratio": ratio,
            "update/clipped": jnp.sum(is_clipped_BxT, dtype=jnp.float32),
            "update/tokens": jnp.sum(jnp.asarray(tree.ratio_weight_BxT) != 0, dtype=jnp.float32),
        }
    return loss, metrics | {"loss/total": loss}


TOKEN_FIELDS = ("weight_BxT", "anchor_weight_BxT", "ratio_weight_BxT", "old_logprob_BxT", "power_BxT")


@functools.cache
def token_loss(clip: float) -> Callable[[Array, Array, Mapping[str, Array]], Array]:
    """`tree_loss` of n trunk tokens, (logprob_n, kl_n, TOKEN_FIELDS of these tokens) → scalar: a sum over tokens, which
    `fused.fused_terms` takes the gradient of a block at a time. One function a clip, so that it compiles once."""

    def loss(logprob_n: Array, kl_n: Array, fields: Mapping[str, Array]) -> Array:
        nothing = jnp.zeros((1, 0, 1), jnp.float32)
        tokens = jnp.zeros((1, logprob_n.shape[0]), jnp.int32)
        tree = TokenTree(
            prompt_tokens_BxP=tokens[:, :0],
            prompt_mask_BxP=tokens[:, :0] > 0,
            tokens_BxT=tokens,
            mask_BxT=tokens >= 0,
            branch_tokens_BxRxC=nothing.astype(jnp.int32),
            branch_mask_BxRxC=nothing > 0,
            branch_weight_BxRxC=nothing,
            branch_start_BxR=tokens[:, :0],
            **{name: value[None] for name, value in fields.items()},
        )
        return tree_loss(logprob_n[None], nothing, kl_n[None], tree, clip=clip)[0]

    return loss


def with_confidence(weight: Array, logprob: Array, power: Array | None) -> Array:
    """weight · π(token)^power, without gradient: tokens that the student finds unlikely count less.

    At power 1 this is DFT (arXiv 2508.05629), which turns the gradient of − log π into that of − π.
    """
    if power is None:
        return weight
    return weight * jax.lax.stop_gradient(jnp.exp(jnp.where(weight != 0, logprob, 0.0) * power))


def clipped_ratio(
    logprob_BxT: Array, old_logprob_BxT: Array | None, weight_BxT: Array, *, clip: float
) -> tuple[Array, Array]:
    """(surrogate, is_clipped): min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π_θ / π_old (PPO, arXiv 1707.06347).

    A is `weight_BxT`, advantage over denominator. Where the clip decides, the gradient is 0. At π_θ = π_old the
    gradient is A · ∇ log π_θ.
    """
    assert old_logprob_BxT is not None
    is_weighted = jnp.asarray(weight_BxT) != 0
    ratio = jnp.exp(jnp.where(is_weighted, logprob_BxT - old_logprob_BxT, 0.0))
    plain, bounded = ratio * weight_BxT, jnp.clip(ratio, 1 - clip, 1 + clip) * weight_BxT
    return jnp.minimum(plain, bounded), is_weighted & (bounded < plain)


def k3_kl(ref_logprob_BxT: Array, logprob_BxT: Array) -> Array:
    """ρ − log ρ − 1 ≥ 0 with ρ = π_ref / π_θ of the sampled token, nats: an unbiased estimate of KL(π_θ ‖ π_ref) when
    π_θ sampled it (Schulman 2020, "Approximating KL Divergence", estimator k3; the KL of GRPO, arXiv 2402.03300)."""
    log_ratio = jax.lax.stop_gradient(ref_logprob_BxT) - logprob_BxT
    return jnp.exp(log_ratio) - log_ratio - 1.0


def weighted_loss(
    logprob_BxT: Array,
    branch_logprob_BxRxC: Array,
    anchor_kl_BxT: Array,
    *,
    weight_BxT: Array,
    branch_weight_BxRxC: Array,
    anchor_weight_BxT: Array,
) -> tuple[Array, dict[str, Array]]:
    """The three terms that every tree has, on bare weights."""
    trunk = -_weighted_sum(weight_BxT, logprob_BxT)
    branch = -_weighted_sum(branch_weight_BxRxC, branch_logprob_BxRxC)
    anchor = _weighted_sum(anchor_weight_BxT, anchor_kl_BxT)
    loss = trunk + branch + anchor
    is_anchored = jnp.asarray(anchor_weight_BxT) != 0
    return loss, {
        "loss/total": loss,
        "loss/trunk": trunk,
        "loss/branch": branch,
        "loss/anchor": anchor,
        "anchor/kl_sum": _weighted_sum(is_anchored.astype(jnp.float32), anchor_kl_BxT),
        "anchor/tokens": jnp.sum(is_anchored, dtype=jnp.float32),
    }


def _weighted_sum(weight: Array, value: Array) -> Array:
    """Σ weight · value over weights other than 0; a NaN or inf under weight 0 reaches neither sum nor gradient."""
    if weight.shape != value.shape:
        raise ValueError(f"weights and values must have one shape, got {weight.shape} and {value.shape}.")
    # masked before the product: 0 · inf is NaN, also in the backward pass of the product
    return jnp.sum(weight * jnp.where(weight != 0, value, 0.0), dtype=jnp.float32)


def omniopd_loss(
    logprob_BxT: Array,
    anchor_kl_BxT: Array,
    response_mask_BxT: Array,
    anchors: Anchors,
    target_BxM: Array,
    *,
    chunk_tokens: int,
    anchor_weight: float,
    normalise: str = "token",
    anchor_tokens: str = "unaudited",
) -> tuple[Array, dict[str, Array]]:
    """The paper's loss: L = − Σ_chunks π̂ Σ_{t in chunk} log π_θ(y_t) + β Σ_{t unaudited} KL(π_ref ‖ π_θ)_t.

    Over the denominator: the batch's response tokens (normalise="token"), or its responses ("sequence": summed over a
    response's tokens, averaged over responses). π̂ is a constant for the gradient. Read the trap in `arms.verify`: no
    baseline, so every constant part of π̂ is variance.

    Args:
      logprob_BxT, anchor_kl_BxT: float32, nats.
      response_mask_BxT: bool; padding has exactly no influence.
      anchors: every valid chunk counts as audited.
      target_BxM: π̂.
      chunk_tokens: C.
      anchor_weight: β.
      normalise: "token" | "sequence".
      anchor_tokens: "unaudited" (paper) | "all": which response tokens carry the anchor.

    Returns:
      (loss, metrics) as `tree_loss`.
    """
    denominator = batch_denominator(response_mask_BxT, normalise=normalise)
    no_branches = jnp.zeros((logprob_BxT.shape[0], 0, chunk_tokens), jnp.float32)
    return weighted_loss(
        logprob_BxT,
        no_branches,
        anchor_kl_BxT,
        weight_BxT=chunk_weights(
            response_mask_BxT,
            anchors,
            target_BxM,
            anchors.is_valid_BxM,
            chunk_tokens=chunk_tokens,
            denominator=denominator,
        ),
        branch_weight_BxRxC=no_branches,
        anchor_weight_BxT=anchor_weights(
            response_mask_BxT,
            anchors,
            anchors.is_valid_BxM,
            chunk_tokens=chunk_tokens,
            anchor_weight=anchor_weight,
            anchor_tokens=anchor_tokens,
            denominator=denominator,
        ),
    )
