"""The output head of a decoding loop, in tiles: what a few rows' logits are computed from on a CPU.

A product of a few rows with a head that lies as D×V reads D rows that lie V floats apart, for a few columns at a time.
Tiles of 64 columns lie in one piece each; their product takes about half as long (docs/benchmarks.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omniopd_jax.types import Array

_TILE = 64  # columns; half and twice as many were slower
_GROUP = 32  # tiles of one product, for which the rows are repeated: bounds what that takes

# DxV, or its columns in order as groups of tiles, each JxDx64
Head = Array | tuple[Array, ...]


def in_tiles(head_DxV: Array) -> Head:
    """The same head in tiles; as it was where 64 does not divide V."""
    width, vocabulary = head_DxV.shape
    if vocabulary % _TILE:
        return head_DxV
    tiles_JxDxN = head_DxV.reshape(width, vocabulary // _TILE, _TILE).transpose(1, 0, 2)
    return tuple(tiles_JxDxN[start : start + _GROUP] for start in range(0, len(tiles_JxDxN), _GROUP))


def vocabulary_size(head: Head) -> int:
    """V."""
    return sum(len(group) * _TILE for group in head) if isinstance(head, tuple) else head.shape[1]


def logits(hidden_AxD: Array, head: Head) -> Array:
    """logits_AxV, float32; products in the hidden states' dtype, as `jnp.matmul(hidden_AxD, head_DxV)`."""
    if not isinstance(head, tuple):
        return jnp.matmul(hidden_AxD, head.astype(hidden_AxD.dtype), preferred_element_type=jnp.float32)
    return jnp.concatenate([_group_logits(hidden_AxD, group) for group in head], axis=1)


def _group_logits(hidden_AxD: Array, tiles_JxDxN: Array) -> Array:
    rows_JxAxD = jnp.broadcast_to(hidden_AxD, (len(tiles_JxDxN), *hidden_AxD.shape))
    tiles_JxDxN = tiles_JxDxN.astype(hidden_AxD.dtype)
    products = (((2,), (1,)), ((0,), (0,)))
    out_JxAxN = jax.lax.dot_general(rows_JxAxD, tiles_JxDxN, products, preferred_element_type=jnp.float32)
    return out_JxAxN.swapaxes(0, 1).reshape(len(hidden_AxD), -1)
