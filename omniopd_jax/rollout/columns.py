"""Columns of a key/value cache: more of them, and prompts put into rows whose response has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from omniopd_jax.models import KVCache
from omniopd_jax.types import Array

TILE = 128  # an array whose last axis is a multiple of it is stored on a TPU as the decoding loop wants it


def roomy(columns: int) -> int:
    """At least so many columns: of long caches a multiple of a TPU's tile.

    Of any other number a TPU stores keys in another order between programs, and every decoding loop begins and ends
    with a copy of the whole cache, which has to fit beside it. Short caches stay as they are: nothing is gained there.
    """
    return columns if columns < 4 * TILE else -(-columns // TILE) * TILE


def widen(cache: KVCache, columns: int) -> KVCache:
    """The same cache with room for more columns."""
    spare = columns - cache.mask_BxS.shape[1]

    def pad(array, axis):
        return jnp.pad(array, [(0, spare if i == axis else 0) for i in range(array.ndim)])

    return _along_columns(pad, cache)


def replace_rows(cache: KVCache, new: KVCache, source_B: Array, is_replaced_B: Array) -> KVCache:
    """Puts freshly read prompts into rows of a cache, in the columns before `cache.length`.

    Columns are a ring: which tokens a query sees is decided by the mask and by positions, not by their order, so the
    prompt may wrap around, and what the row's former owner wrote is masked until it is overwritten.

    Args:
      cache: S columns.
      new: P ≤ S columns, all filled.
      source_B: int32, the row of `new` that a replaced row gets.
      is_replaced_B: bool.
    """
    shift = cache.length - new.mask_BxS.shape[1]
    new = _along_columns(lambda array, axis: jnp.roll(array, shift, axis), widen(new, cache.mask_BxS.shape[1]))

    def choose(old, fresh):
        is_replaced = is_replaced_B.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(is_replaced, jnp.take(fresh, source_B, axis=0), old)

    chosen = jax.tree.map(choose, dataclasses.replace(cache, length=()), dataclasses.replace(new, length=()))
    return dataclasses.replace(chosen, length=cache.length)


def _along_columns(change: Callable[[Array, int], Array], cache: KVCache) -> KVCache:
    """Applies a change to every array of the cache that has columns, naming their axis."""
    return dataclasses.replace(
        cache,
        k=tuple(change(layer, 3) for layer in cache.k),
        v=tuple(change(layer, 2) for layer in cache.v),
        mask_BxS=change(cache.mask_BxS, 1),
        position_BxS=change(cache.position_BxS, 1),
    )
