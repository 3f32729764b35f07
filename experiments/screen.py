"""What a terminal shows while a command works: one bar after the other, and below a run's bar what its step is doing.

A terminal that can redraw shows it live (rich does the drawing). Anywhere else (a log file, a notebook) a plain line
comes every few seconds. Of several processes only the first one shows anything.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from omniopd_jax.config import Config
from omniopd_jax.teacher.protocol import Activity, Teacher

PLAIN_EVERY_S = 10.0
_WINDOW = 20  # updates of a bar over which its pace is taken


@dataclasses.dataclass
class Bar:
    """How far one piece of work is."""

    name: str
    began: float
    done: int = 0
    total: int = 0
    marks: collections.deque[tuple[float, int]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_WINDOW)
    )

    def advance(self, done: int, total: int, now: float) -> None:
        self.done, self.total = done, total
        self.marks.append((now, done))

    def left_s(self) -> float | None:
        """Seconds to go at the pace of the last updates; None before there are two.

        The oldest of them is left out where it can be: the first step compiles.
        """
        marks = list(self.marks)[1 if len(self.marks) > 3 else 0 :] or [(0.0, 0)]
        (first, at_first), (last, at_last) = marks[0], marks[-1]
        pace = (at_last - at_first) / (last - first) if last > first else 0.0
        return (self.total - self.done) / pace if pace > 0 else None

    def text(self, now: float) -> str:
        """One plain line."""
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        parts = [f"{self.done:,} of {self.total:,}{share}", duration(now - self.began)]
        left = self.left_s()
        if left is not None and self.done < self.total:
            parts.append(f"{duration(left)} left")
        return f"{self.name:<22}" + " · ".join(parts)


class Screen:
    """The bars of one command. Call it with (name, done, total): a new name starts a new bar.

    Args:
      stream: where to draw; None: the standard error.
      every_s: seconds between plain lines.
      is_first: whether this process shows anything; None: whether it is jax's first.
    """

    def __init__(self, stream: TextIO | None = None, *, every_s: float = PLAIN_EVERY_S, is_first: bool | None = None):
        from rich.console import Console

        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._every_s = every_s
        self._is_first = is_first
        self._lock = threading.RLock()
        self._bar: Bar | None = None
        self._details: Callable[[float], list[str]] | None = None
        self._live: Any = None  # rich.live.Live, where it can redraw
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_line, self._last_at = "", 0.0

    @property
    def can_redraw(self) -> bool:
        console = self._console
        return console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with self._lock:
            self._end_bar()
            if self._live is not None:
                self._live.stop()
        if self._thread is not None:
            self._thread.join()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if not self._shows():
                return
            if self._bar is None or self._bar.name != name:
                self._end_bar()
                self._bar = Bar(name, now)
            self._bar.advance(done, total, now)
            self._start()

    def detail(self, lines: Callable[[float], list[str]] | None) -> None:
        """What stands below the bar: called with the time, from the drawing thread, whenever it is drawn."""
        with self._lock:
            self._details = lines

    def _shows(self) -> bool:
        if self._is_first is None:
            import jax

            self._is_first = jax.process_index() == 0
        return self._is_first

    def _start(self) -> None:
        if self._live is None and self.can_redraw:
            from rich.live import Live

            self._live = Live(console=self._console, get_renderable=self._picture, refresh_per_second=4, transient=True)
            self._live.start()
        elif self._thread is None and not self.can_redraw:
            self._last_at = time.monotonic()
            self._thread = threading.Thread(target=self._write_lines, name="progress", daemon=True)
            self._thread.start()

    def _end_bar(self) -> None:
        """The bar's last state stays on the screen or in the log."""
        bar, self._bar, self._details = self._bar, None, None
        if bar is None:
            return
        line = bar.text(bar.marks[-1][0])
        if self._live is not None:
            self._console.print(line, markup=False, style="dim")
        elif line != self._last_line:
            self._print(line)

    def _write_lines(self) -> None:
        while not self._closed.wait(min(1.0, self._every_s)):
            with self._lock:
                now = time.monotonic()
                if self._bar is None or now - self._last_at < self._every_s:
                    continue
                self._print(" · ".join([self._bar.text(now), *(self._details(now) if self._details else [])]))

    def _print(self, line: str) -> None:
        self._last_line, self._last_at = line, time.monotonic()
        print(line, file=self._console.file, flush=True)

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # Without our lock: rich draws under its own, and a thread that holds ours waits for that one when it prints.
        bar, details = self._bar, self._details
        if bar is None:
            return Text("")
        now = time.monotonic()
        left = bar.left_s()
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(bar.name, style="bold"),
            ProgressBar(total=bar.total or None, completed=bar.done, width=max(10, min(40, self._console.width - 60))),
            Text(f"{bar.done:,}/{bar.total:,}"),
            Text(duration(now - bar.began), style="dim"),
            Text("" if left is None else f"{duration(left)} left", style="cyan"),
        )
        below = [Text("  " + line, style="dim", no_wrap=True, overflow="ellipsis") for line in (details or _none)(now)]
        return Group(row, *below)


