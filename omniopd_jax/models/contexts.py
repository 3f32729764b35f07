"""The ways of reading tokens: who sees whom, and which keys are kept.

A layer computes queries, keys and values and hands them to a context; the same layer therefore serves whole sequences,
trees, and single steps over a cache. All contexts offer `attend(q, k, v, window, **options) → (out, kept)` with q, k
and v in the layout that the layer has them in, [B, tokens, heads, E].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from omniopd_jax.models.attention import attention, branch_attention, in_blocks
from omniopd_jax.models.kernels import Kernel, kernel_attention
from omniopd_jax.models.layout import BATCH, Layout
from omniopd_jax.types import Array


@struct.dataclass
class Keys:
    """The S tokens that may be seen."""

    mask_BxS: Array
    position_BxS: Array
    is_windowed: bool = struct.field(pytree_node=False)  # some layer has a window


QUERY_BLOCKS = (128, 1024)  # queries a row whose scores exist at once: at least, at most
MOST_SCORES = 2**28  # beyond which blocks have fewer queries: 1 GiB


def query_block(rows: int, heads: int, columns: int, layout: Layout | None = None) -> int:
    """Queries a row whose scores over so many columns exist at once, on one device."""
    least, most = QUERY_BLOCKS
    shares = 1 if layout is None else layout.shares(BATCH) * layout.shares("heads")
    fitting = MOST_SCORES * shares // (rows * heads * columns)
    return min(max(fitting // least, 1) * least, most)


def causal_attention(
    q_BxSxHxE: Array,
    k_BxKxExS: Array,
    v_BxKxSxE: Array,
    keys: Keys,
    window: Array | int,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> Array:
    """Each query sees the real keys at or before its column, fewer than `window` positions behind it."""
    column_S = jnp.arange(q_BxSxHxE.shape[1])

    def attend_some(queries: tuple[Array, ...]) -> Array:
        q, position, column = queries
        is_visible = keys.mask_BxS[:, None] & (column_S <= column[:, :, None])
        if keys.is_windowed:
            is_visible = is_visible & (position[:, :, None] - keys.position_BxS[:, None] < window)
        return attention(q, k_BxKxExS, v_BxKxSxE, is_visible, **options)

    block = query_block(q_BxSxHxE.shape[0], q_BxSxHxE.shape[2], len(column_S), layout)
    return in_blocks(attend_some, (q_BxSxHxE, keys.position_BxS, column_S[None]), block)


@struct.dataclass
class CausalContext:
    """Every token sees the real tokens before it and itself."""

    keys: Keys
    keeps_cache: bool = struct.field(pytree_node=False)
    kernel: Kernel = struct.field(pytree_node=False, default=Kernel())
    layout: Layout | None = struct.field(pytree_node=False, default=None)

    def attend(self, q: Array, k: Array, v: Array, window: Array | int, **options: Any) -> tuple[Array, Any]:
        if self.kernel.name != "xla":
            out = kernel_attention(self.kernel, q, k, v, self.keys.mask_BxS, scale=options["scale"], layout=self.layout)
            return out, (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)) if self.keeps_cache else None
        k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
        out = causal_attention(q, k, v, self.keys, window, layout=self.layout, **options)
        return out, (k, v) if self.keeps_cache else None


@struct.dataclass
class TreeContext:
    """Tokens [0, S) are a trunk, the rest are R branches of C tokens, flattened."""

    keys: Keys
    branch_mask_BxRxC: Array
    branch_position_BxRxC: Array
    branch_start_BxR: Array
    kernel: Kernel = struct.field(pytree_node=False, default=Kernel())
    layout: Layout | None = struct.field(pytree_node=False, default=None)

    def attend(self, q: Array, k: Array, v: Array, window: Array | int, **options: Any) -> tuple[Array, Any]:
        b, s = self.keys.mask_BxS.shape
        r, c = self.branch_mask_BxRxC.shape[1:]
        trunk = CausalContext(self.keys, keeps_cache=True, kernel=self.kernel, layout=self.layout)
        trunk_out, (trunk_k, trunk_v) = trunk.attend(q[:, :s], k[:, :s], v[:, :s], window, **options)

        def attend_some(branches: tuple[Array, ...]) -> Array:
            q, k, v, mask_BxRxC, position_BxRxC, start_BxR = branches
            sees_trunk = self.keys.mask_BxS[:, None] & (jnp.arange(s) < start_BxR[..., None])
            sees_trunk = sees_trunk[:, :, None]  # the same for the C tokens of a branch, but for windows
            sees_own = mask_BxRxC[:, :, None] & jnp.tri(c, dtype=bool)
            if self.keys.is_windowed:
                distance = position_BxRxC[..., None] - self.keys.position_BxS[:, None, None]
                sees_trunk = sees_trunk & (distance < window)
                sees_own = sees_own & (position_BxRxC[..., :, None] - position_BxRxC[..., None, :] < window)
            k, v = k.transpose(0, 1, 3, 4, 2), v.swapaxes(2, 3)
            return branch_attention(q, trunk_k, trunk_v, sees_trunk, k, v, sees_own, **options)

        q, k, v = (x[:, s:].reshape(b, r, c, *x.shape[2:]) for x in (q, k, v))
        branches = (q, k, v, self.branch_mask_BxRxC, self.branch_position_BxRxC, self.branch_start_BxR)
        out = in_blocks(attend_some, branches, max(1, query_block(b, q.shape[3], s + c, self.layout) // c))
        return jnp.concatenate([trunk_out, out.reshape(b, r * c, *out.shape[3:])], axis=1), None


@struct.dataclass
class StepContext:
    """One new token a row, over the cache of one layer."""

    k_BxKxExS: Array
    v_BxKxSxE: Array
    mask_BxS: Array  # the new column included
    position_BxS: Array
    token_position_B: Array
    column: Array

    def attend(self, q: Array, k: Array, v: Array, window: int, **options: Any) -> tuple[Array, Any]:
        k = jax.lax.dynamic_update_slice(self.k_BxKxExS, k.transpose(0, 2, 3, 1), (0, 0, 0, self.column))
        v = jax.lax.dynamic_update_slice(self.v_BxKxSxE, v.swapaxes(1, 2), (0, 0, self.column, 0))
        is_visible = self.mask_BxS
        if window:
            is_visible = is_visible & (self.token_position_B[:, None] - self.position_BxS < window)
        return attention(q, k, v, is_visible[:, None], **options), (k, v)


@struct.dataclass
class BranchStepContext:
    """One new token a branch, over the trunk's cache of one layer and the branch's own."""

    trunk_k_BxKxExS: Array
    trunk_v_BxKxSxE: Array
    own_k_BxRxKxExC: Array
    own_v_BxRxKxCxE: Array
    sees_trunk_BxRxS: Array
    trunk_position_BxS: Array
    token_position_BxR: Array
    column: Array

    def attend(self, q: Array, k: Array, v: Array, window: int, **options: Any) -> tuple[Array, Any]:
        k = jax.lax.dynamic_update_slice(self.own_k_BxRxKxExC, k[..., None], (0, 0, 0, 0, self.column))
        v = jax.lax.dynamic_update_slice(self.own_v_BxRxKxCxE, v[:, :, :, None], (0, 0, 0, self.column, 0))
        own_column = jnp.arange(k.shape[4])
        sees_trunk, sees_own = self.sees_trunk_BxRxS, own_column <= self.column
        if window:
            distance = self.token_position_BxR[..., None] - self.trunk_position_BxS[:, None]
            sees_trunk = sees_trunk & (distance < window)
            sees_own = sees_own & (self.column - own_column < window)
        sees_own = jnp.broadcast_to(sees_own, (*sees_trunk.shape[:2], 1, k.shape[4]))
        out = branch_attention(
            q[:, :, None],
            self.trunk_k_BxKxExS,
            self.trunk_v_BxKxSxE,
            sees_trunk[:, :, None],
            k,
            v,
            sees_own,
            **options,
        )
        return out[:, :, 0], (k, v)
