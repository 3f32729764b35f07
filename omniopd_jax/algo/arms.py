"""Arms: pure functions from verdicts to token weights (see `TokenTree`).

Every weight already holds its denominator, a count over the *whole* batch: response tokens ("token"), or responses
("sequence": summed over a response's tokens, averaged over responses). Where a call sees only part of the batch, pass
the whole batch's `denominator`; the parts then add up exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from omniopd_jax.algo.anchors import chunk_mask, spread_chunks
from omniopd_jax.algo.targets import posterior_target
from omniopd_jax.types import Anchors, Array, ChunkTargets


class VerifyWeights(NamedTuple):
    weight_BxT: Array
    targets: ChunkTargets


class BranchWeights(NamedTuple):
    branch_weight_BxRxC: Array  # R = M·G, branch g of chunk m at m·G + g; 0 on padding
    advantage_BxMxG: Array  # reward − baseline, before 1/G and the denominator; 0 where not audited
    is_audited_BxM: Array


def batch_denominator(mask_BxT: Array, *, normalise: str) -> Array:
    """float32 scalar ≥ 1: response tokens of the batch ("token") or its responses ("sequence")."""
    if normalise == "token":
        count = jnp.sum(mask_BxT, dtype=jnp.int32)
    elif normalise == "sequence":
        count = jnp.sum(jnp.any(mask_BxT, axis=1), dtype=jnp.int32)  # rows of padding alone are no responses
    else:
        raise ValueError(f'normalise={normalise!r} must be "token" or "sequence".')
    return jnp.maximum(count, 1).astype(jnp.float32)


def anchor_weights(
    mask_BxT: Array,
    anchors: Anchors,
    is_audited_BxM: Array,
    *,
    chunk_tokens: int,
    anchor_weight: float,
    anchor_tokens: str,
    denominator: Array,
) -> Array:
    """β over the denominator on response tokens outside audited chunks ("unaudited") or on all of them ("all")."""
    if anchor_tokens == "all":
        carries_BxT = jnp.asarray(mask_BxT)
    elif anchor_tokens == "unaudited":
        audited = Anchors(start_BxM=anchors.start_BxM, is_valid_BxM=is_audited_BxM)
        carries_BxT = mask_BxT & ~chunk_mask(audited, tokens=mask_BxT.shape[1], chunk_tokens=chunk_tokens)
    else:
        raise ValueError(f'anchor_tokens={anchor_tokens!r} must be "unaudited" or "all".')
    return jnp.where(carries_BxT, anchor_weight / denominator, 0.0)


def chunk_weights(
    mask_BxT: Array, anchors: Anchors, value_BxM: Array, is_audited_BxM: Array, *, chunk_tokens: int, denominator: Array
) -> Array:
    """Each audited chunk's value over the denominator on its C tokens, 0 elsewhere: weight_BxT, no gradient."""
    value_BxM = jnp.where(is_audited_BxM & anchors.is_valid_BxM, value_BxM, 0.0)
    value_BxT = spread_chunks(value_BxM, anchors, tokens=mask_BxT.shape[1], chunk_tokens=chunk_tokens)
    return jax.lax.stop_gradient(jnp.where(mask_BxT, value_BxT / denominator, 0.0))


def verify(
    mask_BxT: Array,
    anchors: Anchors,
    prior_BxM: Array,
    score_sum_BxM: Array,
    count_BxM: Array,
    agreement_BxM: Array,
    *,
    chunk_tokens: int,
    prior_strength: float,
    normalise: str = "token",
    baseline: str = "none",
    group_B: Array | None = None,
    denominator: Array | None = None,
) -> VerifyWeights:
    """OmniOPD: every token of an audited chunk is weighted with the chunk's target π̂, minus a baseline if asked.

    The response was sampled from the student, so this is REINFORCE with reward π̂ in [0, 1]. As published there is no
    baseline: any constant part of π̂ adds variance and nothing else, and turns into self-training as soon as data is
    reused. Its optimum is the single most teacher-like chunk, not the teacher's distribution.

    baseline:
      "none": as published.
      "leave_one_out" (ours): the mean target over the audited chunks of *other* responses: those of the same group
        (prompt) if they have any, else those of the rest of the batch, else 0. No response is in its own baseline, so
        the expected gradient stays (exactly so where a chunk's position does not depend on its tokens).
      "teacher_agreement" (ours): n·a / (n + α), with a the mean similarity among the teacher's own n ≥ 2 texts: what
        the evidence would add to π̂ if the student's chunk were one more text of the teacher. It is on π̂'s scale and
        depends on the prefix alone. Chunks with n < 2 keep π̂ whole.

    Args:
      mask_BxT: bool, response tokens.
      anchors: the chunks' starts.
      prior_BxM: π̄ (`targets.chunk_prior`).
      score_sum_BxM, count_BxM, agreement_BxM: k, n and a of `Verdicts`. n = 0: the chunk is not audited.
      group_B: int, equal for responses of one prompt; None: every response is a group of its own.
      denominator: of the whole batch, where this call sees only a part; None: this batch's own.

    Returns:
      VerifyWeights: token weights and the targets behind them.
    """
    if denominator is None:
        denominator = batch_denominator(mask_BxT, normalise=normalise)
    count_BxM = jnp.asarray(count_BxM, jnp.float32)
    is_audited_BxM = anchors.is_valid_BxM & (count_BxM > 0)
    target_BxM = posterior_target(score_sum_BxM, count_BxM, prior_BxM, prior_strength=prior_strength)
    if baseline == "none":
        baseline_BxM = jnp.zeros_like(target_BxM)
    elif baseline == "leave_one_out":
        baseline_BxM = _mean_of_others(target_BxM, is_audited_BxM, group_B)[:, None]
    elif baseline == "teacher_agreement":
        share_BxM = count_BxM / jnp.maximum(count_BxM + prior_strength, 1.0)
        baseline_BxM = jnp.where(count_BxM >= 2, share_BxM * agreement_BxM, 0.0)
    else:
        raise ValueError(f'baseline={baseline!r} must be "none", "leave_one_out" or "teacher_agreement".')
    advantage_BxM = jax.lax.stop_gradient(jnp.where(is_audited_BxM, target_BxM - baseline_BxM, 0.0))
    return VerifyWeights(
        weight_BxT=chunk_weights(
            mask_BxT, anchors, advantage_BxM, is_audited_BxM, chunk_tokens=chunk_tokens, denominator=denominator
        ),
        targets=ChunkTargets(
            prior_BxM=prior_BxM, target_BxM=target_BxM, is_audited_BxM=is_audited_BxM, advantage_BxM=advantage_BxM
        ),
    )


