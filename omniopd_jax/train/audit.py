"""The audit of one batch: the teacher's verdicts, asked for by all processes, each about its own share of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from omniopd_jax.teacher.verify import verify
from omniopd_jax.train import distributed
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.types import Anchors, Branches, PromptBatch, Rollout, Verdicts


class Audit(NamedTuple):
    """What the teacher's texts about some rows of a batch come to."""

    verdicts: Verdicts
    records: list[dict[str, Any]]  # one a chunk asked about, by row
    asked: dict[str, float]  # metrics


# How the metrics of parts make those of the whole: counts add up, a mean is weighted with what it is a mean over.
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
_LEDGER = "teacher/total_dollars"  # each process's own ledger, at the end of the part
_SECONDS = ("teacher/seconds", "audit/similarity_seconds")
_MEAN_OVER = {
    "audit/score_mean": "received",
    "audit/ended_share": "received",
    "audit/short_share": "received",
    "teacher/missing_share": "requested",
    "teacher/refused_share": "requested",
    "teacher/latency_seconds": "chunks",
    "audit/branch_distinct_share": "chunks",
    "audit/identical_share": "several",
    "audit/agreement_mean": "several",
    "audit/branch_score_mean": "answered",
}


def audit(
    experiment: Experiment,
    batch: PromptBatch,
    rollout: Rollout,
    anchors: Anchors,
    branches: Branches | None,
    *,
    step: int,
    interrupts: Interrupts,
) -> Audit:
    """The audit of a batch. Host arrays, whole on every process; what comes back is whole on every process too.

    Raises:
      TeacherStopped, Interrupted: on this process.
      PeerStopped, PeerFailed: on another one.
    """

    def own() -> Audit:
        with interrupts.abandonable():
            return ask(
                experiment, batch, rollout, _only(anchors, distributed.share(len(batch.prompts))), branches, step
            )

    return united(distributed.collect(own))


def ask(
    experiment: Experiment,
    batch: PromptBatch,
    rollout: Rollout,
    anchors: Anchors,
    branches: Branches | None,
    step: int,
) -> Audit:
    """This process's questions about the anchors given, and what came back."""
    verdicts, records, asked = verify(
        batch,
        rollout,
        anchors,
        branches,
        tokenizer=experiment.tokenizer,
        teacher=experiment.teacher,
        similarity=experiment.similarity,
        settings=experiment.verify_settings,
        seed=experiment.config.train.seed,
        step=step,
    )
    paid = getattr(experiment.teacher, "paid", None)
    if paid is not None:
        asked[_LEDGER] = paid.dollars
    return Audit(verdicts, records, asked)


def _only(anchors: Anchors, rows: range) -> Anchors:
    """The anchors of these rows alone."""
    if len(rows) == len(anchors.is_valid_BxM):
        return anchors
    is_own_B = np.isin(np.arange(len(anchors.is_valid_BxM)), rows)
    return dataclasses.replace(anchors, is_valid_BxM=anchors.is_valid_BxM & is_own_B[:, None])


def united(parts: Sequence[Audit]) -> Audit:
    """One audit from several of the same batch, asked at the same time about rows that do not overlap, in order."""
    if len(parts) == 1:
        return parts[0]
    # No row was asked about twice: where one part has a number the others have 0.
    verdicts = jax.tree.map(lambda *arrays: np.sum(arrays, axis=0, dtype=arrays[0].dtype), *_arrays(parts))
    return Audit(
        verdicts=Verdicts(**verdicts),
        records=[record for part in parts for record in part.records],
        asked=_metrics(parts, seconds=max, ledger=sum),
    )


def joined(parts: Sequence[Audit]) -> Audit:
    """One audit from those of a batch's micro-batches, asked one after the other; rows follow each other."""
    if len(parts) == 1:
        return parts[0]
    verdicts = jax.tree.map(lambda *arrays: np.concatenate(arrays), *_arrays(parts))
    records, offset = [], 0
    for part in parts:
        records += [record | {"response": record["response"] + offset} for record in part.records]
        offset += len(part.verdicts.score_BxMxN)
    return Audit(
        verdicts=Verdicts(**verdicts),
        records=records,
        asked=_metrics(parts, seconds=sum, ledger=max),
    )


def _arrays(parts: Sequence[Audit]) -> list[dict[str, np.ndarray | None]]:
    names = [field.name for field in dataclasses.fields(Verdicts)]
    return [{name: getattr(part.verdicts, name) for name in names} for part in parts]


def _metrics(parts: Sequence[Audit], *, seconds: Any, ledger: Any) -> dict[str, float]:
    """Metrics of the whole; a mean over nothing is left out."""
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part.asked):
        values = [part.asked[name] for part in parts if name in part.asked]
        if name in _COUNTS:
            merged[name] = float(sum(values))
        elif name in _SECONDS:
            merged[name] = float(seconds(values))
        elif name == _LEDGER:
            merged[name] = float(ledger(values))
        else:
            weights = [_weights(part)[_MEAN_OVER[name]] for part in parts if name in part.asked]
            merged[name] = float(np.average(values, weights=weights))
    return merged


def _weights(part: Audit) -> dict[str, float]:
    count_BxM = part.verdicts.count_BxM
    return {
        "received": part.asked["teacher/received"],
        "requested": part.asked["teacher/requested"],
        "chunks": part.asked["audit/chunks"],
        "several": float((count_BxM > 1).sum()),
        "answered": float((count_BxM > 0).sum()),
    }
