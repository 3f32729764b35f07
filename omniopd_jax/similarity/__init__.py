"""How alike two texts are: two equally long lists of texts → float32 scores in [0, 1], 1 for equal texts.

    similarity = get_similarity("edit^4")
    scores = similarity(["a cat"], ["a hat"])

All are symmetric. `^p` raises the scores to a power, which sharpens (p > 1) or flattens (p < 1) them and keeps 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from omniopd_jax.similarity.edit import edit, edit_words
from omniopd_jax.similarity.embedding import EmbeddingSimilarity
from omniopd_jax.similarity.exact import exact
from omniopd_jax.similarity.rouge import rouge1, rouge_l

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]

_PLAIN: dict[str, Similarity] = {
    "edit": edit,
    "edit_words": edit_words,
    "exact": exact,
    "rouge1": rouge1,
    "rouge_l": rouge_l,
}
NAMES = (*_PLAIN, "embedding")


def get_similarity(name: str, *, embedding_model: str = "") -> Similarity:
    """The similarity of that name.

    Args:
      name: one of NAMES, with "^p" for a power p > 0: "edit^4".
      embedding_model: folder or hub name, for "embedding" alone; "": a packaged one.

    Raises:
      ValueError: no such name, or a power that is not a positive number.
      ImportError: what the similarity needs is not installed; says how to get it.
    """
    kind, caret, power = name.partition("^")
    if kind not in NAMES:
        raise ValueError(f"similarity {name!r} is none of {', '.join(NAMES)}, with ^p for a power.")
    exponent = _exponent(name, power) if caret else 1.0
    plain = EmbeddingSimilarity(embedding_model) if kind == "embedding" else _PLAIN[kind]

    def similarity(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
        if len(texts_a) != len(texts_b):
            raise ValueError(f"two equally long lists of texts are compared, got {len(texts_a)} and {len(texts_b)}.")
        scores = np.asarray(plain(texts_a, texts_b), np.float32)
        return scores if exponent == 1.0 else scores**exponent

    return similarity


def _exponent(name: str, power: str) -> float:
    try:
        exponent = float(power)
    except ValueError:
        exponent = 0.0
    if not 0.0 < exponent < float("inf"):
        raise ValueError(f"similarity {name!r}: the power after ^ must be a positive number, got {power!r}.")
    return exponent