def _none(now: float) -> list[str]:
    return []


class RunWatch:
    """The loop's progress (a `train.progress.Watch`): a bar of steps, or of teacher tokens where those decide when the
    run ends; below it the running phases, the teacher, and the pace of the last step."""

    def __init__(self, screen: Screen, name: str, config: Config):
        self._screen, self._name, self._config = screen, name, config
        self._teacher: Teacher | None = None
        self._running: dict[str, float] = {}  # phase → when it began
        self._step = 0
        self._metrics: Mapping[str, float] = {}
        self._at_audit = (0.0, 0)  # when the audit began, continuations that had arrived

    def begin(self, teacher: Teacher, finished: int) -> None:
        self._teacher, self._step = teacher, finished
        if not self._config.train.max_teacher_tokens:
            self._screen(self._name, finished, self._config.train.steps)
        else:
            self._screen(self._name, 0, self._config.train.max_teacher_tokens)
        self._screen.detail(self.lines)

    def phase(self, name: str, is_running: bool) -> None:
        running = dict(self._running)  # a new one: the drawing thread may be reading the old
        if is_running:
            running[name] = time.monotonic()
        else:
            running.pop(name, None)
        self._running = running

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> None:
        self._step, self._metrics = step, metrics
        train = self._config.train
        if train.max_teacher_tokens:
            done = min(int(metrics.get("teacher/total_tokens", 0)), train.max_teacher_tokens)
            self._screen(self._name, done, train.max_teacher_tokens)
        else:
            self._screen(self._name, step, train.steps)

    def lines(self, now: float) -> list[str]:
        """What stands below the bar."""
        running = self._running
        phases = " + ".join(f"{name} {now - began:.1f} s" for name, began in running.items())
        activity = getattr(self._teacher, "activity", None)  # of teachers behind an API
        is_over = self._step >= self._config.train.steps
        lines = [phases if is_over else f"step {self._step + 1}: {phases}"] if phases else []
        if isinstance(activity, Activity):
            audit_s = now - running["audit"] if "audit" in running else 0.0
            lines.append(teacher_line(activity, self._config.teacher.max_dollars, audit_s))
        if self._metrics:
            lines.append(pace_line(self._metrics, self._config.rollout.batch_size))
        return lines


def teacher_line(activity: Activity, max_dollars: float, audit_s: float) -> str:
    """A teacher behind an API: "teacher 312 of 640 continuations (26.0/s), 32 in flight, 3 failed, $0.12 of $20"."""
    parts = []
    if activity.wanted:
        rate = f" ({activity.arrived / audit_s:.1f}/s)" if audit_s >= 1 else ""
        parts.append(f"{activity.arrived:,} of {activity.wanted:,} continuations{rate}")
    parts += [f"{activity.in_flight} in flight", f"{activity.failed:,} failed", f"{activity.spent.calls:,} calls"]
    if activity.spent.dollars or max_dollars:
        parts.append(f"${activity.spent.dollars:,.2f}" + (f" of ${max_dollars:,.2f}" if max_dollars else ""))
    return "teacher " + ", ".join(parts)


def pace_line(metrics: Mapping[str, float], batch_size: int) -> str:
    """The last step's seconds by phase, and how fast student and teacher wrote."""
    seconds = {
        name.removeprefix("time/").removesuffix("_s"): value
        for name, value in metrics.items()
        if name.startswith("time/") and value
    }
    step_s = seconds.pop("step", 0.0)
    parts = [f"last step {step_s:.1f} s"] + [f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05]
    if sample_s := metrics.get("time/sample_s"):
        parts.append(f"student {metrics.get('rollout/tokens', 0) * batch_size / sample_s:,.0f} tokens/s")
    if audit_s := metrics.get("time/audit_s"):
        parts.append(f"teacher {metrics.get('teacher/completion_tokens', 0) / audit_s:,.0f} tokens/s")
        if metrics.get("teacher/dollars"):
            parts.append(f"{metrics.get('teacher/calls', 0) / audit_s:,.1f} calls/s")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """ "8 s", "1:05 min", "2:03 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"
