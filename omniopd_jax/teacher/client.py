"""The client that all API teachers share: many calls at once, retried, limited, paid for, kept.

Inside runs one event loop on a thread of its own; outside, `continue_texts` submits everything, then collects.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import random
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from omniopd_jax.config import TeacherConfig
from omniopd_jax.teacher.budget import Budget
from omniopd_jax.teacher.cache import Cache, Row
from omniopd_jax.teacher.caller import Caller
from omniopd_jax.teacher.capabilities import Capability
from omniopd_jax.teacher.dialect import Dialect, Reply
from omniopd_jax.teacher.jobs import Job, Step, waves
from omniopd_jax.teacher.probe import PROBE_TOKENS, Finding, find_manner
from omniopd_jax.teacher.protocol import (
    Activity,
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
        self._steps: list[Step] = []  # that are running
        self._is_stopped = False  # by `stop` or `cancel`, for good
        self._caller = Caller(dialect, config, budget, redact)
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
        jobs = [job for step in list(self._steps) for job in list(step.jobs.values())]
        return Activity(
            wanted=sum(len(job.keys) for job in jobs),
            arrived=sum(len(job.rows) for job in jobs),
            in_flight=self._budget.in_flight,
            failed=self._caller.num_failed,
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

    def stop(self) -> None:
        """Sends nothing more, for good. Who waits in other threads hears of it once what is in flight is kept."""
        self._is_stopped = True  # first: a step that begins now sees it, or is seen below

        def stop_all() -> None:
            for step in self._steps:
                step.stop(self._stopped())

        self._loop.call_soon_threadsafe(stop_all)

    def cancel(self) -> None:
        """Ends the calls that other threads wait for, for good: what is in flight must not go on spending."""
        self._is_stopped = True
        for future in list(self._running):
            future.cancel()

    def _stopped(self) -> TeacherStopped:
        return TeacherStopped(f"{self.name} is not asked any more.")

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
                    return (await self._caller.attempt(body, n, seed, n * PROBE_TOKENS, timeout_s))[0]
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
        step = Step(self._finding, time.monotonic())
        self._steps.append(step)
        try:
            if self._is_stopped:
                raise self._stopped()
            jobs = [step.job(request, self._dialect, self.name) for request in requests]
            await self._fill_from_cache(step)
            if self._config.replay_only:
                self._check_replay(step)
            else:
                await self._call_all(step)
        finally:
            self._steps.remove(step)
        seen: set[str] = set()
        results = []
        for job in jobs:
            results.append(job.result(step.finding.manner.mode, is_repeat=job.keys[-1] in seen))
            seen.add(job.keys[-1])
        return results

    async def _fill_from_cache(self, step: Step) -> None:
        if self._cache is None:
            return
        keys = [key for job in step.jobs.values() for key in job.keys]
        kept = await asyncio.to_thread(self._cache.get, keys)
        for job in step.jobs.values():
            for index, key in enumerate(job.keys):
                if key in kept:
                    job.rows[index] = kept[key]
            job.num_cached = len(job.rows)

    def _check_replay(self, step: Step) -> None:
        missing = sum(len(job.keys) - len(job.rows) for job in step.jobs.values())
        if missing:
            total = sum(len(job.keys) for job in step.jobs.values())
            raise TeacherStopped(
                f"config.teacher.replay_only=True, but {missing} of {total} continuations are not in the cache: the "
                "run asks other questions than the one that filled it (other seed, model, data or sampling settings)."
            )

    async def _call_all(self, step: Step) -> None:
        tasks = []
        for job in waves(list(step.jobs.values())):
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
                f"({self._caller.last_failure or 'no answer'})."
            )

    async def _fetch(self, step: Step, job: Job, wanted: list[int]) -> None:
        """Attempts until the wanted samples are here and kept, the attempts are used up, or the step stops."""
        manner = step.finding.manner
        began = time.monotonic()
        for attempt in range(1, self._policy.max_attempts + 1):
            if step.stopped is not None:
                return
            seed = (job.request.seed + wanted[0] * _SEED_STRIDE) & 0x7FFFFFFF if manner.seed else None
            try:
                tokens = len(wanted) * job.request.max_tokens
                reply, cost = await self._caller.attempt(
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
                    self._caller.pause(failure.retry_after_s)
            except TeacherStopped as stopped:
                step.stop(stopped)
                return
            else:
                wanted = await self._keep(step, job, wanted, reply, cost)
                if not wanted:
                    return
                step.failures["fewer_samples"] += 1
                self._caller.last_failure = "fewer samples came back than were asked for"
                wait_s = self._policy.wait_s(attempt, None, self._rng)
            if step.stopped is not None:
                return
            if attempt < self._policy.max_attempts:
                step.in_flight.discard(asyncio.current_task())
                await asyncio.sleep(wait_s)
        if self._caller.last_success < began and not step.stopped:
            step.stop(
                TeacherStopped(
                    f"{self.name} is down: no call succeeded for {time.monotonic() - began:.1f} s and "
                    f"{self._policy.max_attempts} attempts ({self._caller.last_failure})."
                )
            )

    async def _keep(self, step: Step, job: Job, wanted: list[int], reply: Reply, cost: Usage) -> list[int]:
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

    def _other_model(self, before: str, after: str) -> TeacherStopped:
        return TeacherStopped(
            f"{self.name} answered as {before!r} at the start and answers as {after!r} now: that is another teacher. "
            "Start a new run with it, or ask for a model by its dated name."
        )

    def _log(self, step: Step, num_late: int) -> None:
        if step.failures:
            counts = ", ".join(f"{reason} ×{count}" for reason, count in step.failures.most_common())
            logging.warning(
                "%s: failed attempts in this step: %s. Last: %s", self.name, counts, self._caller.last_failure
            )
        if num_late:
            logging.warning(
                "%s: %d calls were not answered within config.teacher.step_deadline_s=%g: continuations are missing.",
                self.name, num_late, self._config.step_deadline_s,
            )  # fmt: skip
