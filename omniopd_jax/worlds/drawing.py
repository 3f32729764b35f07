"""Problems at random, none of them twice: the same for every world."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

_Problem = TypeVar("_Problem", bound=Hashable)


def distinct(
    draw: Callable[[], Iterable[_Problem]], count: int, *, exist: int, what: str, exclude: Iterable[_Problem] = ()
) -> list[_Problem]:
    """`count` problems, each different from the others and from those in `exclude`.

    Args:
      draw: problems at random, some of which may be equal; called again until there are enough.
      exist: how many different ones there are.
      what: their name for a message, "words of 3 letters".

    Raises:
      ValueError: fewer problems than `count` exist.
    """
    seen = set(exclude)
    if count > exist - len(seen):
        raise ValueError(f"{count} {what} are not to be had: {exist} exist.")
    chosen: list[_Problem] = []
    while len(chosen) < count:
        for problem in draw():
            if problem not in seen and len(chosen) < count:
                seen.add(problem)
                chosen.append(problem)
    return chosen
