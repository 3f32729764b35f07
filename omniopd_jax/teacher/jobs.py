"""What `continue_texts` is asked for, while it is under way: one job a request, all of them one step."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omniopd_jax.teacher.cache import Row, sample_keys
from omniopd_jax.teacher.dialect import Dialect, Mode
from omniopd_jax.teacher.modes import align, begun_text
from omniopd_jax.teacher.probe import Finding
from omniopd_jax.teacher.protocol import (
    BudgetExhausted,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    TeacherStopped,
    Usage,
)

_THOUGHT_TOKENS = 4  # an empty text that took more was thought away, not ended at once


@dataclasses.dataclass
class Job:
    """One request on its way; what arrives is put into it."""

    request: ContinuationRequest
    body: Mapping[str, Any]
    keys: list[str]  # one a sample
    rows: dict[int, Row] = dataclasses.field(default_factory=dict)  # by sample number
    usage: Usage = dataclasses.field(default_factory=Usage)
    num_cached: int = 0
    latency_s: float = 0.0

    def result(self, mode: Mode, *, is_repeat: bool) -> ContinuationResult:
        """What the caller gets; a request that stands twice in one step pays once."""
        begun = begun_text(self.request)
        continuations, num_refused = [], 0
        for index in sorted(self.rows):
            continuation = _continuation(self.rows[index], begun, mode)
            if continuation is not None:
                continuations.append(continuation)
            num_refused += self.rows[index].finish == "refused"
        return ContinuationResult(
            continuations=tuple(continuations),
            num_missing=len(self.keys) - len(continuations),
            num_refused=num_refused,
            num_cached=len(continuations) if is_repeat else min(self.num_cached, len(continuations)),
            model=next((row.model for row in self.rows.values()), ""),
            usage=Usage() if is_repeat else self.usage,
            used=Usage() if is_repeat else _behind(self.rows.values()),
            latency_s=self.latency_s,
        )


def _behind(rows: Iterable[Row]) -> Usage:
    """What samples cost when they were paid for, now or by an earlier run."""
    rows = list(rows)
    return Usage(
        prompt_tokens=round(sum(row.prompt_tokens for row in rows)),
        completion_tokens=round(sum(row.completion_tokens for row in rows)),
        calls=len({row.created for row in rows}),
    )


class Step:
    """The jobs of one `continue_texts` and what ended it early."""

    def __init__(self, finding: Finding, start: float):
        self.finding = finding
        self.start = start
        self.jobs: dict[str, Job] = {}  # by the last sample's key: equal requests are one job
        self.stopped: TeacherStopped | None = None
        self.tasks: Sequence[asyncio.Task[None]] = ()
        self.in_flight: set[asyncio.Task[Any] | None] = set()  # tasks whose call is sent and may be billed
        self.failures: collections.Counter[str] = collections.Counter()

    def job(self, request: ContinuationRequest, dialect: Dialect, teacher: str) -> Job:
        try:
            body = dialect.body(request, self.finding.manner)
        except ValueError as error:
            raise TeacherStopped(str(error)) from None
        mode = self.finding.manner.mode
        keys = sample_keys(teacher, self.finding.answered, mode, body, request.seed, request.n)
        return self.jobs.setdefault(keys[-1], Job(request, body, keys))

    def stop(self, error: TeacherStopped) -> None:
        """The first reason counts, but that the budget is spent goes before others.

        Whoever waits (for another attempt, its turn, a rate or the budget) is cancelled; what is in flight goes on.
        """
        if self.stopped is None or isinstance(error, BudgetExhausted):
            self.stopped = error
        for task in self.tasks:
            if task not in self.in_flight and task is not asyncio.current_task():
                task.cancel()


def _continuation(row: Row, begun: str, mode: Mode) -> Continuation | None:
    """The usable text of a row, or None. An empty text counts only where the teacher ended its answer at once."""
    if row.finish not in ("stop", "length"):
        return None
    text = align(begun, row.text, mode)
    if not text:
        is_ended = row.finish == "stop" and mode != "instruct" and row.completion_tokens <= _THOUGHT_TOKENS
        return Continuation("", "stop") if is_ended else None
    return Continuation(text, "stop" if row.finish == "stop" else "length")


def waves(jobs: Sequence[Job]) -> list[Job]:
    """First the shortest prefix of every response, then the next one of each: a server's prefix cache has the earlier
    prefix by the time the longer one comes, and responses still run side by side."""
    chains: dict[Any, list[list[Any]]] = {}  # prompt → its responses so far: [last prefix, length]
    ranks = []
    for job in jobs:
        responses = chains.setdefault(job.request.messages, [])
        for response in responses:
            if job.request.prefix.startswith(response[0]) and job.request.prefix != response[0]:
                response[0] = job.request.prefix
                response[1] += 1
                ranks.append(response[1])
                break
        else:
            responses.append([job.request.prefix, 0])
            ranks.append(0)
    order = sorted(range(len(jobs)), key=lambda index: ranks[index])  # stable
    return [jobs[index] for index in order]
