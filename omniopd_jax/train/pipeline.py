"""Rollout and audit of one batch side by side: a micro-batch is sampled while the teacher works on the one before.

All micro-batches are sampled with the same parameters and one update follows at the end, so the overlap changes when
things happen and nothing else: what a micro-batch's rows draw and are asked is a function of the step and the row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from omniopd_jax.config import Config, ConfigError

S = TypeVar("S")
T = TypeVar("T")


def check_staleness(config: Config) -> None:
    """Raises ConfigError for responses of older parameters, which a reason speaks against (docs/scale.md)."""
    if config.pipeline.staleness:
        raise ConfigError(
            f"config.pipeline.staleness={config.pipeline.staleness} must be 0: the very parameters that a step updates "
            "choose its chunks, priors and branches, and weights on tokens cannot mend a choice of chunks; to hide the "
            "teacher's time raise config.pipeline.micro_batches."
        )


def overlapped(
    first: Iterable[S],
    second: Callable[[S], T],
    *,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], Any] | None = None,
    to_the_end: bool = False,
) -> list[T]:
    """[second(item) for item in first], where `second` runs on a thread of its own, in the order of the items.

    Args:
      first: its items are made on this thread, each as soon as the one before it is handed over.
      second: must not enter a collective: the threads' order differs from process to process.
      waiting: entered while this thread only waits for `second`.
      stop: called when this thread is interrupted while `second` works, to cut that short.
      to_the_end: all items are made even where `second` has failed.

    Raises:
      Exception: the first that `second` raised.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    end = object()
    has_failed = threading.Event()

    def work() -> None:
        while (item := inbox.get()) is not end:
            try:
                outcomes.put((second(item), None))
            except BaseException as error:  # whatever it is, the other thread has to hear of it
                has_failed.set()
                outcomes.put((None, error))
                return

    # A daemon: a thread that waits for a dead teacher must not keep an interrupted process alive.
    thread = threading.Thread(target=work, name="audit", daemon=True)
    thread.start()
    results: list[Any] = []
    count = 0
    try:
        for item in first:
            if has_failed.is_set() and not to_the_end:
                break
            inbox.put(item)
            count += 1
        inbox.put(end)
        with waiting():
            for _ in range(count):
                result, error = outcomes.get()
                if error is not None:
                    raise error
                results.append(result)
            thread.join()
    except BaseException:
        inbox.put(end)
        if thread.is_alive() and stop is not None:
            stop()
        raise
    return results
