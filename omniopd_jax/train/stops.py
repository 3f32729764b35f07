"""Why a run ends early: one exception a reason, each with its exit code, and the signals that ask for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import numpy as np

from omniopd_jax.config import ConfigError


class RunStopped(RuntimeError):
    """The run ended before its last step; a main prints the message and exits with `exit_code`."""

    exit_code = 1


class NotFinite(RunStopped):
    """NaN or inf in a term of step `step`; the state before it is in the last checkpoint."""

    exit_code = 5

    def __init__(self, step: int, term: str):
        super().__init__(
            f"Step {step}: {term} is not finite, so the step was withheld; the checkpoint holds the state before it."
        )
        self.step = step
        self.term = term


class CheckpointError(RunStopped):
    """A checkpoint cannot be written, or none of those found can be read."""

    exit_code = 6


class WorkdirError(ConfigError):
    """The work directory belongs to another config, or cannot be written."""


SIGNALLED = 128  # exit codes above this: a signal


class Interrupted(RunStopped):
    """Ctrl-C (exit code 130) or SIGTERM (143)."""

    def __init__(self, signal_number: int):
        name = signal.Signals(signal_number).name
        super().__init__(f"Stopped by {name}; the finished steps are in the checkpoint.")
        self.exit_code = SIGNALLED + signal_number


class Interrupts:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between phases.

    The first signal sets the flag, or ends a phase marked `abandonable` at once (one that waits on the host and has
    changed nothing yet). A second Ctrl-C raises KeyboardInterrupt wherever the program stands. Outside the main
    thread Python delivers no signals, so nothing is installed there.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_abandonable = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._received is not None:
            raise Interrupted(self._received)

    @contextmanager
    def installed(self) -> Iterator[Interrupts]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once instead of waiting for the phase to end."""
        self.check()
        self._is_abandonable = True
        try:
            yield
        except Exception:
            self.check()  # the signal met code that turns any exception into its own
            raise
        finally:
            self._is_abandonable = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        if self._is_abandonable:
            raise Interrupted(number)


def check_finite(step: int, terms: Mapping[str, np.ndarray], *, is_finite: bool = True) -> None:
    """Raises NotFinite, naming the first of `terms` that holds NaN or inf."""
    for name, value in terms.items():
        if not np.isfinite(value).all():
            raise NotFinite(step, name)
    if not is_finite:
        raise NotFinite(step, "the loss")
