"""What n judged samples of each problem say: avg@k, pass@k, and how sure that is."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def average(correct_PxN: np.ndarray) -> np.ndarray:
    """Share of right samples of each problem, float64 [problems]; its mean is avg@n.

    Args:
      correct_PxN: bool [problems, samples].
    """
    return np.asarray(correct_PxN, np.float64).mean(axis=1)


def pass_at_k(correct_PxN: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate, for each problem, of the probability that at least one of k samples is right, from n ≥ k:

        1 − C(n − c, k) / C(n, k),   c right ones of n          (Chen et al. 2021, arXiv 2107.03374, equation 1)

    Args:
      correct_PxN: bool [problems, samples].
      k: 1 .. samples.

    Raises:
      ValueError: k is not in this range.
    """
    n = correct_PxN.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples a problem.")
    wrong_P = n - np.asarray(correct_PxN, bool).sum(axis=1)
    # C(w, k) / C(n, k) as a product of k factors, which overflows nowhere; one of them is 0 where w < k.
    factors_PxK = np.clip((wrong_P[:, None] - np.arange(k)) / (n - np.arange(k)), 0.0, None)
    return 1.0 - factors_PxK.prod(axis=1)


def standard_error(per_problem_P: np.ndarray) -> float:
    """Of the mean over problems, which are taken as drawn at random; 0 for a single one."""
    count = len(per_problem_P)
    return float(per_problem_P.std(ddof=min(1, count - 1)) / np.sqrt(count))


def bootstrap_interval(per_problem_P: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems: problems are drawn anew, with all their samples."""
    rng = np.random.default_rng(seed)
    count = len(per_problem_P)
    means = np.array([per_problem_P[drawn].mean() for drawn in rng.integers(0, count, (RESAMPLES, count))])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
