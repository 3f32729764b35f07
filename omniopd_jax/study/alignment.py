"""How well an estimator's gradient points where an exact white-box gradient points, before anything is trained.

At a fixed student each estimator (an arm with its settings) gives one gradient a batch. Two questions are kept apart:
what one gets for a budget of teacher tokens (the plain cosine with the reference, noise included), and where the
estimator points when noise is averaged out (the cosine of the expectations). The second needs no infinite sample: with
gradients g_1 … g_K of independent batches, the mean of g_i · g_j over i ≠ j is an unbiased estimate of ‖E g‖², whereas
‖mean g‖² is too large by the noise.

The loop itself gives the gradients. With b1 = 0 and no clipping Adam's first moment is the gradient of the last update,
and with a learning rate far below what float32 can add to a weight the student stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from omniopd_jax.config import Config, from_mapping
from omniopd_jax.study import design
from omniopd_jax.train import loop
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.types import InputError

REFERENCES = ("reverse_kl", "forward_kl")
_FROZEN = dict(learning_rate=1e-30, schedule="constant", warmup_steps=0, b1=0.0, clip_norm=0.0, weight_decay=0.0)
_SEEDS_APART = 1_000_000  # the reference's batches are not the estimators'
_ROUNDING = 1e-5  # of the reference's largest entry: what float32 leaves of a gradient that is 0


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of independent batches at one student."""

    gradient_KxD: np.ndarray  # float32, one a batch, all parameters in one row
    tokens_K: np.ndarray  # teacher tokens written for it

    def __post_init__(self) -> None:
        if len(self.gradient_KxD) != len(self.tokens_K) or len(self.gradient_KxD) < 2:
            raise ValueError(f"At least 2 batches are needed, with tokens each, got {self.gradient_KxD.shape}.")


@dataclasses.dataclass(frozen=True)
class Alignment:
    """An estimator against one reference."""

    cosine: float  # at the budget: mean over disjoint groups of batches
    tokens: float  # teacher tokens that such a group really holds, on average
    corrected: float | None  # of the expectations; None where the batches show no signal above their noise
    corrected_error: float | None  # its standard error, by leaving out each batch in turn
    halves: float  # cosine of the means of even and odd batches: how much of the estimate is signal
    curve: Sequence[Sequence[float]] = ()  # (teacher tokens, plain cosine) of groups of 1, 2, 4, … batches


def configured(common: Mapping[str, Any], settings: Mapping[str, Any], *, seed: int = 0) -> Config:
    """The config of an estimator: no update moves the student, and the first moment is the gradient."""
    values = design.with_settings(common, settings)
    values["optimizer"] |= _FROZEN
    values["train"] |= dict(seed=seed, steps=10**6, max_teacher_tokens=0, checkpoint_every=0, audit_log_every=0)
    values["eval"] |= dict(every=0)
    return from_mapping(values)


def reference_config(common: Mapping[str, Any], kind: str, *, seed: int = 0) -> Config:
    """The exact divergence over the full vocabulary, averaged over the tokens of the student's own responses."""
    settings = {
        "objective.arm": "opd",
        "objective.divergence": kind,
        "objective.top_k": 0,
        "objective.anchor_weight": 0.0,
    }
    return configured(common, settings, seed=seed + _SEEDS_APART)


def gather(experiment: Experiment, batches: int, progress: Callable[[int, int], None] | None = None) -> Gradients:
    """The gradients of the first batches of a run that changes nothing.

    Args:
      experiment: prepared under a config from `configured`, no step taken.
      batches: how many.
      progress: called with (batches done, batches in all).
    """
    rows, tokens, clock = [], [], loop.Clock()
    with Interrupts().installed() as interrupts:
        for index in range(batches):
            before = experiment.spent.completion_tokens
            loop.one_step(experiment, index, clock, interrupts)
            moment = jax.device_get(optax.tree.get(experiment.state.opt_state, "mu"))
            rows.append(np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(moment)]))
            tokens.append(experiment.spent.completion_tokens - before)
            interrupts.check()
            if progress is not None:
                progress(index + 1, batches)
    return Gradients(np.stack(rows), np.array(tokens, np.int64))


