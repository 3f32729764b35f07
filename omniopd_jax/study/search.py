"""The search for a learning rate: a grid in equal ratios, extended while its best point lies at an edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def missing(grid: Sequence[float], scores: Mapping[float, float], extensions: int) -> list[float]:
    """Rates that are still to be tried; [] when the search is over.

    Args:
      grid: ascending, at least one rate.
      scores: of the rates tried so far, higher is better.
      extensions: how many rates beyond the grid may be tried at most.
    """
    untried = [rate for rate in grid if rate not in scores]
    if untried:
        return untried
    if len(grid) < 2 or len(scores) - len(grid) >= extensions:
        return []
    ratio = grid[1] / grid[0]
    chosen = best(scores)
    if chosen == max(scores):
        return [_rounded(chosen * ratio)]
    if chosen == min(scores):
        return [_rounded(chosen / ratio)]
    return []


def best(scores: Mapping[float, float]) -> float:
    """The rate of the highest score; among equals the lowest, which changes the student least."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
