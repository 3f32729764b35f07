"""Similarity of texts: all pairs of a step in one call over the cores, or one pair a call."""

from __future__ import annotations

import time

import numpy as np

from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.similarity import get_similarity


def similarity(spec: Spec) -> Work:
    """`kind`: "batch" (as the loop does it) or "pairs" (one call a pair)."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in range(2, 10)]
    count = spec["batch"] * spec["chunks"] * spec["continuations"]
    texts = [" ".join(generator.choice(words, spec["chunk_tokens"])) for _ in range(2 * count)]
    left, right = texts[:count], texts[count:]
    measure = get_similarity(spec["name"])

    def run() -> dict[str, float]:
        began = time.perf_counter()
        if spec["kind"] == "batch":
            measure(left, right)
        else:
            for a, b in zip(left, right, strict=True):
                measure([a], [b])
        return {"tokens": count * spec["chunk_tokens"], "pairs_per_s": count / (time.perf_counter() - began)}

    return Work(run)
