"""Every arm: one pure function from what a batch came to (`Seen`) to weights (`Weights`), and what it needs.

A new arm is a function here, registered under the name that `objective.arm` gives it; the observation gathers what
`Needs` asks for and nothing else. Weights hold their denominators, counts over the whole batch, as in `arms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omniopd_jax.algo import arms
from omniopd_jax.types import Anchors, Array


class Needs(NamedTuple):
    """What has to be done before an arm's weights are known."""

    responses: bool = True  # the student writes; without, the trunk is the teacher's answer
    chunks: bool = False  # and starts are chosen, from which the teacher continues
    branches: bool = False  # the student continues from them too
    answers: bool = False  # the teacher answers the prompts
    reward: bool = False  # responses are judged by the reference answers
    logits: bool = False  # the teacher's distribution is read in the step
    logprob: bool = False  # the teacher's log-probability of the sampled tokens is read before it

    @property
    def text(self) -> bool:
        """The teacher writes: it may be anyone who writes text."""
        return self.chunks or self.answers

    @property
    def teacher(self) -> bool:
        return self.text or self.logits or self.logprob


class Seen(NamedTuple):
    """What a batch came to. Fields that no arm of the run needs are None."""

    mask_BxT: Array | None = None  # bool, the student's response tokens
    logprob_BxT: Array | None = None  # float32, nats, of the sampled tokens
    group_B: Array | None = None  # int32, equal for responses of one prompt
    anchors: Anchors | None = None
    prior_BxM: Array | None = None  # π̄
    score_sum_BxM: Array | None = None  # k, n and a of `Verdicts`
    count_BxM: Array | None = None
    agreement_BxM: Array | None = None
    branch_mask_BxMxGxC: Array | None = None
    branch_score_BxMxG: Array | None = None
    branch_overlap_BxMxG: Array | None = None
    text_mask_BxMxNxC: Array | None = None  # bool, the teacher's continuations in the student's tokens
    answer_mask_BxT: Array | None = None  # bool, the teacher's answers in the student's tokens
    reward_B: Array | None = None  # float32
    teacher_logprob_BxT: Array | None = None  # float32, nats, log π_T of the sampled tokens


class Settings(NamedTuple):
    """The knobs of the arms, by the names of `objective.*` and `audit.*`."""

    chunk_tokens: int
    prior_strength: float
    baseline: str
    repulsion: float
    normalise: str
    anchor_weight: float
    anchor_tokens: str
    divergence: str
    scale_advantage: bool


class Weights(NamedTuple):
    """What an arm puts on the tree. None: nothing."""

    trunk_BxT: Array | None = None  # of log π on the student's response
    ratio_BxT: Array | None = None  # advantage over the denominator: of the clipped ratio on the student's response
    divergence_BxT: Array | None = None  # of the divergence from the teacher on the student's response
    branch_BxMxGxC: Array | None = None  # of log π on the student's branches
    text_BxMxNxC: Array | None = None  # of log π on the teacher's continuations
    answer_BxT: Array | None = None  # of log π on the teacher's answers
    is_audited_BxM: Array | None = None  # chunks with evidence; they may be without the anchor
    target_BxM: Array | None = None  # π̂, for the record
    chunk_advantage_BxM: Array | None = None  # weights before the denominators, for the record
    branch_advantage_BxMxG: Array | None = None


class Arm(NamedTuple):
    weights: Callable[[Seen, Settings], Weights]
    needs: Needs


def denominators(mask_BxT: Array, normalise: str) -> Array:
    """What a token's weight is divided by, broadcasting with [B, T].

    "token" and "sequence" as in `arms.batch_denominator`, one number; "response": a response's own length times the
    number of responses, [B, 1]: the mean over its tokens, then over responses (GRPO, arXiv 2402.03300).
    """
    if normalise != "response":
        return arms.batch_denominator(mask_BxT, normalise=normalise)
    length_Bx1 = jnp.sum(mask_BxT, axis=1, keepdims=True, dtype=jnp.float32)
    return jnp.maximum(length_Bx1, 1.0) * arms.batch_denominator(mask_BxT, normalise="sequence")


