"""What a judge says of one response."""

from __future__ import annotations

import dataclasses

PASSED = "passed"
NO_ANSWER = "no answer"  # nothing that could be judged: no marked answer, no program


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Right or not, and why."""

    passed: bool
    reason: str  # PASSED, NO_ANSWER, or what went wrong, in a few words

    def __bool__(self) -> bool:
        return self.passed
