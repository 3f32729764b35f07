"""Named random streams: every stream has a name and is used once.

A stream is a function of (seed, step, purpose) alone, so a resumed run draws what the uninterrupted one would have
drawn, and adding a stream changes none of the others.
"""

from __future__ import annotations

import hashlib

import jax

from omniopd_jax.types import Array


def named_key(seed: int, step: int, purpose: str) -> jax.Array:
    """A typed key for one purpose at one step.

    Args:
      seed: the run's seed (`train.seed`).
      step: the optimizer step that the stream belongs to, or 0 for set-up.
      purpose: the stream's name, e.g. "rollout", "branches", "positions".
    """
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), name), step)


def row_keys(key: jax.Array, sample_index_B: Array) -> jax.Array:
    """One key a row, by the row's own number: a row's draws do not depend on its neighbours in the batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(sample_index_B)


def stable_seed(*parts: object) -> int:
    """A 31-bit seed from any printable parts, the same in every process (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
