"""One call of an API within all limits: calls in flight, rates, the budget."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from omniopd_jax.config import TeacherConfig
from omniopd_jax.teacher.budget import CHARACTERS_A_TOKEN, Budget
from omniopd_jax.teacher.dialect import Dialect, Reply
from omniopd_jax.teacher.jobs import Job, Step
from omniopd_jax.teacher.limits import Gate, RateLimit
from omniopd_jax.teacher.protocol import Usage
from omniopd_jax.teacher.redaction import Redactor
from omniopd_jax.teacher.retry import CallFailed


class Caller:
    """Makes calls, pays for them and knows how the last ones went. One event loop, all its coroutines.

    Args:
      dialect: the API.
      config: `config.teacher`, for its limits.
      budget: what may be spent.
      redact: takes secrets out of messages.
    """

    def __init__(self, dialect: Dialect, config: TeacherConfig, budget: Budget, redact: Redactor):
        self._dialect = dialect
        self._budget = budget
        self._redact = redact
        self._gate = Gate(config.max_concurrency)
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)
        self._characters_seen = self._tokens_seen = 0
        self.last_success = 0.0  # time.monotonic()
        self.last_failure = ""
        self.num_failed = 0  # attempts

    async def attempt(
        self,
        body: Mapping[str, Any],
        n: int,
        seed: int | None,
        max_completion_tokens: int,
        timeout_s: float,
        *,
        step: Step | None = None,
        job: Job | None = None,
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
                self.num_failed += 1
                self.last_failure = self._redact(str(failure))
                if job is not None:
                    job.usage += dataclasses.replace(cost, prompt_tokens=0, completion_tokens=0)
                failure.args = (self.last_failure,)
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
        self.last_success = time.monotonic()
        self._gate.succeeded()
        spare = prompt_tokens + max_completion_tokens - reply.prompt_tokens - reply.completion_tokens
        self._tokens.give_back(spare)
        self._characters_seen += characters
        self._tokens_seen += reply.prompt_tokens
        if job is not None:
            job.usage += cost
        return reply, cost

    def pause(self, seconds: float) -> None:
        """Nobody calls before `seconds` are over."""
        self._gate.pause(seconds)

    def _tokens_a_character(self) -> float:
        if self._tokens_seen == 0:
            return 1.0 / CHARACTERS_A_TOKEN
        return 1.25 * self._tokens_seen / self._characters_seen  # prefixes differ; a little above their mean


def _characters(value: Any) -> int:
    """Characters of all texts in a body."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_characters(item) for item in value)
    return 0
