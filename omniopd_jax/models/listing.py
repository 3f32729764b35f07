"""Tokens in a list: of the positions of padded rows only those that count are computed.

Everything in a decoder but attention works token by token and does not care where a token stands. So embedding, norms,
projections and feed-forward run over a list of the positions that are needed, and only attention sees rows: queries,
keys and values move to their places, the results move back. What stands at a position that is not listed is 0.

A list is folded to as many rows as there were, only shorter ones: a sum over tokens, such as the gradient of a norm's
scale, takes XLA's CPU backend five times as long over one row of them all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniopd_jax.types import Array


@struct.dataclass
class Listing:
    """U lists, each of a group of J of the B = U · J rows, so that a batch that is split over devices by groups keeps
    its tokens where they are."""

    place_UxJW: Array  # int32 below J · X, a position of the group's rows one after the other; more: no token
    where_UxJX: Array  # int32, the way back: the number in the list of each position; J · W: not listed
    rows: int = struct.field(pytree_node=False)  # B

    def in_list(self, array_BxX: Array) -> Array:
        """[B, X, …] → [B, W, …]."""
        return self._moved(array_BxX, self.place_UxJW, self.where_UxJX)

    def in_rows(self, array_BxW: Array) -> Array:
        """[B, W, …] → [B, X, …]."""
        return self._moved(array_BxW, self.where_UxJX, self.place_UxJW)

    def _moved(self, array_BxI: Array, to: Array, back: Array) -> Array:
        groups, rest = to.shape[0], array_BxI.shape[2:]
        return moved(array_BxI.reshape(groups, -1, *rest), to, back).reshape(self.rows, -1, *rest)


def listing(place_UxJxW: Array, positions: int) -> Listing:
    """The way there and back.

    Args:
      place_UxJxW: see `Listing`; the list of a group is its J rows one after the other, no position twice.
      positions: X.
    """
    groups, rows, width = place_UxJxW.shape
    place_UxJW = place_UxJxW.reshape(groups, rows * width)
    where = jnp.full((groups, rows * positions), rows * width, jnp.int32)
    number = jnp.arange(rows * width, dtype=jnp.int32)
    where_UxJX = jax.vmap(lambda where, place: where.at[place].set(number, mode="drop"))(where, place_UxJW)
    return Listing(place_UxJW, where_UxJX, groups * rows)


@struct.dataclass
class ListedContext:
    """Attention as `context` has it for rows, of tokens that stand in a list."""

    context: Any
    listing: Listing

    def attend(self, q: Array, k: Array, v: Array, window: Array | int, **options: Any) -> tuple[Array, Any]:
        q, k, v = (self.listing.in_rows(x) for x in (q, k, v))
        out, kept = self.context.attend(q, k, v, window, **options)
        return self.listing.in_list(out), kept


@jax.custom_vjp
def moved(array_UxI: Array, to_UxO: Array, back_UxI: Array) -> Array:
    """out[u, o] = array[u, to[u, o]]; 0 where `to` is I or more.

    `to` and `back` are each other's inverse, so the gradient moves the same way back. The compiler cannot know that
    no position is moved twice: its own gradient would add position by position.
    """
    to = to_UxO[(..., *(None,) * (array_UxI.ndim - 2))]
    return jnp.take_along_axis(array_UxI, to, axis=1, mode="fill", fill_value=0)


def _moved_forward(array_UxI: Array, to_UxO: Array, back_UxI: Array) -> tuple[Array, tuple[Array, Array]]:
    return moved(array_UxI, to_UxO, back_UxI), (to_UxO, back_UxI)


def _moved_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Any, Any]:
    to_UxO, back_UxI = saved
    of_to, of_back = (np.zeros(places.shape, jax.dtypes.float0) for places in saved)
    return moved(gradient, back_UxI, to_UxO), of_to, of_back


moved.defvjp(_moved_forward, _moved_backward)
