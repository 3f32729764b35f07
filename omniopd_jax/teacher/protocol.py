"""The black box: what is asked of a teacher and what comes back. Text in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from omniopd_jax.types import Message


@dataclasses.dataclass(frozen=True)
class ContinuationRequest:
    """Continue `prefix`, the beginning of the assistant's answer to `messages`, n times."""

    messages: tuple[Message, ...]
    prefix: str  # decodes cleanly; "" asks for the answer's beginning
    n: int  # samples wanted
    max_tokens: int  # teacher tokens a sample may take
    temperature: float
    top_p: float
    seed: int  # from (run, prompt, position): servers that take a seed get it, the cache key holds it
    is_raw: bool = False  # the only message is the exact text that precedes `prefix`; no chat template


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One sample. An empty text is allowed only where the teacher stopped at once."""

    text: str  # what follows the prefix, white space aligned with it
    finish_reason: Literal["stop", "length"]  # "stop": the teacher ended its answer there


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the request cost, in the teacher's tokens; cached answers cost nothing."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    dollars: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.calls + other.calls,
            self.dollars + other.dollars,
        )


@dataclasses.dataclass(frozen=True)
class ContinuationResult:
    """What came back of one request: at most n continuations, fewer where samples are missing."""

    continuations: tuple[Continuation, ...]
    num_missing: int = 0  # wanted, but lost to errors, the deadline or an unusable answer
    num_refused: int = 0  # of those missing: refused by the teacher
    num_cached: int = 0  # of the continuations: answered from the cache
    model: str = ""  # as the teacher reported it
    usage: Usage = Usage()
    used: Usage | None = None  # tokens and calls behind the continuations, whenever they were paid for; None: `usage`
    latency_s: float = 0.0  # from submission to the last sample


@dataclasses.dataclass(frozen=True)
class Activity:
    """What a teacher behind an API is doing at this moment; a teacher may show it as its attribute `activity`."""

    wanted: int = 0  # continuations of the step that is running
    arrived: int = 0  # of them
    in_flight: int = 0  # calls sent and not yet answered
    failed: int = 0  # attempts of this process that failed
    spent: Usage = Usage()  # of the whole run, earlier parts included


class TeacherStopped(RuntimeError):
    """The run cannot go on with this teacher; the loop saves a checkpoint and ends with `exit_code`."""

    exit_code = 3


class BudgetExhausted(TeacherStopped):
    """A cap in dollars, calls or tokens is reached."""

    exit_code = 4


class Teacher(Protocol):
    """A teacher that is only text."""

    name: str  # for logs: kind and model
    # A teacher that costs money also has `paid: Usage`, all that this work directory has paid, earlier runs included;
    # one that may be asked by several threads at once has `is_concurrent = True`, `stop()`, after which nothing more is
    # sent for what they ask while what is in flight goes on, and `cancel()`, which ends all calls.

    def probe(self) -> str:
        """Proves at start-up that the teacher answers and samples; returns one printable paragraph.

        Raises:
          TeacherStopped: it is down, is another model, or cannot be made to sample.
        """
        ...

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        """Submits every request, then collects: one result a request, in order."""
        ...

    def close(self) -> None:
        """Frees connections, threads and device memory."""
        ...