def verify(seen: Seen, settings: Settings) -> Weights:
    """OmniOPD as published (arXiv 2606.01476); see `arms.verify`."""
    anchors: Any = seen.anchors
    given = arms.verify(
        seen.mask_BxT,
        anchors,
        seen.prior_BxM,
        seen.score_sum_BxM,
        seen.count_BxM,
        seen.agreement_BxM,
        chunk_tokens=settings.chunk_tokens,
        prior_strength=settings.prior_strength,
        normalise=settings.normalise,
        baseline=settings.baseline,
        group_B=seen.group_B,
    )
    targets = given.targets
    return Weights(
        trunk_BxT=given.weight_BxT,
        is_audited_BxM=targets.is_audited_BxM,
        target_BxM=targets.target_BxM,
        chunk_advantage_BxM=targets.advantage_BxM,
    )


def branch(seen: Seen, settings: Settings) -> Weights:
    """G continuations of the student against the same texts of the teacher (ours); see `arms.branch`."""
    mask_BxMxGxC: Any = seen.branch_mask_BxMxGxC
    anchors: Any = seen.anchors
    given = arms.branch(
        seen.mask_BxT,
        anchors,
        mask_BxMxGxC,
        seen.branch_score_BxMxG,
        seen.branch_overlap_BxMxG,
        seen.count_BxM,
        repulsion=settings.repulsion,
        normalise=settings.normalise,
    )
    return Weights(
        branch_BxMxGxC=given.branch_weight_BxRxC.reshape(mask_BxMxGxC.shape),
        is_audited_BxM=given.is_audited_BxM,
        branch_advantage_BxMxG=given.advantage_BxMxG,
    )


def imitate(seen: Seen, settings: Settings) -> Weights:
    """The teacher's n continuations of a chunk as branches of the trunk, 1/n each (ours).

    A Monte Carlo estimate, from the very calls of `verify`, of the gradient of the forward KL to the teacher over the
    next C tokens at states that the student visits: the idea of DAgger (Ross, Gordon and Bagnell 2011) for text. Its
    optimum is the teacher's distribution. The denominator is that of `verify`. `objective.confidence_power` weighs
    each token in the step.
    """
    mask_BxMxNxC: Any = seen.text_mask_BxMxNxC
    denominator = arms.batch_denominator(seen.mask_BxT, normalise=settings.normalise)
    count_BxM = jnp.asarray(seen.count_BxM, jnp.float32)
    anchors: Any = seen.anchors
    is_audited_BxM = anchors.is_valid_BxM & (count_BxM > 0)
    each_BxM = jnp.where(is_audited_BxM, 1.0 / (jnp.maximum(count_BxM, 1.0) * denominator), 0.0)
    return Weights(text_BxMxNxC=jnp.where(mask_BxMxNxC, each_BxM[:, :, None, None], 0.0), is_audited_BxM=is_audited_BxM)


def sft(seen: Seen, settings: Settings) -> Weights:
    """Maximum likelihood of the teacher's own full answers: sequence-level distillation (Kim and Rush 2016, arXiv
    1606.07947). With `objective.confidence_power` = 1 it is DFT (arXiv 2508.05629)."""
    mask_BxT: Any = seen.answer_mask_BxT
    return Weights(answer_BxT=jnp.where(mask_BxT, 1.0 / denominators(mask_BxT, settings.normalise), 0.0))


def opd(seen: Seen, settings: Settings) -> Weights:
    """White-box on-policy distillation: a divergence from the teacher at every token of the student's responses (GKD,
    arXiv 2306.13649; MiniLLM, arXiv 2306.08543), or its one-sample form.

    "sampled": log π is weighted with log π_T(y_t) − log π_θ(y_t), no gradient: given the prefix, its expectation over
    y_t is minus the gradient of KL(π_θ ‖ π_T) (On-Policy Distillation, Thinking Machines Lab 2025).
    """
    mask_BxT: Any = seen.mask_BxT
    each_BxT = jnp.where(mask_BxT, 1.0 / denominators(mask_BxT, settings.normalise), 0.0)
    if settings.divergence != "sampled":
        return Weights(divergence_BxT=each_BxT)
    gap_BxT = jnp.where(mask_BxT, jnp.asarray(seen.teacher_logprob_BxT) - jnp.asarray(seen.logprob_BxT), 0.0)
    return Weights(trunk_BxT=each_BxT * gap_BxT)


