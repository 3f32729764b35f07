"""Columns of a key/value cache: how many there are, and prompts put into rows whose response has ended."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from omniopd_jax.models import KVCache
from omniopd_jax.types import Array

FIRST_SEGMENT = 256  # response tokens that the cache has room for at first
TILE = 128  # an array whose last axis is a multiple of it is stored on a TPU as the decoding loop wants it


def segments(max_new_tokens: int) -> tuple[int, ...]:
    """Response lengths at which the cache grows: doubling, so that a short response never pays for the longest.

    A step attends to every column of the cache, written or not, and a long cache takes its memory from the start.
    """
    lengths = [FIRST_SEGMENT]
    while lengths[-1] < max_new_tokens:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], max_new_tokens)


def roomy(columns: int) -> int:
    """At least so many columns: of long caches a multiple of a TPU's tile.

    Of any other number a TPU stores keys in another order between programs, and every decoding loop begins and ends
    with a copy of the whole cache, which has to fit beside it. Short caches stay as they are: nothing is gained there.
    """
    return columns if columns < 4 * TILE else -(-columns // TILE) * TILE


def cache_sizes(width: int, max_new_tokens: int) -> tuple[int, ...]:
    """Columns of a cache for prompts of `width`, one size a segment; the last have room for whole responses.

    The last token drawn is never read back, so it needs no column.
    """
    return tuple(roomy(width + tokens - 1) for tokens in segments(max_new_tokens))


def widen(cache: KVCache, columns: int) -> KVCache:
    """The same cache with room for more columns."""
    spare = columns - cache.mask_BxS.shape[1]

    def pad(array, axis):
        return jnp.pad(array, [(0, spare if i == axis else 0) for i in range(array.ndim)])

    return _along_columns(pad, cache)


def resized(cache: KVCache, columns: int) -> KVCache:
    """The ring (see `replace_rows`) with another number of columns: those written last, as many as have room.

    One array after the other, each given up for its successor: two caches never lie side by side.
    """
    kept = min(columns, cache.mask_BxS.shape[1])
    length = cache.length

    def resize(array: Array, axis: int) -> Array:
        new = _resized(array, length, columns=columns, axis=axis)
        array.delete()
        return new

    return dataclasses.replace(_along_columns(resize, cache), length=jnp.full_like(length, kept))


@functools.partial(jax.jit, static_argnames=("columns", "axis"))
def _resized(array: Array, length: Array, *, columns: int, axis: int) -> Array:
    """The last columns before `length`, oldest first, then nothing."""
    before = array.shape[axis]
    number = jnp.arange(columns)
    kept = min(columns, before)
    place = jnp.where(number < kept, (length - kept + number) % before, before)
    return jnp.take(array, place, axis=axis, mode="fill", fill_value=0)


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
