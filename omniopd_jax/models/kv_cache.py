"""Keys and values of tokens already read: one cache a batch, and short local caches for branches off it.

One array a layer, keys [B, K, E, columns] and values [B, K, columns, E]: a step writes one column in place (in a
`lax.while_loop` the carry's buffers are reused), and no other layer's keys are touched or copied.
"""

from __future__ import annotations

from flax import struct

from omniopd_jax.types import Array


@struct.dataclass
class KVCache:
    """What decoding needs of the tokens before. Columns [0, length) are filled."""

    k: tuple[Array, ...]  # L arrays [B, K, E, S_max], compute dtype
    v: tuple[Array, ...]  # L arrays [B, K, S_max, E]
    mask_BxS: Array  # bool, True on columns that hold a real token
    position_BxS: Array  # int32, real tokens before this column
    num_real_B: Array  # int32, real tokens so far: the next one's position
    length: Array  # int32 scalar, the column that the next token is written to; the caller keeps it below S_max


@struct.dataclass
class BranchCache:
    """R branches of C columns a row, over one trunk cache that they share and do not change."""

    trunk: KVCache
    sees_trunk_BxRxS: Array  # bool, real trunk columns before the branch's start
    start_position_BxR: Array  # int32, position of a branch's first token
    k: tuple[Array, ...]  # L arrays [B, R, K, E, C]
    v: tuple[Array, ...]  # L arrays [B, R, K, C, E]
    length: Array  # int32 scalar, tokens that every branch has so far