def align(estimator: Gradients, reference: Gradients, *, budget: int) -> Alignment:
    """Compares expectations and what a budget buys.

    A gradient that is rounding alone (the anchor's, where student and base model are one) counts as 0.

    Args:
      estimator, reference: gradients of independent batches, neither shared between the two.
      budget: teacher tokens of one plain cosine. Batches are grouped so that each group holds about as many; an
        estimator that is cheaper than that altogether, or free, forms one group a batch.
    """
    if estimator.gradient_KxD.shape[1] != reference.gradient_KxD.shape[1]:
        raise InputError("The estimator and the reference have gradients of different students.")
    gradient_KxD = estimator.gradient_KxD.astype(np.float64)
    mean_D = reference.gradient_KxD.mean(axis=0, dtype=np.float64)
    if np.abs(gradient_KxD).max() < _ROUNDING * np.abs(mean_D).max():
        gradient_KxD = np.zeros_like(gradient_KxD)
        estimator = dataclasses.replace(estimator, gradient_KxD=gradient_KxD)
    count = len(gradient_KxD)
    per_batch = max(float(estimator.tokens_K.mean()), 0.0)
    size = min(max(round(budget / per_batch), 1), count) if per_batch else 1
    sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
    tokens, cosine = _plain(estimator, mean_D, size)
    gram_KxK, dot_K = gradient_KxD @ gradient_KxD.T, gradient_KxD @ mean_D
    reference_square = _signal(reference.gradient_KxD.astype(np.float64) @ reference.gradient_KxD.T.astype(np.float64))
    corrected = _corrected(gram_KxK, dot_K, reference_square)
    left_out = [
        value
        for i in range(count if count > 2 else 0)
        if (value := _corrected(_without(gram_KxK, i), np.delete(dot_K, i), reference_square)) is not None
    ]
    error = None
    if len(left_out) == count:
        spread = np.asarray(left_out) - np.mean(left_out)
        error = float(np.sqrt((count - 1) / count * (spread**2).sum()))
    elif count > 2:
        corrected = None  # a signal that is gone without one of the batches is none
    return Alignment(
        cosine=cosine,
        tokens=tokens,
        corrected=corrected,
        corrected_error=error,
        halves=_cosine(gradient_KxD[::2].mean(axis=0), gradient_KxD[1::2].mean(axis=0)),
        curve=tuple(_plain(estimator, mean_D, size) for size in sizes),
    )


def _plain(estimator: Gradients, reference_D: np.ndarray, size: int) -> tuple[float, float]:
    """(teacher tokens, cosine of the mean gradient), means over disjoint groups of `size` batches."""
    starts = range(0, len(estimator.tokens_K) - size + 1, size)
    groups = [estimator.gradient_KxD[i : i + size].mean(axis=0, dtype=np.float64) for i in starts]
    tokens = [estimator.tokens_K[i : i + size].sum() for i in starts]
    return float(np.mean(tokens)), float(np.mean([_cosine(group, reference_D) for group in groups]))


def _corrected(gram_KxK: np.ndarray, dot_K: np.ndarray, reference_square: float) -> float | None:
    square = _signal(gram_KxK)
    return float(dot_K.mean() / np.sqrt(square * reference_square)) if min(square, reference_square) > 0 else None


def _signal(gram_KxK: np.ndarray) -> float:
    """Unbiased estimate of ‖E g‖²: the mean of g_i · g_j over i ≠ j."""
    count = len(gram_KxK)
    return float((gram_KxK.sum() - np.trace(gram_KxK)) / (count * (count - 1)))


def _without(gram_KxK: np.ndarray, i: int) -> np.ndarray:
    return np.delete(np.delete(gram_KxK, i, axis=0), i, axis=1)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0
