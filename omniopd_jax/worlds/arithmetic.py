"""A small world of written-out column addition, with a dial for wording and two for mistakes.

A problem is ``4 7 8 + 2 5 6``. A solution adds the columns from the right, each in one of several phrasings chosen at
random, and ends with the answer:

    add 8 and 6 with 0 gives 1 4 ; 7 plus 5 plus 1 makes 1 3 ; column 4 2 carry 1 sum 0 7 ; answer 7 3 4

The phrasing of a step says nothing about whether it is right, so half of the high-entropy tokens are forks of wording
and half are forks of reasoning. A text *with a misconception* forgets a carry with some probability (it writes 0 where
a 1 came over) and goes on consistently from there; a *slip* writes a sum's last digit off by one.

Everything is a function of a seed. The tokenizer is a real one (word level, saved as tokenizer.json).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from omniopd_jax.types import Message, Prompt

PHRASINGS = (
    "add {a} and {b} with {c} gives {tens} {ones} ;",
    "{a} plus {b} plus {c} makes {tens} {ones} ;",
    "column {a} {b} carry {c} sum {tens} {ones} ;",
)
# What tells a step's phrasing: the word before its result.
_MARKS = ("gives", "makes", "sum")

PAD, STOP, UNKNOWN = "<pad>", "<eos>", "<unk>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] + ' = ' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)


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


def problems(rng: np.random.Generator, count: int, digits: int, *, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Distinct problems, none of them in `exclude`.

    Raises:
      ValueError: fewer problems than `count` exist.
    """
    seen = set(exclude)
    if count > 10 ** (2 * digits) - len(seen):
        raise ValueError(f"{count} problems of {digits} digits are not to be had: {10 ** (2 * digits)} exist.")
    chosen: list[Problem] = []
    while len(chosen) < count:
        for left, right in rng.integers(0, 10**digits, size=(count, 2)).tolist():
            problem = Problem(left, right, digits)
            if problem not in seen and len(chosen) < count:
                seen.add(problem)
                chosen.append(problem)
    return chosen


def solution(
    problem: Problem,
    rng: np.random.Generator,
    *,
    phrasings: int = len(PHRASINGS),
    forget_carry: float = 0.0,
    slip: float = 0.0,
) -> str:
    """One written-out solution, without its stop token.

    Args:
      problem: what is added.
      rng: source of wording and mistakes.
      phrasings: how many of PHRASINGS are in use, 1 for a world without forks of wording.
      forget_carry: probability that a carry of 1 is taken as 0.
      slip: probability that a column's last digit comes out off by one.
    """
    words, written, carry = [], [], 0
    for column in range(problem.digits):
        a, b = (number // 10**column % 10 for number in (problem.left, problem.right))
        if carry and rng.random() < forget_carry:
            carry = 0
        tens, ones = divmod(a + b + carry, 10)
        if rng.random() < slip:
            ones = (ones + (1 if rng.random() < 0.5 else -1)) % 10
        words.append(PHRASINGS[rng.integers(phrasings)].format(a=a, b=b, c=carry, tens=tens, ones=ones))
        written.append(ones)
        carry = tens
    if carry and rng.random() < forget_carry:
        carry = 0
    digits = ([1] if carry else []) + written[::-1]
    return " ".join([*words, "answer", *map(str, digits)])


def is_correct(response: str, answer: str) -> bool:
    """Whether the digits after the last `answer` are the number; leading zeros do not matter."""
    _, marker, tail = response.rpartition("answer")
    match = re.fullmatch(r"\s*(\d(?: \d)*)\s*", tail)
    return bool(marker) and match is not None and int(match[1].replace(" ", "")) == int(answer)


def phrasing_counts(responses: Iterable[str]) -> np.ndarray:
    """How often each phrasing was used, int64 [len(PHRASINGS)], over all steps of all responses."""
    counts = Counter(word for response in responses for word in response.split())
    return np.array([counts[mark] for mark in _MARKS], np.int64)


def phrasing_variety(responses: Iterable[str]) -> float:
    """The effective number of phrasings in use: exp of the entropy of their shares, 1 to len(PHRASINGS)."""
    counts = phrasing_counts(responses)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def vocabulary() -> list[str]:
    """Every word of the world, the special ones first."""
    words = {word for phrasing in PHRASINGS for word in re.sub(r"\{\w+\}", " ", phrasing).split()}
    return [PAD, STOP, UNKNOWN, *"0123456789", "+", "=", "answer", *sorted(words)]


def save_tokenizer(path: str) -> None:
    """Writes the world's tokenizer in HF layout: tokenizer.json, tokenizer_config.json with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(path)


def rows(selected: Sequence[Problem], prefix: str) -> list[dict[str, str]]:
    """Data rows in the layout that `data.prompts` reads."""
    return [
        {"id": f"{prefix}-{i}", "prompt": problem.question, "answer": problem.answer}
        for i, problem in enumerate(selected)
    ]


def _spaced(number: int, digits: int) -> str:
    return " ".join(str(number).zfill(digits))
