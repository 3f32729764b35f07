"""A small world of symbolic rewriting: a word of letters is rewritten from the left until one letter is left.

A problem is ``d a f b``. The rule table says what a pair of letters becomes; it is fixed, and order matters in it. A
solution rewrites the first two letters again and again, each step in one of several phrasings chosen at random, and
ends with the letter that is left:

    rewrite d a to c : c f b ; c f becomes b leaving b b ; rule b b is f so f ; answer f

A text *with a misconception* takes a pair that stands in falling order as if it were sorted (``d a`` as ``a d``) with
some probability and goes on consistently from there; a *slip* writes the next letter, or the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from omniopd_jax.types import Message, Prompt
from omniopd_jax.worlds import drawing, tokenizers, wording

LETTERS = "abcdefg"
PHRASINGS = (
    "rewrite {x} {y} to {z} : {rest} ;",
    "{x} {y} becomes {z} leaving {rest} ;",
    "rule {x} {y} is {z} so {rest} ;",
)
MARKS = ("rewrite", "becomes", "rule")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A word, as places in LETTERS."""

    word: tuple[int, ...]

    @property
    def question(self) -> str:
        return _spelled(self.word)

    @property
    def answer(self) -> str:
        left = self.word[0]
        for right in self.word[1:]:
            left = rule(left, right)
        return LETTERS[left]

    def prompt(self, prompt_id: str) -> Prompt:
        return Prompt(id=prompt_id, messages=(Message("user", self.question),), answer=self.answer)


def rule(left: int, right: int) -> int:
    """What a pair becomes: 2·left + 3·right + 1 modulo 7. A wrong letter on either side gives a wrong result."""
    return (2 * left + 3 * right + 1) % len(LETTERS)


def num_problems(size: int) -> int:
    """How many words of `size` letters there are."""
    return len(LETTERS) ** size


def problems(rng: np.random.Generator, count: int, size: int, *, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Distinct words of `size` letters, none of them in `exclude`.

    Raises:
      ValueError: fewer words than `count` exist.
    """

    def draw() -> list[Problem]:
        return [Problem(tuple(word)) for word in rng.integers(0, len(LETTERS), size=(count, size)).tolist()]

    what = f"words of {size} letters"
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
      problem: what is rewritten.
      rng: source of wording and mistakes.
      phrasings: how many of PHRASINGS are in use, 1 for a world without forks of wording.
      misconception: probability that a pair in falling order is taken as sorted.
      slip: probability that a result comes out one letter off.
    """
    steps = []
    word = list(problem.word)
    while len(word) > 1:
        x, y, *others = word
        is_mistaken = x > y and rng.random() < misconception
        z = rule(y, x) if is_mistaken else rule(x, y)
        if rng.random() < slip:
            z = (z + (1 if rng.random() < 0.5 else -1)) % len(LETTERS)
        word = [z, *others]
        phrasing = PHRASINGS[rng.integers(phrasings)]
        steps.append(phrasing.format(x=LETTERS[x], y=LETTERS[y], z=LETTERS[z], rest=_spelled(word)))
    return " ".join([*steps, "answer", LETTERS[word[0]]])


def vocabulary() -> list[str]:
    """Every word of the world, the special ones first."""
    return [*tokenizers.SPECIAL, *LETTERS, "=", "answer", *wording.fixed_words(PHRASINGS)]


def save_tokenizer(path: str, kind: str = "words") -> None:
    """Writes a tokenizer of the world to a folder; `kind` is one of `tokenizers.KINDS`."""
    tokenizers.save_tokenizer(path, vocabulary(), kind)


def _spelled(word: Iterable[int]) -> str:
    return " ".join(LETTERS[letter] for letter in word)
