"""Means over seeds, and paired tests: two arms on the same seeds and the same problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    standard_error: float | None  # sample standard deviation over √seeds; None for one seed
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better one arm is than another."""

    mean: float  # over seeds of the difference of accuracies
    low: float  # 95 % interval over seeds: Student's t; (−1, 1) for one seed
    high: float
    p_problems: float  # two-sided exact McNemar test over all problems of all seeds: of these very runs
    seeds: int

    @property
    def verdict(self) -> str:
        """ "holds" or "reversed" where the interval over seeds leaves out 0, else "undecided"."""
        if self.low > 0:
            return "holds"
        return "reversed" if self.high < 0 else "undecided"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error over seeds.

    Raises:
      ValueError: no values.
    """
    if not len(values):
        raise ValueError("A mean of no values.")
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(float(array.mean()), error, len(array))


def difference(better_SxQ: np.ndarray, worse_SxQ: np.ndarray) -> Difference:
    """A paired comparison.

    Two sources of chance are kept apart. Another seed (world, students, draws) would give another difference: the
    interval over seeds speaks of that, and with three seeds it is wide (t with two degrees of freedom). Other problems
    would as well: McNemar's test speaks of these runs alone, on problems like these.

    Args:
      better_SxQ, worse_SxQ: bool, whether each of Q problems was solved by the run of each of S seeds; the same
        problems in both.

    Raises:
      ValueError: shapes that differ, or nothing to compare.
    """
    from scipy import stats

    if better_SxQ.shape != worse_SxQ.shape or better_SxQ.ndim != 2 or not better_SxQ.size:
        raise ValueError(f"Paired verdicts must have one shape SxQ, got {better_SxQ.shape} and {worse_SxQ.shape}.")
    seeds = len(better_SxQ)
    difference_S = better_SxQ.mean(axis=1) - worse_SxQ.mean(axis=1)
    mean = float(difference_S.mean())
    half = 1.0
    if seeds > 1:
        error = difference_S.std(ddof=1) / np.sqrt(seeds)
        # Identical differences on a few seeds are luck: never less than what the problems alone leave open.
        within_S = (better_SxQ.astype(float) - worse_SxQ.astype(float)).var(axis=1, ddof=1) / better_SxQ.shape[1]
        half = float(max(stats.t.ppf(0.975, seeds - 1) * error, 1.96 * np.sqrt(within_S.sum()) / seeds))
    wins, losses = int((better_SxQ & ~worse_SxQ).sum()), int((worse_SxQ & ~better_SxQ).sum())
    p = float(stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0
    return Difference(mean, max(mean - half, -1.0), min(mean + half, 1.0), p, seeds)
