"""Who is told how a run goes while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from omniopd_jax.teacher.protocol import Teacher

Progress = Callable[[int, Mapping[str, float]], None]  # (finished steps, metrics of the last one)


@runtime_checkable
class Watch(Protocol):
    """A progress that also wants to know what a step is doing. Every method returns at once.

    Phases may overlap, and may begin and end on other threads than the loop's.
    """

    def begin(self, teacher: Teacher, finished: int) -> None:
        """The run starts, or goes on after `finished` steps."""
        ...

    def phase(self, name: str, is_running: bool) -> None:
        """A phase (sample, score, audit, update, evaluate, checkpoint, export) began or ended."""
        ...

    def __call__(self, step: int, metrics: Mapping[str, float], /) -> None:
        """A step is finished."""
        ...
