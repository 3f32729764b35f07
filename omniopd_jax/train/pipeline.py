"""Rollout, audit and gradients of one batch side by side: while the teacher works on one micro-batch, the next is
sampled; once all are sampled, gradients are taken of those that it is done with.

All of it happens under the same parameters and one optimizer step follows at the end, so the overlap changes when
things happen and nothing else: what a micro-batch's rows draw and are asked is a function of the step and the row.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from omniopd_jax.config import Config, ConfigError
from omniopd_jax.teacher.protocol import (
    BudgetExhausted,
    ContinuationRequest,
    ContinuationResult,
    Teacher,
    TeacherStopped,
)
from omniopd_jax.train.credit import is_by_row, needs_of

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


def check_staleness(config: Config) -> None:
    """Raises ConfigError for responses of older parameters, which a reason speaks against (docs/scale.md)."""
    if config.pipeline.staleness:
        raise ConfigError(
            f"config.pipeline.staleness={config.pipeline.staleness} must be 0: the very parameters that a step updates "
            "choose its chunks, priors and branches, and weights on tokens cannot mend a choice of chunks; to hide the "
            "teacher's time raise config.pipeline.micro_batches."
        )


def parts_sampled(config: Config) -> int:
    """Parts in which a batch is sampled and audited; only a teacher to wait for is worth the smaller batches."""
    return config.pipeline.micro_batches if needs_of(config).chunks else 1


def parts_learnt(config: Config) -> int:
    """Parts of a batch whose gradients are taken one by one, each as soon as the teacher is done with it.

    One where a response's weights hang on other responses' verdicts, and where a batch is used more than once: then
    all of it is needed at once.
    """
    return parts_sampled(config) if is_by_row(config) and config.train.updates_per_batch == 1 else 1


def micro_batch(config: Config) -> int:
    """Responses that a pass of the update computes: `train.micro_batch_size`, or what it shares with a smaller part."""
    rows = config.rollout.batch_size
    return math.gcd(rows // parts_learnt(config), config.train.micro_batch_size or rows)


def overlapped(
    first: Iterable[S],
    second: Callable[[S], T],
    *,
    meet: Callable[[Callable[[], T]], R],
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], Any] | None = None,
    to_the_end: bool = False,
) -> Iterator[R]:
    """meet(lambda: second(item)) for each item in order; every `second` runs on a thread of its own, which starts as
    soon as its item is there. All items are made before the first of these is yielded.

    Args:
      first: its items are made on this thread, one after the other.
      second: must not enter a collective: the threads' order differs from process to process.
      meet: called on this thread, item by item; may be a collective.
      waiting: entered while this thread only waits for `second`.
      stop: called when this thread gives up while a `second` works, to cut that short. A teacher that stopped, here or
        on another process, cuts nothing short: what is being answered is paid for.
      to_the_end: all items are made even where `second` has failed.

    Raises:
      Exception: that of the first item whose `second` raised.
    """
    works: list[_Work[T]] = []

    def result(work: _Work[T]) -> T:
        with waiting():
            return work.result()

    try:
        for item in first:
            works.append(_Work(second, item))
            if not to_the_end and any(work.error is not None for work in works):
                break
        for work in works:
            yield meet(functools.partial(result, work))
    except BaseException as error:
        try:
            if getattr(error, "exit_code", None) in (TeacherStopped.exit_code, BudgetExhausted.exit_code):
                with waiting():
                    for work in works:
                        work.wait()
        finally:
            if stop is not None and any(work.is_running for work in works):
                stop()
        raise


class _Work(Generic[T]):
    """One call on a thread of its own."""

    def __init__(self, function: Callable[[S], T], item: S):
        self.error: BaseException | None = None
        self._result: list[T] = []
        # A daemon: a thread that waits for a dead teacher must not keep an interrupted process alive.
        self._thread = threading.Thread(target=self._run, args=(function, item), name="audit", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def result(self) -> T:
        """Waits, and returns or raises what came of it."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._result[0]

    def _run(self, function: Callable[[S], T], item: S) -> None:
        try:
            self._result.append(function(item))
        except BaseException as error:  # whatever it is, the thread that waits has to hear of it
            self.error = error


class Shared:
    """A teacher for several threads: what surrounds its answers is done by one at a time, who holds `lock`.

    Tokenizers are not made for several threads. While a teacher that takes questions side by side (`is_concurrent`)
    is waited for, the lock is open.
    """

    def __init__(self, teacher: Teacher, lock: threading.Lock):
        self.name = teacher.name
        self._teacher = teacher
        self._lock = lock

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        if not getattr(self._teacher, "is_concurrent", False):
            return self._teacher.continue_texts(requests)
        self._lock.release()
        try:
            return self._teacher.continue_texts(requests)
        finally:
            self._lock.acquire()

    def probe(self) -> str:
        return self._teacher.probe()

    def close(self) -> None:
        self._teacher.close()