def group_advantage(reward_B: Array, group_B: Array, *, scale: bool) -> Array:
    """A_b = (r_b − mean) / (std + 1e-4) within the responses of one prompt (GRPO, arXiv 2402.03300); scale=False leaves
    the division out (Dr. GRPO, arXiv 2503.20783). The deviation is that of a sample (n − 1), as in TRL. A group whose
    rewards are equal says nothing: exactly 0."""
    reward_B, group_B = jnp.asarray(reward_B, jnp.float32), jnp.asarray(group_B)
    is_peer_BxB = (group_B[:, None] == group_B[None, :]).astype(jnp.float32)
    count_B = jnp.sum(is_peer_BxB, axis=1)
    is_equal_B = jnp.all((is_peer_BxB == 0) | (reward_B[:, None] == reward_B[None, :]), axis=1)
    centred_B = reward_B - is_peer_BxB @ reward_B / count_B
    if scale:
        variance_B = is_peer_BxB @ jnp.square(centred_B) / jnp.maximum(count_B - 1.0, 1.0)
        centred_B = centred_B / (jnp.sqrt(variance_B) + 1e-4)
    return jnp.where(is_equal_B, 0.0, centred_B)


def grpo(seen: Seen, settings: Settings) -> Weights:
    """Reinforcement learning from a verifiable reward without a critic (GRPO, arXiv 2402.03300).

    Every token of a response carries its `group_advantage`, through the ratio to the student that sampled it, clipped
    to [1 − ε, 1 + ε] in the step. GRPO's own denominator is `normalise` = "response"; "token" is DAPO's (arXiv
    2503.14476). Its k3 KL to the reference is `anchor_estimator` = "k3".
    """
    mask_BxT: Any = seen.mask_BxT
    advantage_B = group_advantage(seen.reward_B, seen.group_B, scale=settings.scale_advantage)
    each_BxT = jnp.where(mask_BxT, 1.0 / denominators(mask_BxT, settings.normalise), 0.0)
    return Weights(ratio_BxT=advantage_B[:, None] * each_BxT)


def anchor(seen: Seen, settings: Settings) -> Weights:
    """Nothing but the KL anchor, on every response token: a control (does the anchor alone move the student?)."""
    del seen, settings
    return Weights()


ARMS: dict[str, Arm] = {
    "verify": Arm(verify, Needs(chunks=True)),
    "branch": Arm(branch, Needs(chunks=True, branches=True)),
    "imitate": Arm(imitate, Needs(chunks=True)),
    "sft": Arm(sft, Needs(responses=False, answers=True)),
    "opd": Arm(opd, Needs(logits=True)),
    "grpo": Arm(grpo, Needs(reward=True)),
    "anchor": Arm(anchor, Needs()),
}


def needs_of(mixture: Mapping[str, float], divergence: str) -> Needs:
    """What the arms of a mixture (name → weight) need together."""
    together = Needs(*map(any, zip(*(ARMS[name].needs for name in mixture), strict=True)))
    if together.logits and divergence == "sampled":  # a single number a token, read before the step
        together = together._replace(logits=False, logprob=True)
    return together


def combined(mixture: Mapping[str, float], seen: Seen, settings: Settings) -> Weights:
    """Σ weight · arm, field by field; records are those of the arm that has them."""
    total = Weights()
    for name, weight in mixture.items():
        given = ARMS[name].weights(seen, settings)
        if weight != 1.0:
            given = given._replace(
                **{f: weight * v for f in _SUMMED if (v := getattr(given, f)) is not None}  # a number, not a record
            )
        total = Weights(*(_sum(field, a, b) for field, a, b in zip(Weights._fields, total, given, strict=True)))
    return jax.tree.map(jax.lax.stop_gradient, total)


_SUMMED = ("trunk_BxT", "ratio_BxT", "divergence_BxT", "branch_BxMxGxC", "text_BxMxNxC", "answer_BxT")


def _sum(field: str, a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if field in _SUMMED else b
