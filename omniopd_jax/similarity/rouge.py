"""ROUGE: how many words two texts share, whatever the order (rouge1) or in order (rouge_l).

Words are runs of letters and digits in lower case, and every other sign is a word of its own: in mathematics `+` says
as much as a word does. (Google's rouge_score drops signs and everything that is not ASCII.) A sign of a script
without spaces is a word of its own too.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from omniopd_jax.quiet import tensorflow, without_banners

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Thai, kana, Han
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """The unigrams of a text."""
    return _WORD.findall(text.lower())


def rouge1(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """F1 of unigram counts: 2 · shared / (words of a + words of b). Two texts without words are the same.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), with the F-measure.
    """
    return np.array([_unigram_f1(words(a), words(b)) for a, b in zip(texts_a, texts_b, strict=True)], np.float32)


def _unigram_f1(a: Sequence[str], b: Sequence[str]) -> float:
    if not a and not b:
        return 1.0
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def rouge_l(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """F1 of the longest common subsequence of words, by tensorflow-text. Two texts without words are the same.

    Raises:
      ImportError: tensorflow-text is not installed; says how to get it.
    """
    if not texts_a:
        return np.zeros(0, np.float32)
    tf, tf_text = _tensorflow()
    # As bytes: TensorFlow refuses lone surrogates, which a text may hold.
    words_a, words_b = (
        [[word.encode("utf-8", "surrogatepass") for word in words(text)] for text in texts]
        for texts in (texts_a, texts_b)
    )
    score = tf_text.metrics.rouge_l(
        tf.ragged.constant(words_a, dtype=tf.string, ragged_rank=1),
        tf.ragged.constant(words_b, dtype=tf.string, ragged_rank=1),
        alpha=0.5,
    )
    neither = np.array([not a and not b for a, b in zip(words_a, words_b, strict=True)])
    return np.where(neither, 1.0, np.nan_to_num(score.f_measure.numpy())).astype(np.float32)


@functools.cache
def _tensorflow():
    """(tensorflow, tensorflow_text), quiet and off the accelerator: that belongs to jax."""
    try:
        tf = tensorflow()
        with without_banners():
            import tensorflow_text as tf_text
    except ImportError as error:
        raise ImportError(
            f"similarity 'rouge_l' needs tensorflow-text: pip install 'omniopd_jax[tf]' ({error})."
        ) from error
    return tf, tf_text
