"""Small worlds: generated problems with written-out solutions, a dial for wording and dials for mistakes.

`get_world(kind)` gives one. A world is a module with the names of `World`; what worlds share lies in `answers` (right
or wrong), `drawing` (problems at random), `wording` and `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from omniopd_jax.types import InputError, Prompt
from omniopd_jax.worlds import arithmetic, rewriting


class Problem(Protocol):
    """One task; hashable, so that a set of them finds repeats."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...

    def prompt(self, prompt_id: str) -> Prompt: ...


class World(Protocol):
    """What a module of this room offers."""

    @property
    def MARKS(self) -> tuple[str, ...]:
        """One word a phrasing, found in no other: tells which phrasing a step has."""
        ...

    def vocabulary(self) -> list[str]:
        """Every word, the special ones of `tokenizers` first."""
        ...

    def num_problems(self, size: int) -> int:
        """How many different problems of this size there are."""
        ...

    def problems(self, rng: np.random.Generator, count: int, size: int, *, exclude: Iterable[Any] = ()) -> list[Any]:
        """Distinct problems, none of them in `exclude`."""
        ...

    def solution(
        self, problem: Any, rng: np.random.Generator, *, phrasings: int, misconception: float = 0.0, slip: float = 0.0
    ) -> str:
        """One written-out solution, without its stop token."""
        ...

    def save_tokenizer(self, path: str, kind: str = "words") -> None:
        """Writes a tokenizer of the world to a folder; `kind` is one of `tokenizers.KINDS`."""
        ...


WORLDS: dict[str, World] = {"arithmetic": arithmetic, "rewriting": rewriting}


def get_world(kind: str) -> World:
    """Raises InputError for a kind that is not there."""
    if kind not in WORLDS:
        raise InputError(f"There is no world {kind!r}; there are {', '.join(map(repr, WORLDS))}.")
    return WORLDS[kind]


def rows(problems: Iterable[Problem], prefix: str) -> list[dict[str, str]]:
    """Data rows in the layout that `data.prompts` reads."""
    return [
        {"id": f"{prefix}-{i}", "prompt": problem.question, "answer": problem.answer}
        for i, problem in enumerate(problems)
    ]
