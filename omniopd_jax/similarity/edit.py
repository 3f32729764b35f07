"""Normalised Levenshtein similarity: 1 − d(a, b) / max(len a, len b), the paper's φ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

_FEW = 64  # pairs below which threads cost more than they bring


def edit(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """Over characters (code points). Two empty texts are the same."""
    return _similarity(texts_a, texts_b)


def edit_words(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """Over words separated by white space, so that a long word weighs no more than a short one."""
    numbers: dict[str, int] = {}

    def words(text: str) -> list[int]:
        return [numbers.setdefault(word, len(numbers)) for word in text.split()]

    return _similarity([words(text) for text in texts_a], [words(text) for text in texts_b])


def _similarity(a: Sequence[Sequence[int] | str], b: Sequence[Sequence[int] | str]) -> np.ndarray:
    if not a:
        return np.zeros(0, np.float32)
    return process.cpdist(
        a, b, scorer=Levenshtein.normalized_similarity, workers=-1 if len(a) > _FEW else 1, dtype=np.float32
    )
