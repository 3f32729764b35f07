"""The client that all API teachers share: many calls at once, retried, limited, paid for, kept.

Inside runs one event loop on a thread of its own; outside, `continue_texts` submits everything, then collects.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import json
import random
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from omniopd_jax.config import TeacherConfig
from omniopd_jax.teacher.budget import CHARACTERS_A_TOKEN, Budget
from omniopd_jax.teacher.cache import Cache, Row, sample_keys
from omniopd_jax.teacher.capabilities import Capability
from omniopd_jax.teacher.dialect import Dialect, Mode, Reply
from omniopd_jax.teacher.limits import Gate, RateLimit
from omniopd_jax.teacher.modes import align, begun_text
from omniopd_jax.teacher.probe import PROBE_TOKENS, Finding, find_manner
from omniopd_jax.teacher.protocol import (
    Activity,
    BudgetExhausted,
    Continuation,
    ContinuationRequest,
    ContinuationResult,
    TeacherStopped,
    Usage,
)
from omniopd_jax.teacher.redaction import Redactor
from omniopd_jax.teacher.retry import CallFailed, RetryPolicy

PROBE_FILE = "teacher_probe.json"
_PROBE_ATTEMPTS = 3  # a teacher that is down at the start is told within seconds
_PROBE_CAP_S = 2.0
_PROBE_TIMEOUT_S = 60.0
_SEED_STRIDE = 0x9E3779B1  # odd: seeds of one request's samples differ
_THOUGHT_TOKENS = 4  # an empty text that took more was thought away, not ended at once
_Result = TypeVar("_Result")


class ApiTeacher:
    """Implements `Teacher` on top of a `Dialect`.

    Args:
      dialect: the API.
      config: `config.teacher`.
      capability: what is worth trying with this model.
      workdir: where `teacher_probe.json` goes.
      cache: None keeps nothing.
      budget: what may be spent.
      policy: the one retry policy.
      redact: takes secrets out of what is logged, raised and kept.
      is_raw: this run's prompts are raw texts; the probe asks likewise.
      run_seed: of the jitter.
    """

    def __init__(
        self,
        dialect: Dialect,
        config: TeacherConfig,
        capability: Capability,
        *,
        workdir: Path,
        cache: Cache | None,
        budget: Budget,
        policy: RetryPolicy,
        redact: Redactor,
        is_raw: bool = False,
        run_seed: int = 0,
    ):
        self.name = f"{config.kind}:{config.model}"
        self._dialect = dialect
        self._config = config
        self._capability = capability
        self._workdir = workdir
        self._cache = cache
        self._budget = budget
        self._policy = policy
        self._redact = redact
        self._is_raw = is_raw
        self._rng = random.Random(run_seed)
        self._finding: Finding | None = None
        self._last_success = 0.0  # time.monotonic()
        self._last_failure = ""
        self._characters_seen = self._tokens_seen = 0
        self._num_failed = 0  # attempts
        self._step: _Step | None = None  # the one that is running
        self._gate = Gate(config.max_concurrency)
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)
        self._running: set[concurrent.futures.Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    is_concurrent = True  # several threads may ask at once; limits and budget are one

    def probe(self) -> str:
        if self._config.dry_run:
            return f"{self.name}: dry run, nothing is sent."
        if self._config.replay_only:
            self._finding = self._kept_finding()
            return f"{self.name}: answers come from the cache alone. {self._finding.sentence(self._config.model)}"
        self._finding = self._run(self._probe())
        finding = json.loads(self._redact(json.dumps(self._finding.to_dict())))
        values = {"teacher": self.name, "base_url": self._config.base_url, **finding}
        self._workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (self._workdir / PROBE_FILE).write_text(text, encoding="utf-8")
        if self._cache is not None:
            self._cache.put_finding(self.name, self._finding.manner.mode, finding).result()
        return self._redact(f"{self.name}: {self._finding.sentence(self._config.model)}")

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        """Submits every request, then collects: one result a request, in order.

        Samples that do not arrive before `teacher.step_deadline_s`, that no attempt brings, that are refused or that
        are unusable are missing in the result.

        Raises:
          TeacherStopped: no later call can succeed (a key that is refused, spent credit, another model, a server that
            is gone), or nothing at all arrived. What was in flight is awaited and kept first.
          BudgetExhausted: a cap is reached; likewise.
        """
        if self._config.dry_run:
            raise TeacherStopped("config.teacher.dry_run=True sends nothing, so there is nothing to learn from.")
        if self._finding is None:
            self.probe()
        return self._run(self._continue(requests))

    @property
    def paid(self) -> Usage:
        """All that this work directory has paid for, earlier runs included."""
        return self._budget.spent

    @property
    def activity(self) -> Activity:
        """What is going on now; to be asked from any thread."""
        jobs = list(self._step.jobs.values()) if self._step is not None else []
        return Activity(
            wanted=sum(len(job.keys) for job in jobs),
            arrived=sum(len(job.rows) for job in jobs),
            in_flight=self._budget.in_flight,
            failed=self._num_failed,
            spent=self._budget.spent,
        )

    def close(self) -> None:
        if self._thread.is_alive():
            self._run(self._dialect.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        if self._cache is not None:
            self._cache.close()
        self._budget.close()

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._running.add(future)
        try:
            return future.result()
        except TeacherStopped as stopped:  # names and messages of a server are in it
            stopped.args = (self._redact(str(stopped)),)
            raise
        except BaseException:
            future.cancel()  # the caller was interrupted: what is in flight must not go on spending
            raise
        finally:
            self._running.discard(future)

    def cancel(self) -> None:
        """Ends the calls that other threads wait for: what is in flight must not go on spending."""
        for future in list(self._running):
            future.cancel()

    def _kept_finding(self) -> Finding:
        kept = self._cache.get_finding(self.name, self._config.mode) if self._cache is not None else None
        if kept is None:
            raise TeacherStopped(
                f"config.teacher.replay_only=True, but the cache holds no answers of {self.name} in mode "
                f"{self._config.mode}."
            )
        return Finding.from_dict(kept)

    # The probe

    async def _probe(self) -> Finding:
        policy = dataclasses.replace(
            self._policy,
            max_attempts=min(_PROBE_ATTEMPTS, self._policy.max_attempts),
            cap_s=min(_PROBE_CAP_S, self._policy.cap_s),
        )
        timeout_s = min(_PROBE_TIMEOUT_S, self._config.request_timeout_s)

        async def ask(body: Mapping[str, Any], n: int, seed: int | None) -> Reply:
            attempt = 1
            while True:
                try:
                    return (await self._attempt(body, n, seed, n * PROBE_TOKENS, timeout_s))[0]
                except CallFailed as failure:
                    waits = policy.wait_s(attempt, failure.retry_after_s, self._rng)
                    if failure.action != "retry" or attempt >= policy.max_attempts or waits > timeout_s:
                        raise
                    attempt += 1
                    await asyncio.sleep(waits)

        return await find_manner(
            self._dialect,
            self._capability,
            ask,
            asked=self._config.model,
            mode=self._config.mode,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            is_raw=self._is_raw,
        )

    # A step

    async def _continue(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        assert self._finding is not None
        self._step = step = _Step(self._finding, time.monotonic())
        jobs = [step.job(request, self._dialect, self.name) for request in requests]
        await self._fill_from_cache(step)
        if self._config.replay_only:
            self._check_replay(step)
        else:
            await self._call_all(step)
        seen: set[str] = set()
        results = []
        for job in jobs:
            results.append(job.result(step.finding.manner.mode, is_repeat=job.keys[-1] in seen))
            seen.add(job.keys[-1])
        self._step = None
        return results

    async def _fill_from_cache(self, step: _Step) -> None:
        if self._cache is None:
            return
        keys = [key for job in step.jobs.values() for key in job.keys]
        kept = await asyncio.to_thread(self._cache.get, keys)
        for job in step.jobs.values():
            for index, key in enumerate(job.keys):
                if key in kept:
                    job.rows[index] = kept[key]
            job.num_cached = len(job.rows)

    def _check_replay(self, step: _Step) -> None:
        missing = sum(len(job.keys) - len(job.rows) for job in step.jobs.values())
        if missing:
            total = sum(len(job.keys) for job in step.jobs.values())
            raise TeacherStopped(
                f"config.teacher.replay_only=True, but {missing} of {total} continuations are not in the cache: the "
                "run asks other questions than the one that filled it (other seed, model, data or sampling settings)."
            )

    async def _call_all(self, step: _Step) -> None:
        tasks = []
        for job in _waves(list(step.jobs.values())):
            wanted = [index for index in range(len(job.keys)) if index not in job.rows]
            size = step.finding.manner.max_n
            for start in range(0, len(wanted), size):
                tasks.append(asyncio.create_task(self._fetch(step, job, wanted[start : start + size])))
        if not tasks:
            return
        step.tasks = tasks
        try:
            _, late = await asyncio.wait(tasks, timeout=self._config.step_deadline_s)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        for task in late:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        self._log(step, len(late))
        if step.stopped is not None:
            raise step.stopped
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome  # a bug, not the teacher's: it must not look like silence
        if not any(job.rows for job in step.jobs.values()):
            raise TeacherStopped(
                f"{self.name}: not one continuation arrived within {time.monotonic() - step.start:.1f} s "
                f"({self._last_failure or 'no answer'})."
            )

    async def _fetch(self, step: _Step, job: _Job, wanted: list[int]) -> None:
        """Attempts until the wanted samples are here and kept, the attempts are used up, or the step stops."""
        manner = step.finding.manner
        began = time.monotonic()
        for attempt in range(1, self._policy.max_attempts + 1):
            if step.stopped is not None:
                return
            seed = (job.request.seed + wanted[0] * _SEED_STRIDE) & 0x7FFFFFFF if manner.seed else None
            try:
                tokens = len(wanted) * job.request.max_tokens
                reply, cost = await self._attempt(
                    job.body, len(wanted), seed, tokens, self._config.request_timeout_s, step=step, job=job
                )
                if step.finding.answered != reply.model:
                    step.stop(self._other_model(step.finding.answered, reply.model))
                    return
            except CallFailed as failure:
                step.failures[failure.reason] += 1
                if failure.action == "stop":
                    step.stop(TeacherStopped(f"{self.name} refuses to go on: {failure}"))
                    return
                if failure.action == "reject":
                    return
                wait_s = self._policy.wait_s(attempt, failure.retry_after_s, self._rng)
                if failure.retry_after_s is not None:
                    self._gate.pause(failure.retry_after_s)
            except TeacherStopped as stopped:
                step.stop(stopped)
                return
            else:
                wanted = await self._keep(step, job, wanted, reply, cost)
                if not wanted:
                    return
                step.failures["fewer_samples"] += 1
                self._last_failure = "fewer samples came back than were asked for"
                wait_s = self._policy.wait_s(attempt, None, self._rng)
            if step.stopped is not None:
                return
            if attempt < self._policy.max_attempts:
                step.in_flight.discard(asyncio.current_task())
                await asyncio.sleep(wait_s)
        if self._last_success < began and not step.stopped:
            step.stop(
                TeacherStopped(
                    f"{self.name} is down: no call succeeded for {time.monotonic() - began:.1f} s and "
                    f"{self._policy.max_attempts} attempts ({self._last_failure})."
                )
            )

    async def _attempt(
        self,
        body: Mapping[str, Any],
        n: int,
        seed: int | None,
        max_completion_tokens: int,
        timeout_s: float,
        *,
        step: _Step | None = None,
        job: _Job | None = None,
    ) -> tuple[Reply, Usage]:
        """One call within all limits; its cost is settled whatever happens.

        Raises:
          CallFailed: with a message free of secrets.
          TeacherStopped: the step stopped while this call waited its turn, or the budget is exhausted.
        """
        characters = _characters(body)
        prompt_tokens = characters * self._tokens_a_character() + 16
        async with self._gate:
            await self._requests.take(1)
            await self._tokens.take(prompt_tokens + max_completion_tokens)
            if step is not None and step.stopped is not None:
                raise step.stopped
            reserved = await self._budget.reserve(prompt_tokens, max_completion_tokens)
            if step is not None:
                step.in_flight.add(asyncio.current_task())
            start = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await self._dialect.call(body, n=n, seed=seed)
            except (TimeoutError, CallFailed) as error:
                failure = error
                if not isinstance(failure, CallFailed):
                    failure = CallFailed("retry", "timeout", f"no answer within {timeout_s:g} s", is_charged=True)
                cost = self._budget.settle(
                    reserved, status=failure.reason, is_assumed=failure.is_charged, latency_s=time.monotonic() - start
                )
                self._num_failed += 1
                self._last_failure = self._redact(str(failure))
                if job is not None:
                    job.usage += dataclasses.replace(cost, prompt_tokens=0, completion_tokens=0)
                failure.args = (self._last_failure,)
                raise failure from None
            except BaseException:  # cancelled at the deadline, or a bug: the call may have been billed
                cost = self._budget.settle(
                    reserved, status="cancelled", is_assumed=True, latency_s=time.monotonic() - start
                )
                if job is not None:
                    job.usage += dataclasses.replace(cost, prompt_tokens=0, completion_tokens=0)
                raise
            cost = self._budget.settle(
                reserved,
                status="ok",
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
                num_samples=len(reply.samples),
                latency_s=time.monotonic() - start,
            )
        self._last_success = time.monotonic()
        self._gate.succeeded()
        spare = prompt_tokens + max_completion_tokens - reply.prompt_tokens - reply.completion_tokens
        self._tokens.give_back(spare)
        self._characters_seen += characters
        self._tokens_seen += reply.prompt_tokens
        if job is not None:
            job.usage += cost
        return reply, cost

    async def _keep(self, step: _Step, job: _Job, wanted: list[int], reply: Reply, cost: Usage) -> list[int]:
        """Puts what arrived on disk, then into the job; returns the sample numbers still wanted."""
        got = list(zip(wanted, reply.samples, strict=False))
        created = time.time()  # one for all samples of a call, by which they are known as such
        rows = {
            index: Row(
                key=job.keys[index],
                teacher=self.name,
                mode=step.finding.manner.mode,
                model=self._redact(reply.model),
                text=self._redact(sample.text),
                finish=sample.finish,
                prompt_tokens=cost.prompt_tokens / len(got),
                completion_tokens=cost.completion_tokens / len(got),
                created=created,
            )
            for index, sample in got
        }
        if self._cache is not None:
            try:
                await asyncio.shield(asyncio.wrap_future(self._cache.put(rows.values())))
            except OSError as error:
                step.stop(TeacherStopped(f"The teacher cache cannot be written: {error}."))
                return []
        job.rows |= rows
        job.latency_s = time.monotonic() - step.start
        return wanted[len(got) :]

    def _tokens_a_character(self) -> float:
        if self._tokens_seen == 0:
            return 1.0 / CHARACTERS_A_TOKEN
        return 1.25 * self._tokens_seen / self._characters_seen  # prefixes differ; a little above their mean

    def _other_model(self, before: str, after: str) -> TeacherStopped:
        return TeacherStopped(
            f"{self.name} answered as {before!r} at the start and answers as {after!r} now: that is another teacher. "
            "Start a new run with it, or ask for a model by its dated name."
        )

    def _log(self, step: _Step, num_late: int) -> None:
        if step.failures:
            counts = ", ".join(f"{reason} ×{count}" for reason, count in step.failures.most_common())
            logging.warning("%s: failed attempts in this step: %s. Last: %s", self.name, counts, self._last_failure)
        if num_late:
            logging.warning(
                "%s: %d calls were not answered within config.teacher.step_deadline_s=%g: continuations are missing.",
                self.name, num_late, self._config.step_deadline_s,
            )  # fmt: skip


@dataclasses.dataclass
class _Job:
    """One request on its way."""

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


class _Step:
    """The jobs of one `continue_texts` and what ended it early."""

    def __init__(self, finding: Finding, start: float):
        self.finding = finding
        self.start = start
        self.jobs: dict[str, _Job] = {}  # by the last sample's key: equal requests are one job
        self.stopped: TeacherStopped | None = None
        self.tasks: Sequence[asyncio.Task[None]] = ()
        self.in_flight: set[asyncio.Task[Any] | None] = set()  # tasks whose call is sent and may be billed
        self.failures: collections.Counter[str] = collections.Counter()

    def job(self, request: ContinuationRequest, dialect: Dialect, teacher: str) -> _Job:
        try:
            body = dialect.body(request, self.finding.manner)
        except ValueError as error:
            raise TeacherStopped(str(error)) from None
        mode = self.finding.manner.mode
        keys = sample_keys(teacher, self.finding.answered, mode, body, request.seed, request.n)
        return self.jobs.setdefault(keys[-1], _Job(request, body, keys))

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


def _waves(jobs: Sequence[_Job]) -> list[_Job]:
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


def _characters(value: Any) -> int:
    """Characters of all texts in a body."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_characters(item) for item in value)
    return 0
