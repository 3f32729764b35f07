"""1 where two texts are the same, else 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """White space at either end does not count."""
    return np.array([a.strip() == b.strip() for a, b in zip(texts_a, texts_b, strict=True)], np.float32)
