"""Rollout, audit and gradients of one batch side by side: while the teacher works on the parts that are there, more are
sampled; once all are sampled, gradients are taken of those that it is done with.

All of it happens under the same parameters and one optimizer step follows at the end, so the overlap changes when
things happen and nothing else: what a micro-batch's rows draw and are asked is a function of the step and the row.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from omniopd_jax.config import Config, ConfigError
from omniopd_jax.teacher.protocol import ContinuationRequest, ContinuationResult, Teacher, TeacherStopped
from omniopd_jax.train.credit import is_by_row, needs_of
from omniopd_jax.train.distributed import PeerStopped
from omniopd_jax.train.stops import SIGNALLED, Interrupted

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


def parts_audited(config: Config) -> int:
    """Parts of a batch that the teacher is asked about one by one; one where there is no teacher to wait for."""
    return config.pipeline.micro_batches if needs_of(config).chunks else 1


def rows_sampled(config: Config) -> list[int]:
    """Responses of each rollout of a batch: those of some of the `parts_audited`, which are sampled together.

    Unless the config says how many rollouts there are, each takes as many parts as all before it: the teacher has its
    first part early, and few rollouts are small, each of which reads all weights for every token.
    """
    parts = parts_audited(config)
    rows = config.rollout.batch_size // parts
    if config.pipeline.rollouts:
        rollouts = min(config.pipeline.rollouts, parts)
        return [parts // rollouts * rows] * rollouts
    counts = [1]
    while sum(counts) < parts:
        counts.append(min(sum(counts), parts - sum(counts)))
    return [count * rows for count in counts]


def rows_decoded(config: Config) -> int:
    """Responses that are decoded side by side: the slots, or the rows of the largest rollout."""
    rows, slots = max(rows_sampled(config)), config.rollout.slots
    return slots if 0 < slots < rows else rows


def parts_learnt(config: Config) -> int:
    """Parts of a batch whose gradients are taken one by one, each as soon as the teacher is done with it.

    One where a response's weights hang on other responses' verdicts, and where a batch is used more than once: then
    all of it is needed at once.
    """
    return parts_audited(config) if is_by_row(config) and config.train.updates_per_batch == 1 else 1


def micro_batches(config: Config, shares: int) -> list[int]:
    """Sizes, ascending, in which a pass of the update may compute the responses of a part.

    `shares` is the mesh's data × fsdp, which divides every part (`sharding.check_batch`).
    """
    rows = config.rollout.batch_size // parts_learnt(config)
    return [size for size in range(shares, rows + 1, shares) if rows % size == 0]


def micro_batch(config: Config, shares: int) -> int:
    """The largest of `micro_batches` up to `train.micro_batch_size`."""
    sizes = micro_batches(config, shares)
    most = max(config.train.micro_batch_size or sizes[-1], shares)
    return max(size for size in sizes if size <= most)


def overlapped(
    first: Iterable[S],
    second: Callable[[S], T],
    *,
    meet: Callable[[Callable[[], T]], R],
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    give_up: Callable[[BaseException], bool] = lambda error: False,
    to_the_end: bool = False,
) -> Generator[R]:
    """meet(lambda: second(item)) for each item in order; every `second` runs on a thread of its own, which starts as
    soon as its item is there. All items are made before the first of these is yielded.

    Args:
      first: its items are made on this thread, one after the other.
      second: must not enter a collective: the threads' order differs from process to process.
      meet: called on this thread, item by item; may be a collective.
      waiting: entered while this thread only waits for `second`.
      give_up: told why this thread gives up while a `second` works, to cut that short; says whether to wait until it
        has ended.
      to_the_end: a `second` that fails is raised in its turn, after all items are made; else at once, whatever it is
        of.

    Raises:
      Exception: that of a `second`.
    """
    works: list[_Work[T]] = []
    ended = threading.Condition()

    def failed() -> _Work[T] | None:
        return None if to_the_end else next((work for work in works if work.error is not None), None)

    def result(work: _Work[T]) -> T:
        with waiting(), ended:
            ended.wait_for(lambda: work.has_ended or failed() is not None)
        return (failed() or work).result()

    try:
        for item in first:
            works.append(_Work(second, item, ended))
            if failed() is not None:
                break
        for work in works:
            yield meet(functools.partial(result, work))
    except BaseException as error:
        if not all(work.has_ended for work in works) and give_up(error):
            try:
                with waiting(), ended:
                    ended.wait_for(lambda: all(work.has_ended for work in works))
            except Interrupted as interrupted:  # what is raised stays the first reason, which other processes know
                give_up(interrupted)
        raise


class _Work(Generic[T]):
    """One call on a thread of its own, which notifies `ended` at its end."""

    def __init__(self, function: Callable[[S], T], item: S, ended: threading.Condition):
        self.has_ended = False
        self.error: BaseException | None = None
        self._found: list[T] = []
        # A daemon: a thread that waits for a dead teacher must not keep an interrupted process alive.
        threading.Thread(target=self._run, args=(function, item, ended), name="audit", daemon=True).start()

    def result(self) -> T:
        """Returns or raises what came of it; it has ended."""
        if self.error is not None:
            raise self.error
        return self._found[0]

    def _run(self, function: Callable[[S], T], item: S, ended: threading.Condition) -> None:
        error = None
        try:
            self._found.append(function(item))
        except BaseException as raised:  # whatever it is, the thread that waits has to hear of it
            error = raised
        with ended:
            self.error, self.has_ended = error, True
            ended.notify_all()


class Shared:
    """A teacher for several threads: what surrounds its answers is done by one at a time, who holds `lock`.

    Tokenizers are not made for several threads. While a teacher that takes questions side by side (`is_concurrent`)
    is waited for, the lock is open.
    """

    def __init__(self, teacher: Teacher, lock: threading.Lock):
        self.name = teacher.name
        self._teacher: Any = teacher
        self._lock = lock
        self._stopped: BaseException | None = None

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        if self._stopped is not None:
            raise TeacherStopped("The step was given up before this part of it was asked about.") from self._stopped
        if not getattr(self._teacher, "is_concurrent", False):
            return self._teacher.continue_texts(requests)
        self._lock.release()
        try:
            return self._teacher.continue_texts(requests)
        finally:
            self._lock.acquire()

    def give_up(self, error: BaseException) -> bool:
        """Sends nothing more. True: what is in flight is paid for and should be waited for, False: it is cut off.

        It is waited for where a teacher stopped, here or on another process; not for a signal, nor for a bug.
        """
        self._stopped = error
        is_orderly = isinstance(error, TeacherStopped | PeerStopped) and error.exit_code < SIGNALLED
        if getattr(self._teacher, "is_concurrent", False):
            self._teacher.stop() if is_orderly else self._teacher.cancel()
        return is_orderly

    def probe(self) -> str:
        return self._teacher.probe()

    def close(self) -> None:
        self._teacher.close()
