"""The result line: held-out accuracy with its interval, before and after, from result.json or from eval/* metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from omniopd_jax.report.curves import accuracy_label
from omniopd_jax.report.text import clean, number
from omniopd_jax.report.workdir import WorkDir

_BEFORE = ("before", "base", "start", "initial", "first")
_AFTER = ("after", "final", "end", "last", "student", "trained")
_Z = 1.959964  # of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Measure:
    """One accuracy, a share of held-out problems."""

    label: str  # "greedy", "temperature 1", …
    value: float
    standard_error: float | None = None
    problems: int | None = None
    before: float | None = None  # the same before training
    step: int | None = None  # after which it was measured; None: at the end

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %: normal from the standard error, Wilson's where that is 0 (all or none right) and n is known."""
        if self.standard_error:
            low, high = self.value - _Z * self.standard_error, self.value + _Z * self.standard_error
            return max(0.0, low), min(1.0, high)
        if self.problems:
            return wilson(self.value, self.problems)
        return None


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n."""
    spread = _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def measures(workdir: WorkDir) -> list[Measure]:
    """The accuracies of result.json, else the last of each eval/* metric; [] where there is none yet."""
    return _from_result(workdir.result) or _from_metrics(workdir)


def _from_result(result: Mapping[str, Any]) -> list[Measure]:
    """Every group of result.json with an "accuracy" is a measure; its place in the file names it."""
    found = dict(_accuracies(result, ()))
    problems = number(result.get("problems"))
    before, after = {}, {}
    for place, group in found.items():
        rest = tuple(part for part in place if part not in _BEFORE + _AFTER)
        (before if any(part in _BEFORE for part in place) else after)[rest] = group
    return [
        Measure(
            label=_label(place),
            value=group["accuracy"],
            standard_error=_share(group.get("standard_error")),
            problems=int(count) if (count := number(group.get("problems")) or problems) else None,
            before=before[place]["accuracy"] if place in before else None,
        )
        for place, group in after.items()
    ]


def _accuracies(value: object, place: tuple[str, ...]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if not isinstance(value, Mapping) or len(place) > 6:
        return []
    if _share(value.get("accuracy")) is not None:
        return [(place, value)]
    return [found for name, part in value.items() for found in _accuracies(part, (*place, clean(name)))]


def _share(value: object) -> float | None:
    found = number(value) if not isinstance(value, bool) else None
    return float(found) if found is not None and 0 <= found <= 1 else None


def _label(place: tuple[str, ...]) -> str:
    return " ".join(place).replace("_", " ") or "accuracy"


def _from_metrics(workdir: WorkDir) -> list[Measure]:
    names = sorted({name for row in workdir.metrics.values() for name in row if accuracy_label(name) is not None})
    found = []
    for name in names:
        steps, values = workdir.series(name)
        if not all(0 <= value <= 1 for value in values):
            continue
        errors = dict(zip(*workdir.series(_error_name(name)), strict=True))
        found.append(
            Measure(
                label=accuracy_label(name) or name,
                value=values[-1],
                standard_error=errors.get(steps[-1]),
                problems=_problems(dict(zip(steps, values, strict=True)), errors),
                before=values[0] if len(values) > 1 else None,
                step=steps[-1],
            )
        )
    return found


def _error_name(accuracy_name: str) -> str:
    """eval/greedy_standard_error for eval/greedy_accuracy."""
    return f"{accuracy_name.removesuffix('accuracy').rstrip('_')}_standard_error".replace("/_", "/")


def _problems(values: Mapping[int, float], errors: Mapping[int, float]) -> int | None:
    """How many problems were judged once each: the standard error sqrt(p (1 - p) / (n - 1)) solved for n."""
    for step, error in errors.items():
        if error and step in values:
            return round(1 + values[step] * (1 - values[step]) / error**2)
    return None
