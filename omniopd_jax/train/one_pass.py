"""An optimizer's update as one pass over memory: blocks of every parameter, each with its gradient and its moments.

Written as a whole, XLA's CPU backend makes a pass of every moment, of the change and of the parameters, and copies
what each would overwrite before the others have read it: some 26 arrays of the parameters' size come and go where
seven have to (gradient, parameter and two moments in, the last three out). In blocks all that happens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omniopd_jax.types import Array, PyTree

_BLOCK = 2**16  # numbers: with gradient and moments 1 MiB in float32, what a core's own cache holds

# (gradients, state, parameters) → (parameters, state, sum of the change's squares)
Update = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, Array]]


def in_one_pass(
    update: Update, init: Callable[[PyTree], PyTree], grads: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree, Array]:
    """`update(grads, state, params)`, leaf by leaf and block by block.

    Args:
      update: looks at one number at a time, and at scalars of the state (which count updates). It is handed flat blocks
        of one leaf, in trees that have None for all others.
      init: makes the state from parameters; its arrays have their parameters' shapes.
    """
    structure = jax.tree.structure(params)
    numbers = jax.tree.unflatten(structure, range(structure.num_leaves))
    after, total = (params, state), jnp.zeros((), jnp.float32)
    for number in range(structure.num_leaves):

        def pick(leaf: Array, own: int, number: int = number) -> Array | None:
            return leaf.reshape(-1) if own == number else None

        grad, param = (jax.tree.map(pick, tree, numbers) for tree in (grads, params))
        of_leaf = (param, optax.tree.map_params(init, pick, state, numbers))
        changed, more = _block_by_block(update, grad, of_leaf)
        after, total = jax.tree.map(_put, changed, after, is_leaf=lambda leaf: leaf is None), total + more
    return *after, total


def _put(new: Array | None, old: Array) -> Array:
    return old if new is None else new.reshape(old.shape)


def _block_by_block(
    update: Update, grad: PyTree, of_leaf: tuple[PyTree, PyTree]
) -> tuple[tuple[PyTree, PyTree], Array]:
    """((parameter, state) after the update of one leaf, sum of the change's squares)."""

    def part(carry: Any, start: Array | int, width: int) -> Any:
        of_leaf, total = carry

        def cut(leaf: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(leaf, start, width) if leaf.ndim else leaf

        def put(new: Array, old: Array, leaf: Array) -> Array:
            # For the compiler's sake: the question makes the writes wait for the change, which has read all that they
            # overwrite. Else it copies the whole leaf, block after block. The answer is yes only where a state is
            # broken while its gradient is finite; then these numbers stay as they are.
            new = jnp.where(jnp.isnan(squares), old, new)
            return jax.lax.dynamic_update_slice_in_dim(leaf, new, start, axis=0) if leaf.ndim else leaf

        param, state = of_leaf
        block = jax.tree.map(cut, (grad, state, param))
        *changed, squares = update(*block)
        return jax.tree.map(put, tuple(changed), (block[2], block[1]), of_leaf), total + squares

    (size,) = {leaf.size for leaf in jax.tree.leaves(grad)}
    num_blocks, rest = divmod(size, _BLOCK)
    carry = (of_leaf, jnp.zeros((), jnp.float32))
    if num_blocks:
        carry = jax.lax.fori_loop(0, num_blocks, lambda number, carry: part(carry, number * _BLOCK, _BLOCK), carry)
    if rest:
        carry = part(carry, num_blocks * _BLOCK, rest)
    (param, state), total = carry
    # blocks are not updates: the scalars count on once, from what they were
    nothing = jax.tree.map(lambda leaf: leaf[:0] if leaf.ndim else leaf, (grad, of_leaf[1], of_leaf[0]))
    counted = update(*nothing)[1]
    return (param, jax.tree.map(lambda new, old: old if old.ndim else new, counted, state)), total
