"""From what a batch came to, to a tree of weights: the arms that the config names, applied."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from omniopd_jax import gathering, prng
from omniopd_jax.algo import registry
from omniopd_jax.algo.arms import anchor_weights
from omniopd_jax.algo.controls import controlled
from omniopd_jax.algo.registry import Needs, Seen, Settings, Weights
from omniopd_jax.algo.targets import chunk_prior
from omniopd_jax.config import Config, mixed_arms
from omniopd_jax.types import Anchors, Answers, Array, Branches, PromptBatch, Rollout, TokenTree, Verdicts


class Evidence(NamedTuple):
    """What was gathered about a batch. Host arrays; None: no arm of the run needs it."""

    batch: PromptBatch
    rollout: Rollout | None = None  # the student's responses
    anchors: Anchors | None = None
    branches: Branches | None = None
    verdicts: Verdicts | None = None
    answers: Answers | None = None  # the teacher's
    reward_B: np.ndarray | None = None
    teacher_logprob_BxT: np.ndarray | None = None


class Credit(NamedTuple):
    """What the arms made of a batch. Host arrays; None where no arm has such a thing."""

    tree: TokenTree  # as the arms give it, not packed
    is_audited_BxM: np.ndarray | None = None
    prior_BxM: np.ndarray | None = None  # π̄
    target_BxM: np.ndarray | None = None  # π̂
    chunk_advantage_BxM: np.ndarray | None = None  # weights before the denominators
    branch_advantage_BxMxG: np.ndarray | None = None


def arms_of(config: Config) -> dict[str, float]:
    """The arms that are trained and the weight of each."""
    return mixed_arms(config.objective.arm, config.objective.weights)


def needs_of(config: Config) -> Needs:
    """What the arms of the config need together."""
    return registry.needs_of(arms_of(config), config.objective.divergence)


def puts_weight_on_trunk(config: Config) -> bool:
    """Whether an arm weighs log π of trunk tokens (the ratio and divergences are terms of their own)."""
    arms = arms_of(config)
    return bool({"verify", "sft"} & set(arms)) or ("opd" in arms and config.objective.divergence == "sampled")


def is_by_row(config: Config) -> bool:
    """Whether the weights of a response hang on the teacher's word about this response alone, once all are sampled."""
    needs, arms = needs_of(config), arms_of(config)
    has_peers = "verify" in arms and config.objective.baseline == "leave_one_out"
    return config.audit.control == "none" and not (has_peers or needs.answers or needs.reward)


def settings_of(config: Config) -> Settings:
    """The knobs of the arms."""
    objective = config.objective
    return Settings(
        chunk_tokens=config.audit.chunk_tokens,
        prior_strength=objective.prior_strength,
        baseline=objective.baseline,
        repulsion=objective.repulsion,
        normalise=objective.normalise,
        anchor_weight=objective.anchor_weight,
        anchor_tokens=objective.anchor_tokens,
        divergence=objective.divergence,
        scale_advantage=objective.scale_advantage,
    )


def give_credit(config: Config, evidence: Evidence, step: int) -> Credit:
    """Applies the arms of the config. Host arrays in and out, of the whole batch: so are the denominators.

    Args:
      config: audit.*, objective.*.
      evidence: what they need.
      step: with the run's seed it names what `audit.control` draws.
    """
    mixture = tuple(arms_of(config).items())
    key = prng.named_key(config.train.seed, step, "control")
    weights, carried_BxT, prior_BxM = gathering.whole(
        _weights(_seen(evidence), key, mixture, settings_of(config), config.audit.control)
    )
    tree = _tree(evidence, weights, carried_BxT, config.objective.confidence_power)
    return Credit(
        tree=tree,
        is_audited_BxM=weights.is_audited_BxM,
        prior_BxM=prior_BxM,
        target_BxM=weights.target_BxM,
        chunk_advantage_BxM=weights.chunk_advantage_BxM,
        branch_advantage_BxMxG=weights.branch_advantage_BxMxG,
    )


