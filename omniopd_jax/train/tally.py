"""What the teacher was asked about a batch, in numbers: the metrics of several calls, made those of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from omniopd_jax.teacher.protocol import Teacher

# Counts add up, a mean is weighted with the number of what it is a mean over.
_COUNTS = (
    "audit/chunks",
    "audit/moved_cuts",
    "audit/dropped_cuts",
    "teacher/requested",
    "teacher/received",
    "teacher/cached",
    "teacher/calls",
    "teacher/prompt_tokens",
    "teacher/completion_tokens",
    "teacher/tokens",
    "teacher/dollars",
    "teacher/used_calls",
    "teacher/used_prompt_tokens",
    "teacher/used_completion_tokens",
)
_LEDGER = "teacher/total_dollars"  # each process's own ledger, at the end of its calls
_SECONDS = ("teacher/seconds", "audit/similarity_seconds")
_MEAN_OVER = {
    "audit/score_mean": "received",
    "audit/ended_share": "received",
    "audit/short_share": "received",
    "teacher/missing_share": "requested",
    "teacher/refused_share": "requested",
    "teacher/latency_seconds": "requests",
    "audit/branch_distinct_share": "requests",
    "audit/identical_share": "several",
    "audit/agreement_mean": "several",
    "audit/branch_score_mean": "answered",
}


class Tally(NamedTuple):
    """Metrics by the names of `metrics.REGISTRY`, and the numbers that their means are means over."""

    metrics: dict[str, float]
    over: dict[str, float]


def taken(metrics: dict[str, float], teacher: Teacher, *, requests: int, several: int = 0, answered: int = 0) -> Tally:
    """The tally of one process's calls, with what its ledger says after them.

    Args:
      metrics: `teacher.verify.usage_metrics` of these calls, and what else is in the tables above.
      teacher: whose ledger it is; one without a ledger is free.
      requests: how many were made.
      several: chunks with more than one usable text.
      answered: chunks with at least one.
    """
    paid = getattr(teacher, "paid", None)
    return Tally(
        metrics if paid is None else metrics | {_LEDGER: paid.dollars},
        {
            "requested": metrics["teacher/requested"],
            "received": metrics["teacher/received"],
            "requests": requests,
            "several": several,
            "answered": answered,
        },
    )


def in_turn(parts: Sequence[Tally]) -> Tally:
    """One tally from those of calls that one teacher answered one after the other."""
    return _merged(parts, seconds=sum, ledger=max)


def at_once(parts: Sequence[Tally]) -> Tally:
    """One tally from those of processes that asked at the same time, each with a ledger of its own."""
    return _merged(parts, seconds=max, ledger=sum)


_Merger = Callable[[Iterable[float]], float]


def _merged(parts: Sequence[Tally], *, seconds: _Merger, ledger: _Merger) -> Tally:
    """A mean over nothing stays left out."""
    if len(parts) == 1:
        return parts[0]
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        having = [part for part in parts if name in part.metrics]
        values = [part.metrics[name] for part in having]
        if len(values) == 1:
            merged[name] = values[0]
        elif name in _COUNTS:
            merged[name] = float(sum(values))
        elif name in _SECONDS:
            merged[name] = float(seconds(values))
        elif name == _LEDGER:
            merged[name] = float(ledger(values))
        else:
            merged[name] = float(np.average(values, weights=[part.over[_MEAN_OVER[name]] for part in having]))
    counted = dict.fromkeys(name for part in parts for name in part.over)
    return Tally(merged, {name: sum(part.over[name] for part in parts) for name in counted})
