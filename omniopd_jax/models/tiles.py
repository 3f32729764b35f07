"""Matrices in tiles of columns: what a few rows are multiplied with in a decoding loop on a CPU.

A product of a few rows with a matrix that lies as D×N reads D rows that lie N floats apart, for a few columns at a
time. Tiles of 64 columns lie in one piece each; their product takes about half as long (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from omniopd_jax.types import Array

_WIDTH = 64  # columns of a tile; half and twice as many were slower
_GROUP = 32  # tiles of one product, for which the rows are repeated: bounds what that takes


@struct.dataclass
class Tiles:
    """A matrix DxN. Groups hold its columns in order, each as J tiles JxDxW; the last may be one narrow tile."""

    groups: tuple[Array, ...]


Matrix = Array | Tiles  # DxN


def in_tiles(matrix_DxN: Array) -> Tiles:
    """The same matrix in tiles."""
    depth, columns = matrix_DxN.shape
    whole = columns - columns % _WIDTH
    tiles_JxDxW = matrix_DxN[:, :whole].reshape(depth, -1, _WIDTH).transpose(1, 0, 2)
    groups = [tiles_JxDxW[start : start + _GROUP] for start in range(0, len(tiles_JxDxW), _GROUP)]
    rest = [matrix_DxN[None, :, whole:]] if whole < columns else []
    return Tiles(groups=(*groups, *rest))


def num_columns(matrix: Matrix) -> int:
    """N."""
    if isinstance(matrix, Tiles):
        return sum(group.shape[0] * group.shape[2] for group in matrix.groups)
    return matrix.shape[1]


def product(rows_AxD: Array, matrix: Matrix, dtype: Any = None) -> Array:
    """rows · matrix, AxN. Products in the rows' dtype; summed and returned in `dtype`, None: the rows'."""
    if not isinstance(matrix, Tiles):
        return jnp.matmul(rows_AxD, matrix.astype(rows_AxD.dtype), preferred_element_type=dtype)
    return jnp.concatenate([_group_product(rows_AxD, group, dtype) for group in matrix.groups], axis=1)


def _group_product(rows_AxD: Array, tiles_JxDxW: Array, dtype: Any) -> Array:
    rows_JxAxD = jnp.broadcast_to(rows_AxD, (len(tiles_JxDxW), *rows_AxD.shape))
    tiles_JxDxW = tiles_JxDxW.astype(rows_AxD.dtype)
    products = (((2,), (1,)), ((0,), (0,)))
    out_JxAxW = jax.lax.dot_general(rows_JxAxD, tiles_JxDxW, products, preferred_element_type=dtype)
    return out_JxAxW.swapaxes(0, 1).reshape(len(rows_AxD), -1)
