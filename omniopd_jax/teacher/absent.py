"""No teacher, for arms that learn without one."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd_jax.teacher.protocol import ContinuationRequest, ContinuationResult, TeacherStopped


class AbsentTeacher:
    """Stands where a teacher would; nobody asks it anything."""

    name = "none"

    def probe(self) -> str:
        return "There is no teacher: this arm learns without one."

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        """Raises:
        TeacherStopped: always.
        """
        raise TeacherStopped(f"{len(requests)} continuations were asked for, but this run has no teacher.")

    def close(self) -> None:
        """Nothing is held."""
