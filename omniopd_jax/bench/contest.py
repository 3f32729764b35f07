"""Contestants of one piece of work, in turns or one after the other, within one call: one record each comes out."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.bench.shapes import Cost
from omniopd_jax.types import InputError

ROOT = Path(__file__).resolve().parents[2]
OURS = (sys.executable, "-m", "omniopd_jax.bench.ours")


class ContestError(InputError):
    """A contestant that could not be prepared or failed; the message holds the end of what it said."""


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One contestant: a process that speaks `protocol`."""

    name: str  # "ours", or whatever it is compared with
    spec: Mapping[str, Any]
    command: tuple[str, ...] = OURS


@dataclasses.dataclass(frozen=True)
class Contest:
    """One piece of work, done by several."""

    work: str
    model: str
    shape: Mapping[str, int]
    entrants: Sequence[Entrant]
    tokens: int  # tokens that one run handles; 0: the entrants say so themselves
    cost: Cost | None  # None: no bound is known
    bar: float = 0.0  # how many times faster than the best other entrant ours should be; 0: no bar


@dataclasses.dataclass(frozen=True)
class Settings:
    repeats: int
    cores: tuple[int, ...]  # to which this process and all contestants are pinned; () leaves them alone
    clock: str  # "wall", or "cpu": the process's own seconds, for machines that others use too
    is_apart: bool = False  # contestants one after the other: a TPU serves one process at a time


def pin(cores: tuple[int, ...]) -> None:
    """Pins this process; contestants inherit it.

    Raises:
      InputError: no such core.
    """
    try:
        if cores:
            os.sched_setaffinity(0, cores)
    except OSError as error:
        raise InputError(f"--cores={','.join(map(str, cores))}: {error.strerror}.") from error


class Process:
    """A running contestant."""

    def __init__(self, entrant: Entrant, settings: Settings):
        environment = dict(os.environ, PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false")
        # Several processes may share a GPU: none may take all of its memory when it starts.
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if settings.cores:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(len(settings.cores)))
        self.name = entrant.name
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            entrant.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,  # a file: a pipe that nobody reads would fill up and stop the process
            env=environment,
            cwd=ROOT,
            text=True,
        )
        try:
            self.about = self.ask(prepare=dict(entrant.spec))["ready"]
        except BaseException:
            self.close()  # and with it what it holds of the device
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContestError(f"{self.name} ended. {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestError(f"{self.name} failed. {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read()[-1500:]

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


class Machine:
    """Measures the machine's rates, in a process of its own, which waits between the contests where it may.

    `settings` are those asked for, contestants apart where the device wants it.
    """

    def __init__(self, entrant: Entrant, settings: Settings):
        self._entrant = entrant
        process = Process(entrant, settings)
        self.about = process.about
        self.settings = dataclasses.replace(settings, is_apart=settings.is_apart or self.about["platform"] == "tpu")
        self._process: Process | None = process
        if self.settings.is_apart:
            self.close()

    def rates(self) -> dict[str, Any]:
        if self._process is not None:
            return self._process.ask(run=True)
        process = Process(self._entrant, self.settings)
        try:
            return process.ask(run=True)
        finally:
            process.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


@dataclasses.dataclass
class _Run:
    """What came of one contestant."""

    times: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory_mib: float = 0.0
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


def hold(contest: Contest, machine: Machine, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs a contest: everybody prepares, then they take turns, then memory is watched; apart, one after the other.

    Args:
      machine: asked before and after the turns.
      say: told what is going on.

    Returns:
      One record an entrant, in the order given; a contestant that fails has "error" in its record, and "ours" may not.
    """
    settings = machine.settings
    groups = [[entrant] for entrant in contest.entrants] if settings.is_apart else [contest.entrants]
    before = machine.rates()
    runs: dict[str, _Run] = {}
    for group in groups:
        runs |= _side_by_side(contest, group, settings, say)
    rates = [before, machine.rates()]
    best = {
        "flops_per_s": max(rate.get(key, 0.0) for rate in rates for key in ("xla_flops_per_s", "blas_flops_per_s")),
        "xla_flops_per_s": max(rate["xla_flops_per_s"] for rate in rates),
        "bytes_per_s": max(rate["bytes_per_s"] for rate in rates),
    }
    records = []
    for entrant in contest.entrants:
        head = {"work": contest.work, "model": contest.model, "entrant": entrant.name} | dict(contest.shape)
        run = runs[entrant.name]
        if run.error:
            records.append(head | {"error": run.error[-600:]})
            continue
        record = head | _summary(contest, run.times, settings, best)
        record["extra_memory_mib"] = round(run.memory_mib, 1)
        records.append(record | run.about | {"machine": best})
    return _with_ratios(contest, records)


def _side_by_side(
    contest: Contest, entrants: Sequence[Entrant], settings: Settings, say: Callable[[str], None]
) -> dict[str, _Run]:
    """Name → what came of it, of contestants whose processes live at the same time."""
    running: dict[str, Process] = {}
    runs = {entrant.name: _Run() for entrant in entrants}
    try:
        for entrant in entrants:
            say(f"{contest.work} {contest.model}: {entrant.name} prepares")
            try:
                running[entrant.name] = Process(entrant, settings)
            except ContestError as error:
                if entrant.name == "ours":
                    raise
                runs[entrant.name].error = str(error)
        for turn in range(settings.repeats):
            say(f"{contest.work} {contest.model}: turn {turn + 1} of {settings.repeats}")
            for name, process in running.items():
                runs[name].times.append(process.ask(run=True))
        for name, process in running.items():
            runs[name].memory_mib, runs[name].about = process.ask(weigh=True)["extra_memory_mib"], process.about
    finally:
        for process in running.values():
            process.close()
    return runs


def _summary(
    contest: Contest, times: list[dict[str, Any]], settings: Settings, best: Mapping[str, float]
) -> dict[str, Any]:
    median = statistics.median(time[f"{settings.clock}_s"] for time in times)
    tokens = contest.tokens or times[-1].get("tokens", 0)
    bound = contest.cost.bound_s(best["flops_per_s"], best["bytes_per_s"]) if contest.cost else None
    taken = {
        "clock": settings.clock,
        "median_s": median,
        "median_wall_s": statistics.median(time["wall_s"] for time in times),
        "fastest_s": min(time[f"{settings.clock}_s"] for time in times),
        "tokens": tokens,
        "tokens_per_s": tokens / median,
        "bound_s": bound,
        "multiple_of_bound": median / bound if bound else None,
        "compilations": sum(time["compilations"] for time in times),  # after the warm-up
        "repeats": len(times),
    }
    known = {"wall_s", "cpu_s", "compilations", "tokens"}
    return taken | {key: value for key, value in times[-1].items() if key not in known}


def _with_ratios(contest: Contest, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to our record how many times faster it is a token than the best of the others, and the bar."""
    ours = next(record for record in records if record["entrant"] == "ours")
    others = [record for record in records if record["entrant"] != "ours" and "error" not in record]
    for other in others:
        other["ours_is_faster"] = ours["tokens_per_s"] / other["tokens_per_s"]
        other["ours_takes_memory"] = ours["extra_memory_mib"] / max(other["extra_memory_mib"], 0.1)
    if others:
        ours["faster_than_best"] = min(other["ours_is_faster"] for other in others)
        ours["memory_beside_least"] = max(other["ours_takes_memory"] for other in others)
    if contest.bar:
        ours["bar"] = contest.bar
    return records
