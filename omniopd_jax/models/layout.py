"""Where a model's arrays lie on a mesh: logical axes in, sharding constraints out.

Without them the compiler follows the parameters: under FSDP it splits the width of the activations as it finds the
width of the weights split, and sums them over all devices after every product. A layout says instead that activations
lie by sequences, so that weights are gathered where they are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from omniopd_jax.types import Array, PyTree

BATCH = "batch"
GATHERED = "embed"  # the parameters' axis that no product may find split
Places = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Logical axis → axes of a mesh. Hashable: a jit constant."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def shares(self, name: str | None) -> int:
        """Into how many parts the mesh splits a logical axis that it divides."""
        return math.prod(self.mesh.shape[axis] for axis in dict(self.rules).get(name or "", ()))

    def constrain(self, array: Array, axes: tuple[str | None, ...]) -> Array:
        """The same array, laid out by its logical axes; None and unknown names: whole.

        An axis that the mesh does not divide stays whole. Where that is the batch, nothing is constrained.
        """
        spec, places = [], dict(self.rules)
        for size, name in zip(array.shape, axes, strict=True):
            names = places.get(name or "", ())
            divides = size % self.shares(name) == 0
            if name == BATCH and not divides:
                return array
            spec.append(names if names and divides else None)
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, Spec(*spec)))

    def gathered(self, array: Array, axes: tuple[str, ...]) -> Array:
        """A parameter as a product wants it: whole along the width, split over heads, feed-forward and vocabulary."""
        return self.constrain(array, tuple(None if name == GATHERED else name for name in axes))


def full_rows(layout: Layout | None, rows: int) -> int:
    """The next number of rows that the mesh divides: of any other each device would hold them all."""
    shares = 1 if layout is None else layout.shares(BATCH)
    return -(-rows // shares) * shares


def by_sequence(layout: Layout | None, array_BxN: Array) -> Array:
    """An array whose first axis is B, split by sequences; unchanged where there is no layout."""
    if layout is None:
        return array_BxN
    return layout.constrain(array_BxN, (BATCH,) + (None,) * (array_BxN.ndim - 1))


def by_key_head(layout: Layout | None, keys_BxKxnxm: Array) -> Array:
    """Keys or values of one layer, split by sequences and by key/value heads."""
    return keys_BxKxnxm if layout is None else layout.constrain(keys_BxKxnxm, (BATCH, "kv_heads", None, None))


def gathered_layer(layout: Layout | None, layer: PyTree, axes: PyTree) -> PyTree:
    """One layer's parameters, gathered along the width; `axes` is the same tree of logical names."""
    if layout is None:
        return layer
    return jax.tree.map(layout.gathered, layer, axes)