def groups(batch: PromptBatch) -> np.ndarray:
    """int32 [B], equal for responses of one prompt."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(prompt.id, row) for row, prompt in enumerate(batch.prompts)], np.int32)


def _seen(evidence: Evidence) -> Seen:
    rollout, verdicts, branches = evidence.rollout, evidence.verdicts, evidence.branches
    seen = Seen(group_B=groups(evidence.batch), reward_B=evidence.reward_B)
    if rollout is not None:
        seen = seen._replace(
            mask_BxT=rollout.mask_BxT,
            logprob_BxT=rollout.logprob_BxT,
            teacher_logprob_BxT=evidence.teacher_logprob_BxT,
        )
    if verdicts is not None:
        seen = seen._replace(
            anchors=evidence.anchors,
            score_sum_BxM=verdicts.score_sum_BxM,
            count_BxM=verdicts.count_BxM,
            agreement_BxM=verdicts.agreement_BxM,
            branch_mask_BxMxGxC=None if branches is None else branches.mask_BxMxGxC,
            branch_score_BxMxG=verdicts.branch_score_BxMxG,
            branch_overlap_BxMxG=verdicts.branch_overlap_BxMxG,
            text_mask_BxMxNxC=verdicts.text_mask_BxMxNxC,
        )
    if evidence.answers is not None:
        seen = seen._replace(answer_mask_BxT=evidence.answers.mask_BxT)
    return seen


# mixture and settings are static, hence hashable
@functools.partial(jax.jit, static_argnames=("mixture", "settings", "control"))
def _weights(
    seen: Seen, key: Array, mixture: tuple[tuple[str, float], ...], settings: Settings, control: str
) -> tuple[Weights, Array, Array | None]:
    """(weights, β over the denominator on the trunk that carries the anchor, π̄)."""
    prior_BxM = None
    if seen.anchors is not None:
        prior_BxM = chunk_prior(seen.logprob_BxT, seen.anchors, chunk_tokens=settings.chunk_tokens)
        seen = controlled(seen._replace(prior_BxM=prior_BxM), control, key)
    weights = registry.combined(dict(mixture), seen, settings)
    mask_BxT: Any = seen.answer_mask_BxT if seen.mask_BxT is None else seen.mask_BxT
    denominator = registry.denominators(mask_BxT, settings.normalise)
    if weights.is_audited_BxM is None:  # no chunks: every token of the trunk carries it
        no_chunk = Anchors(np.zeros((len(mask_BxT), 0), np.int32), np.zeros((len(mask_BxT), 0), bool))
        anchors, is_audited_BxM = no_chunk, no_chunk.is_valid_BxM
    else:
        assert seen.anchors is not None
        anchors, is_audited_BxM = seen.anchors, weights.is_audited_BxM
    carried_BxT = anchor_weights(
        mask_BxT,
        anchors,
        is_audited_BxM,
        chunk_tokens=settings.chunk_tokens,
        anchor_weight=settings.anchor_weight,
        anchor_tokens=settings.anchor_tokens,
        denominator=denominator,
    )
    return weights, carried_BxT, seen.prior_BxM


def _tree(evidence: Evidence, weights: Weights, carried_BxT: np.ndarray, power: float) -> TokenTree:
    """Responses with their branches, answers as rows of their own below them."""
    parts = []
    rollout, answers, batch = evidence.rollout, evidence.answers, evidence.batch
    if rollout is not None:
        parts.append(_responses(evidence, rollout, weights, carried_BxT, power))
    if answers is not None:
        assert weights.answer_BxT is not None
        parts.append(
            TokenTree(
                prompt_tokens_BxP=batch.tokens_BxP,
                prompt_mask_BxP=batch.mask_BxP,
                tokens_BxT=answers.tokens_BxT,
                mask_BxT=answers.mask_BxT,
                weight_BxT=weights.answer_BxT,
                anchor_weight_BxT=carried_BxT if rollout is None else np.zeros_like(weights.answer_BxT),
                power_BxT=np.full(answers.mask_BxT.shape, power, np.float32) if power else None,
                **_branches(len(answers.tokens_BxT), []),
            )
        )
    return parts[0] if len(parts) == 1 else _stacked(*parts)


def _responses(
    evidence: Evidence, rollout: Rollout, weights: Weights, carried_BxT: np.ndarray, power: float
) -> TokenTree:
    anchors, branches, verdicts = evidence.anchors, evidence.branches, evidence.verdicts
    rows = len(rollout.tokens_BxT)
    off = []
    if weights.branch_BxMxGxC is not None:
        assert branches is not None
        assert anchors is not None
        off.append((branches.tokens_BxMxGxC, branches.mask_BxMxGxC, weights.branch_BxMxGxC, anchors.start_BxM, 0.0))
    if weights.text_BxMxNxC is not None:
        assert verdicts is not None
        texts = (verdicts.text_BxMxNxC, verdicts.text_mask_BxMxNxC, weights.text_BxMxNxC, verdicts.cut_BxM)
        off.append((*texts, power))
    none_BxT = np.zeros(rollout.tokens_BxT.shape, np.float32)
    return TokenTree(
        prompt_tokens_BxP=rollout.prompt_tokens_BxP,
        prompt_mask_BxP=rollout.prompt_mask_BxP,
        tokens_BxT=rollout.tokens_BxT,
        mask_BxT=rollout.mask_BxT,
        weight_BxT=none_BxT if weights.trunk_BxT is None else weights.trunk_BxT,
        anchor_weight_BxT=carried_BxT,
        divergence_weight_BxT=weights.divergence_BxT,
        ratio_weight_BxT=weights.ratio_BxT,
        old_logprob_BxT=None if weights.ratio_BxT is None else rollout.logprob_BxT,
        **_branches(rows, off),
    )


def _branches(rows: int, off: list[tuple[Any, Any, Any, Any, float]]) -> dict[str, Any]:
    """Branch fields of a tree from (tokens, mask, weight, start, power) of each kind of branch, [B, M, n, C]."""
    if not off:
        none = np.zeros((rows, 0, 0, 1))
        off = [(none, none, none, np.zeros((rows, 0)), 0.0)]

    def flat(array: np.ndarray, kind: Any) -> np.ndarray:
        return np.asarray(array, kind).reshape(rows, -1, array.shape[-1])

    fields = {
        "branch_tokens_BxRxC": np.concatenate([flat(tokens, np.int32) for tokens, *_ in off], axis=1),
        "branch_mask_BxRxC": np.concatenate([flat(mask, bool) for _, mask, *_ in off], axis=1),
        "branch_weight_BxRxC": np.concatenate([flat(weight, np.float32) for _, _, weight, *_ in off], axis=1),
        "branch_start_BxR": np.concatenate(
            [np.repeat(start, tokens.shape[2], axis=1).astype(np.int32) for tokens, _, _, start, _ in off], axis=1
        ),
    }
    if any(power for *_, power in off):
        fields["branch_power_BxR"] = np.concatenate(
            [np.full((rows, tokens.shape[1] * tokens.shape[2]), power, np.float32) for tokens, *_, power in off], axis=1
        )
    return fields


def _stacked(first: TokenTree, second: TokenTree) -> TokenTree:
    """The rows of both, filled up to the longer trunk and the more branches; what one has no field for is 0 there."""
    joined = {}
    for name in vars(first):
        parts = [getattr(first, name), getattr(second, name)]
        if all(part is None for part in parts):
            continue
        model = next(part for part in parts if part is not None)
        parts = [
            np.zeros((len(tree.tokens_BxT), *model.shape[1:]), model.dtype) if part is None else part
            for tree, part in zip((first, second), parts, strict=True)
        ]
        widest = np.max([part.shape[1:] for part in parts], axis=0)
        filled = [
            np.pad(part, [(0, 0), *((0, most - size) for most, size in zip(widest, part.shape[1:], strict=True))])
            for part in parts
        ]
        joined[name] = np.concatenate(filled)
    return TokenTree(**joined)


def mean_where(value: np.ndarray, mask: np.ndarray) -> float:
    """Mean over True entries; 0 where there are none."""
    return float(value[mask].mean()) if mask.any() else 0.0
