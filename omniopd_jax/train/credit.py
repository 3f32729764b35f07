"""From the teacher's verdicts to a tree of weights: the arm that the config names, applied to one batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from omniopd_jax.algo import arms
from omniopd_jax.algo.targets import chunk_prior
from omniopd_jax.config import Config
from omniopd_jax.train.batching import to_host
from omniopd_jax.types import Anchors, Branches, Rollout, TokenTree, Verdicts


class Credit(NamedTuple):
    """What the arm made of a batch. Host arrays."""

    tree: TokenTree  # as the arm gives it, not packed
    prior_BxM: np.ndarray  # π̄
    target_BxM: np.ndarray | None  # π̂, arm verify
    is_audited_BxM: np.ndarray
    advantage: np.ndarray  # BxM (verify) or BxMxG (branch): weights before the denominators


def puts_weight_on_trunk(config: Config) -> bool:
    """Whether the config's arm weights the tokens of the response itself."""
    return config.objective.arm == "verify"


def give_credit(
    config: Config,
    rollout: Rollout,
    anchors: Anchors,
    verdicts: Verdicts,
    branches: Branches | None,
    group_B: np.ndarray,
) -> Credit:
    """Applies `objective.arm`. Host arrays in and out.

    Args:
      config: audit.*, objective.*.
      rollout: the whole batch, so that its denominators are those of the batch.
      anchors: the chunks that the teacher was asked about.
      verdicts: what came back.
      branches: the student's own continuations, arm "branch" only.
      group_B: equal for responses of one prompt.
    """
    objective, chunk_tokens = config.objective, config.audit.chunk_tokens
    common = dict(
        chunk_tokens=chunk_tokens,
        anchor_weight=objective.anchor_weight,
        anchor_tokens=objective.anchor_tokens,
        normalise=objective.normalise,
    )
    if objective.arm == "verify":
        knobs = (*common.items(), ("prior_strength", objective.prior_strength), ("baseline", objective.baseline))
        given, prior = to_host(
            _verify(
                rollout.logprob_BxT,
                rollout.mask_BxT,
                anchors,
                verdicts.score_sum_BxM,
                verdicts.count_BxM,
                verdicts.agreement_BxM,
                group_B,
                knobs,
            )
        )
        rows, width = len(rollout.tokens_BxT), chunk_tokens
        tree = _tree(
            rollout,
            given.weight_BxT,
            given.anchor_weight_BxT,
            branch_tokens_BxRxC=np.zeros((rows, 0, width), np.int32),
            branch_mask_BxRxC=np.zeros((rows, 0, width), bool),
            branch_weight_BxRxC=np.zeros((rows, 0, width), np.float32),
            branch_start_BxR=np.zeros((rows, 0), np.int32),
        )
        targets = given.targets
        return Credit(tree, prior, targets.target_BxM, targets.is_audited_BxM, targets.advantage_BxM)

    assert branches is not None
    rows, slots, count, width = branches.tokens_BxMxGxC.shape
    given, prior = to_host(
        _branch(
            rollout.logprob_BxT,
            rollout.mask_BxT,
            anchors,
            branches.mask_BxMxGxC,
            verdicts.branch_score_BxMxG,
            verdicts.branch_overlap_BxMxG,
            verdicts.count_BxM,
            (*common.items(), ("repulsion", objective.repulsion)),
        )
    )
    tree = _tree(
        rollout,
        np.zeros(rollout.tokens_BxT.shape, np.float32),
        given.anchor_weight_BxT,
        branch_tokens_BxRxC=branches.tokens_BxMxGxC.reshape(rows, slots * count, width),
        branch_mask_BxRxC=branches.mask_BxMxGxC.reshape(rows, slots * count, width),
        branch_weight_BxRxC=given.branch_weight_BxRxC,
        branch_start_BxR=np.repeat(anchors.start_BxM, count, axis=1),
    )
    return Credit(tree, prior, None, given.is_audited_BxM, given.advantage_BxMxG)


# The knobs travel as a tuple of pairs: static, hence hashable.
@functools.partial(jax.jit, static_argnames="knobs")
def _verify(logprob_BxT, mask_BxT, anchors, score_sum_BxM, count_BxM, agreement_BxM, group_B, knobs) -> Any:
    options = dict(knobs)
    prior_BxM = chunk_prior(logprob_BxT, anchors, chunk_tokens=options["chunk_tokens"])
    given = arms.verify(
        mask_BxT, anchors, prior_BxM, score_sum_BxM, count_BxM, agreement_BxM, group_B=group_B, **options
    )
    return given, prior_BxM


@functools.partial(jax.jit, static_argnames="knobs")
def _branch(logprob_BxT, mask_BxT, anchors, branch_mask_BxMxGxC, score_BxMxG, overlap_BxMxG, count_BxM, knobs) -> Any:
    options = dict(knobs)
    prior_BxM = chunk_prior(logprob_BxT, anchors, chunk_tokens=options["chunk_tokens"])
    given = arms.branch(mask_BxT, anchors, branch_mask_BxMxGxC, score_BxMxG, overlap_BxMxG, count_BxM, **options)
    return given, prior_BxM


def _tree(rollout: Rollout, weight_BxT: np.ndarray, anchor_weight_BxT: np.ndarray, **branches: np.ndarray) -> TokenTree:
    return TokenTree(
        prompt_tokens_BxP=rollout.prompt_tokens_BxP,
        prompt_mask_BxP=rollout.prompt_mask_BxP,
        tokens_BxT=rollout.tokens_BxT,
        mask_BxT=rollout.mask_BxT,
        weight_BxT=weight_BxT,
        anchor_weight_BxT=anchor_weight_BxT,
        **branches,
    )


def mean_where(value: np.ndarray, mask: np.ndarray) -> float:
    """Mean over True entries; 0 where there are none."""
    return float(value[mask].mean()) if mask.any() else 0.0
