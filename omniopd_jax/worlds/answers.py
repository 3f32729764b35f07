"""Right or wrong, the same for every world: a solution ends with the word `answer` and the words of its answer."""

from __future__ import annotations


def is_correct(response: str, answer: str) -> bool:
    """Whether the words after the last `answer` are the reference answer, and nothing follows them.

    An answer of digits is compared as a number, digit words joined: leading zeros do not matter.
    """
    _, marker, tail = response.rpartition("answer")
    words = tail.split()
    if not marker or not words or any(len(word) != 1 for word in words):
        return False
    given = "".join(words)
    if answer.isascii() and answer.isdigit():
        return given.isascii() and given.isdigit() and int(given) == int(answer)
    return given == answer
