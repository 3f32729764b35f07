"""The audit of one batch: the teacher's verdicts, asked for by all processes, each about its own share of the rows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from omniopd_jax.teacher.protocol import Teacher
from omniopd_jax.teacher.verify import verify
from omniopd_jax.train import batching, distributed, pipeline, tally
from omniopd_jax.train.credit import Evidence
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.train.tally import Tally
from omniopd_jax.types import Anchors, PromptBatch, Verdicts

if TYPE_CHECKING:
    from omniopd_jax.train.loop import Clock


class Audit(NamedTuple):
    """What the teacher's texts about some rows of a batch come to."""

    verdicts: Verdicts
    records: list[dict[str, Any]]  # one a chunk asked about, by row
    asked: Tally


def audit(
    experiment: Experiment, parts: Iterable[Evidence], *, step: int, interrupts: Interrupts, clock: Clock
) -> Generator[Audit]:
    """The audits of a batch's parts, in order: the teacher works on those that are there while more are sampled, and
    each is yielded while it works on those behind.

    Args:
      experiment: the run.
      parts: the parts: a batch, its rollout, anchors and branches. Host arrays, whole on every process. All are
        sampled before the first audit is yielded.
      step: for messages and audits.
      interrupts: cut a wait for the teacher short.
      clock: of the phase "audit", which then runs beside "sample" and "update".

    Yields:
      The audit of each part, whole on every process.

    Raises:
      TeacherStopped, Interrupted: on this process.
      PeerStopped, PeerFailed: on another one.
    """
    lock = threading.Lock()
    teacher = pipeline.Shared(experiment.teacher, lock)

    def about(part: Evidence) -> Audit:
        with lock, clock.phase("audit"):
            return ask(experiment, part, teacher, step)

    def everywhere(audit: Callable[[], Audit]) -> Audit:
        return united(distributed.collect(audit))

    if experiment.config.pipeline.micro_batches == 1:

        def alone(part: Evidence) -> Audit:
            with interrupts.abandonable():
                return about(part)

        return (everywhere(functools.partial(alone, part)) for part in parts)
    return pipeline.overlapped(
        parts,
        about,
        meet=everywhere,
        waiting=interrupts.abandonable,
        give_up=teacher.give_up,
        # Sampling is a collective: the other processes go on with it whatever happened to this one's teacher.
        to_the_end=distributed.has_peers(),
    )


def ask(experiment: Experiment, part: Evidence, teacher: Teacher, step: int) -> Audit:
    """This process's questions about its share of the rows, and what came back."""
    batch, rollout, anchors = part.batch, part.rollout, part.anchors
    assert rollout is not None
    assert anchors is not None
    verdicts, records, metrics = verify(
        batch,
        rollout,
        _only(anchors, distributed.share(len(batch.prompts))),
        part.branches,
        tokenizer=experiment.tokenizer,
        teacher=teacher,
        similarity=experiment.similarity,
        settings=experiment.verify_settings,
        seed=experiment.config.train.seed,
        step=step,
    )
    asked = tally.taken(
        metrics,
        experiment.teacher,
        requests=int(metrics["audit/chunks"]),
        several=int((verdicts.count_BxM > 1).sum()),
        answered=int((verdicts.count_BxM > 0).sum()),
    )
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
    verdicts = jax.tree.map(
        lambda *arrays: np.sum(arrays, axis=0, dtype=arrays[0].dtype), *(_arrays(part.verdicts) for part in parts)
    )
    return Audit(
        verdicts=Verdicts(**verdicts),
        # stable: the chunks of a response stay in their order
        records=sorted((record for part in parts for record in part.records), key=lambda record: record["response"]),
        asked=tally.at_once([part.asked for part in parts]),
    )


def joined(parts: Sequence[Audit]) -> Audit:
    """One audit from those of a batch's parts, asked one after the other; rows follow each other."""
    if len(parts) == 1:
        return parts[0]
    verdicts = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(_arrays(part.verdicts) for part in parts))
    records, offset = [], 0
    for part in parts:
        records += [record | {"response": record["response"] + offset} for record in part.records]
        offset += len(part.verdicts.score_BxMxN)
    return Audit(
        verdicts=Verdicts(**verdicts),
        records=records,
        asked=tally.in_turn([part.asked for part in parts]),
    )


def rows_of(batch: PromptBatch, sizes: Sequence[int]) -> list[PromptBatch]:
    """The batch in parts of so many rows, in their order."""
    return [
        PromptBatch(
            prompts=batch.prompts[end - size : end],
            tokens_BxP=batch.tokens_BxP[end - size : end],
            mask_BxP=batch.mask_BxP[end - size : end],
            sample_index_B=batch.sample_index_B[end - size : end],
        )
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def filled_up(verdicts: Verdicts, rows: int) -> Verdicts:
    """The verdicts about the first responses of a batch of `rows`; the teacher has said nothing about the rest."""
    missing = rows - len(verdicts.score_BxMxN)
    more = jax.tree.map(lambda array: np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]), _arrays(verdicts))
    return Verdicts(**more)


def split(evidence: Evidence, size: int) -> list[Evidence]:
    """What was gathered about a batch, in parts of `size` rows, in their order."""
    arrays = evidence._replace(batch=None)
    batches = rows_of(evidence.batch, [size] * (len(evidence.batch.prompts) // size))
    return [
        batching.sliced(arrays, number * size, (number + 1) * size)._replace(batch=batch)
        for number, batch in enumerate(batches)
    ]


def whole(parts: Sequence[Evidence], batch: PromptBatch) -> Evidence:
    """What was gathered about a batch, from its micro-batches."""
    if len(parts) == 1:
        return parts[0]
    gathered = [part._replace(batch=None) for part in parts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *gathered)._replace(batch=batch)


def _arrays(verdicts: Verdicts) -> dict[str, np.ndarray | None]:
    return {field.name: getattr(verdicts, field.name) for field in dataclasses.fields(verdicts)}
