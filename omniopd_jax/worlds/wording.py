"""The wording of solutions: its words, and how varied it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def fixed_words(phrasings: Iterable[str]) -> list[str]:
    """The words of phrasings, sorted; what stands in braces is filled in later and is none."""
    return sorted({word for phrasing in phrasings for word in re.sub(r"\{\w+\}", " ", phrasing).split()})


def phrasing_counts(responses: Iterable[str], marks: Sequence[str]) -> np.ndarray:
    """How often each phrasing was used, int64 [len(marks)], over all steps of all responses."""
    counts = Counter(word for response in responses for word in response.split())
    return np.array([counts[mark] for mark in marks], np.int64)


def phrasing_variety(responses: Iterable[str], marks: Sequence[str]) -> float:
    """The effective number of phrasings in use: exp of the entropy of their shares, 1 to len(marks); 0 for no step."""
    counts = phrasing_counts(responses, marks)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