def _mean_of_others(target_BxM: Array, is_audited_BxM: Array, group_B: Array | None) -> Array:
    """Mean target of other responses' audited chunks: same group first, else the rest of the batch, else 0."""
    sum_B = jnp.sum(jnp.where(is_audited_BxM, target_BxM, 0.0), axis=1)
    count_B = jnp.sum(is_audited_BxM, axis=1, dtype=jnp.float32)
    rows = jnp.arange(sum_B.shape[0])
    group_B = rows if group_B is None else jnp.asarray(group_B)
    is_other_BxB = rows[:, None] != rows[None, :]
    is_peer_BxB = is_other_BxB & (group_B[:, None] == group_B[None, :])
    has_peers_B = jnp.any(is_peer_BxB & (count_B > 0)[None, :], axis=1)
    pool_BxB = jnp.where(has_peers_B[:, None], is_peer_BxB, is_other_BxB)
    # sums of selected entries, not total − own: a response's own target must not reach its baseline by rounding
    pool_sum_B = jnp.sum(jnp.where(pool_BxB, sum_B[None, :], 0.0), axis=1)
    pool_count_B = jnp.sum(jnp.where(pool_BxB, count_B[None, :], 0.0), axis=1)
    return pool_sum_B / jnp.maximum(pool_count_B, 1.0)


def branch(
    mask_BxT: Array,
    anchors: Anchors,
    branch_mask_BxMxGxC: Array,
    branch_score_BxMxG: Array,
    branch_overlap_BxMxG: Array,
    count_BxM: Array,
    *,
    repulsion: float,
    normalise: str = "token",
    denominator: Array | None = None,
) -> BranchWeights:
    """G student continuations from one audited start, scored against the same teacher texts (ours).

    The estimated gradient, per chunk, is that of
        J(π) = E φ(x, teacher) − λ/2 E φ(x, x')        x, x' ~ π(· | prefix)
    whose optimum is the teacher's mode for λ = 0 and, for a positive definite φ and λ = 1, the teacher's distribution:
    −J is half the squared kernel MMD up to a constant. With s_g the mean similarity of branch g to the teacher's texts
    and o_g its mean similarity to the other branches,
        reward_g   = s_g − λ o_g
        baseline_g = mean_{h≠g} s_h − λ · (mean of φ(h, h') over the pairs without g)
        weight_g   = (reward_g − baseline_g) / G          on every token of branch g
    The baseline holds nothing of branch g, so the estimate is unbiased. The pairs without g come from row sums:
    ((G−1) Σ_h o_h − 2 (G−1) o_g) / ((G−1)(G−2)); with G = 2 there is no such pair and that part has no baseline.

    Args:
      mask_BxT: bool, the trunk's response tokens.
      anchors: the chunks' starts, where the branches leave the trunk.
      branch_mask_BxMxGxC: bool, sampled tokens of the branches.
      branch_score_BxMxG: s, mean over the n texts received. n = 0: the chunk is not audited and all its weights are 0.
      branch_overlap_BxMxG: o, mean over the other G − 1 branches.
      count_BxM: n.
      repulsion: λ ≥ 0.

    Returns:
      BranchWeights. The denominator is the one of `verify` (the trunk's response tokens, or responses), so that a
      chunk weighs the same in both arms.
    """
    branches = branch_score_BxMxG.shape[2]
    if branches < 2:
        raise ValueError(f"branch needs at least 2 branches a chunk to compare with each other, got {branches}.")
    if denominator is None:
        denominator = batch_denominator(mask_BxT, normalise=normalise)
    is_audited_BxM = anchors.is_valid_BxM & (jnp.asarray(count_BxM) > 0)
    score, overlap = jnp.asarray(branch_score_BxMxG), jnp.asarray(branch_overlap_BxMxG)
    attraction = score - (jnp.sum(score, axis=2, keepdims=True) - score) / (branches - 1)
    if branches > 2:
        overlap = overlap - (jnp.sum(overlap, axis=2, keepdims=True) - 2 * overlap) / (branches - 2)
    advantage_BxMxG = jnp.where(is_audited_BxM[:, :, None], attraction - repulsion * overlap, 0.0)
    weight_BxMxGxC = jnp.where(branch_mask_BxMxGxC, advantage_BxMxG[..., None] / (branches * denominator), 0.0)
    rows, slots, _, width = weight_BxMxGxC.shape
    return BranchWeights(
        branch_weight_BxRxC=jax.lax.stop_gradient(weight_BxMxGxC.reshape(rows, slots * branches, width)),
        advantage_BxMxG=advantage_BxMxG,
        is_audited_BxM=is_audited_BxM,
    )
