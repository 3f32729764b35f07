"""Arrays over the devices of several processes: from the host, and whole on the host again."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from omniopd_jax.types import Array, PyTree


def spread(array: Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array, the same on every process, as one global array; only the parts of this process's devices travel.

    An array that lies on devices already is moved, if it has to be, by jax.
    """
    if isinstance(array, jax.Array) and (sharding.is_fully_addressable or not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole(tree: PyTree) -> PyTree:
    """Every array of a tree as numpy, waiting for the devices.

    An array whose parts lie with other processes is put together first: a collective, which all processes have to
    enter in the same order. With one process this is `jax.device_get`.
    """
    return jax.device_get(jax.tree.map(_assembled, tree))


def is_spread(tree: PyTree) -> bool:
    """Some array of the tree lies partly with other processes."""
    return any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _assembled(leaf: PyTree) -> PyTree:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)
