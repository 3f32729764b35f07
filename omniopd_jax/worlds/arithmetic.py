"""A small world of written-out column addition, with a dial for wording and two for mistakes.

A problem is ``4 7 8 + 2 5 6``. A solution adds the columns from the right, each in one of several phrasings chosen at
random, and ends with the answer:

    add 8 and 6 with 0 gives 1 4 ; 7 plus 5 plus 1 makes 1 3 ; column 4 2 carry 1 sum 0 7 ; answer 7 3 4

The phrasing of a step says nothing about whether it is right, so half of the high-entropy tokens are forks of wording
and half are forks of reasoning. A text *with a misconception* forgets a carry with some probability (it writes 0 where
a 1 came over) and goes on consistently from there; a *slip* writes a sum's last digit off by one.

Everything is a function of a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from omniopd_jax.types import Message, Prompt
from omniopd_jax.worlds import drawing, tokenizers, wording

PHRASINGS = (
    "add {a} and {b} with {c} gives {tens} {ones} ;",
    "{a} plus {b} plus {c} makes {tens} {ones} ;",
    "column {a} {b} carry {c} sum {tens} {ones} ;",
)
MARKS = ("gives", "makes", "sum")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One addition of two numbers with the same count of digits (leading zeros allowed)."""

    left: int
    right: int
    digits: int

    @property
    def question(self) -> str:
        return f"{_spaced(self.left, self.digits)} + {_spaced(self.right, self.digits)}"

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    def prompt(self, prompt_id: str) -> Prompt:
        return Prompt(id=prompt_id, messages=(Message("user", self.question),), answer=self.answer)


def num_problems(size: int) -> int:
    """How many additions of two numbers of `size` digits there are."""
    return 10 ** (2 * size)


def problems(rng: np.random.Generator, count: int, size: int, *, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Distinct problems of `size` digits a number, none of them in `exclude`.

    Raises:
      ValueError: fewer problems than `count` exist.
    """

    def draw() -> list[Problem]:
        return [Problem(left, right, size) for left, right in rng.integers(0, 10**size, size=(count, 2)).tolist()]

    what = f"problems of {size} digits"
    return drawing.distinct(draw, count, exist=num_problems(size), what=what, exclude=exclude)


def solution(
    problem: Problem,
    rng: np.random.Generator,
    *,
    phrasings: int = len(PHRASINGS),
    misconception: float = 0.0,
    slip: float = 0.0,
) -> str:
    """One written-out solution, without its stop token.

    Args:
      problem: what is added.
      rng: source of wording and mistakes.
      phrasings: how many of PHRASINGS are in use, 1 for a world without forks of wording.
      misconception: probability that a carry of 1 is taken as 0.
      slip: probability that a column's last digit comes out off by one.
    """
    words, written, carry = [], [], 0
    for column in range(problem.digits):
        a, b = (number // 10**column % 10 for number in (problem.left, problem.right))
        if carry and rng.random() < misconception:
            carry = 0
        tens, ones = divmod(a + b + carry, 10)
        if rng.random() < slip:
            ones = (ones + (1 if rng.random() < 0.5 else -1)) % 10
        words.append(PHRASINGS[rng.integers(phrasings)].format(a=a, b=b, c=carry, tens=tens, ones=ones))
        written.append(ones)
        carry = tens
    if carry and rng.random() < misconception:
        carry = 0
    digits = ([1] if carry else []) + written[::-1]
    return " ".join([*words, "answer", *map(str, digits)])


def vocabulary() -> list[str]:
    """Every word of the world, the special ones first."""
    return [*tokenizers.SPECIAL, *"0123456789", "+", "=", "answer", *wording.fixed_words(PHRASINGS)]


def save_tokenizer(path: str, kind: str = "words") -> None:
    """Writes a tokenizer of the world to a folder; `kind` is one of `tokenizers.KINDS`."""
    tokenizers.save_tokenizer(path, vocabulary(), kind)


def _spaced(number: int, digits: int) -> str:
    return " ".join(str(number).zfill(digits))
