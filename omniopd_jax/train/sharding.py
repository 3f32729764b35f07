"""The mesh, and the one table that says which axis of which array lies on which axis of the mesh.

data    replicas of the parameters, each with its share of the batch
fsdp    the batch again, and the width of every parameter (gathered where it is used)
tensor  heads, feed-forward width and vocabulary
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from omniopd_jax import gathering
from omniopd_jax.config import Config, ConfigError, MeshConfig
from omniopd_jax.models import DecoderConfig, Model, logical_axes
from omniopd_jax.models.layout import BATCH, Layout
from omniopd_jax.models.lora import adapter_axes
from omniopd_jax.models.parameters import nest, parameter_table
from omniopd_jax.train.pipeline import rows_decoded
from omniopd_jax.types import PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis → axis of the mesh; None: every device has it whole.
RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over all devices; one size may be −1, the rest of them.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"config.mesh ({asked}): sizes are at least 1, and at most one of them is -1, the rest.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise ConfigError(
            f"config.mesh ({asked}) does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}."
        )
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def check_batch(mesh: Mesh, config: Config) -> None:
    """Raises ConfigError where a batch, or a part of it, does not divide over the mesh."""
    shares = batch_shares(mesh)
    whole, parts = config.rollout.batch_size, config.pipeline.micro_batches
    sizes = {"rollout.batch_size": whole}
    if config.train.micro_batch_size:
        sizes["train.micro_batch_size"] = config.train.micro_batch_size
    if config.rollout.slots:
        sizes["rollout.slots"] = rows_decoded(config)
    if parts > 1:
        sizes[f"rollout.batch_size={whole} / config.pipeline.micro_batches"] = whole // parts
    for name, size in sizes.items():
        if size % shares:
            raise ConfigError(
                f"config.{name}={size} must be a multiple of {shares}, the mesh's data × fsdp "
                f"({mesh.shape['data']} × {mesh.shape['fsdp']})."
            )


def check_model(mesh: Mesh, decoder: DecoderConfig) -> None:
    """Raises ConfigError where the model does not divide over the mesh."""
    tensor = mesh.shape["tensor"]
    for what, count in (("attention heads", decoder.num_heads), ("feed-forward width", decoder.mlp_dim)):
        if count % tensor:
            raise ConfigError(f"config.mesh.tensor={tensor} does not divide the model's {what}, {count}.")


def activation_layout(mesh: Mesh) -> Layout:
    """How a model's activations and gathered weights lie: `RULES`, and sequences over data × fsdp."""
    rules = {name: (axis,) for name, axis in RULES.items() if axis}
    return Layout(mesh, (*rules.items(), (BATCH, BATCH_AXES)))


def laid_out(model: Model, mesh: Mesh) -> Model:
    """The same arrays; what is computed with them lies on the mesh by sequences."""
    return dataclasses.replace(model, module=model.module.clone(layout=activation_layout(mesh)))


def batch_shares(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def block_tokens(config: Config, mesh: Mesh) -> int:
    """Tokens of a block of the vocabulary scan over the whole mesh: `train.block_tokens` a share of the batch.

    Every block reads the whole output head. Were the blocks no larger on more chips, each would read it for a handful
    of tokens, and the scan would take as long on 64 chips as on one.
    """
    return config.train.block_tokens * batch_shares(mesh)


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Arrays whose `axis` is B: split over data × fsdp."""
    return NamedSharding(mesh, Spec(*(None,) * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, Spec())


def trainable_axes(model: Model) -> PyTree:
    """Logical axis names, a tuple a leaf, of what the optimizer changes: the adapters, else every parameter."""
    return logical_axes(model) if model.adapters is None else adapter_axes(model)


def axes_shardings(mesh: Mesh, shapes: PyTree, axes: PyTree) -> PyTree:
    """One sharding a leaf, by `RULES`.

    An axis that the mesh does not divide (two key/value heads on four devices) stays whole.

    Args:
      mesh: the mesh.
      shapes: a tree of arrays, or of their shapes.
      axes: the same tree with a tuple of logical names a leaf.
    """

    def of(names: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = RULES[name]
            spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, Spec(*spec))

    return jax.tree.map(of, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def model_shardings(mesh: Mesh, model: Model) -> PyTree:
    """One sharding a leaf of `model.params`."""
    return axes_shardings(mesh, model.params, logical_axes(model))


def config_shardings(mesh: Mesh, decoder: DecoderConfig) -> PyTree:
    """The same for a model that is not loaded yet."""
    table = parameter_table(decoder)
    shapes = nest({row.path: jax.ShapeDtypeStruct(row.shape, jax.numpy.float32) for row in table})
    return axes_shardings(mesh, shapes, nest({row.path: row.axes for row in table}))


def placed(model: Model, mesh: Mesh) -> Model:
    """The same arrays, on the mesh."""
    params = spread_tree(model.params, model_shardings(mesh, model))
    model = laid_out(dataclasses.replace(model, params=params), mesh)
    if model.adapters is None:
        return model
    shardings = axes_shardings(mesh, model.adapters, trainable_axes(model))
    return dataclasses.replace(model, adapters=spread_tree(model.adapters, shardings))


def spread_tree(tree: PyTree, shardings: PyTree) -> PyTree:
    """The same numbers where `shardings` says; a leaf that lies on this process alone is the same on all of them."""
    return jax.tree.map(gathering.spread, tree, shardings)
