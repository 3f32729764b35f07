"""The contestants' side: a process that prepares some work once and then does it as often as it is told to.

Lines of JSON in both directions, requests on stdin, answers on what was stdout. Standard library alone, because the
other libraries' virtual environments import this file too.

    {"prepare": {...}}  →  {"ready": {...}}          weights, compilation, warm-up; what the contestant says of itself
    {"run": true}       →  {"wall_s", "cpu_s", ...}  the work once
    {"weigh": true}     →  {"extra_memory_mib"}      the work once, its memory watched, not timed
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Spec = Mapping[str, Any]


class Work(NamedTuple):
    """What a contestant has prepared."""

    run: Callable[[], Mapping[str, Any] | None]  # does the work and waits for its end; may say more about it
    about: Mapping[str, Any] = {}  # goes into the answer to "prepare"
    counter: Callable[[], int] | None = None  # compilations so far in this process
    memory: Callable[[], tuple[int, int]] | None = None  # device bytes (now, at the peak); None: resident memory


def serve(prepare: Callable[[Spec], Work]) -> None:
    """Answers requests until stdin ends. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work: Work | None = None

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                work = prepare(request["prepare"])
                began = time.perf_counter()
                work.run()  # compiles, where the library does
                first_s = time.perf_counter() - began
                work.run()  # some compile once more, for the types that their own first run returned
                answer({"ready": dict(work.about) | {"first_s": first_s}})
            elif work is None:
                answer({"error": "nothing is prepared"})
            elif "weigh" in request:
                answer({"extra_memory_mib": _weigh(work)})
            else:
                answer(_timed(work))
        except Exception:
            answer({"error": traceback.format_exc()})


def _timed(work: Work) -> dict[str, Any]:
    compiled = work.counter() if work.counter else 0
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    more = work.run()
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return seconds | {"compilations": (work.counter() - compiled) if work.counter else 0} | dict(more or {})


def _weigh(work: Work) -> float:
    """MiB that exist during the work beside what exists before it (weights, optimizer state, programs).

    On an accelerator by the allocator's peak, which jax never resets: too much where preparing took more than the work.
    """
    gc.collect()
    if work.memory is not None:
        before, _ = work.memory()
        work.run()
        return (work.memory()[1] - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = _status("VmRSS")
    work.run()
    return (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """KiB, from the kernel."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
