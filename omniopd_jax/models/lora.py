"""Low-rank adapters (LoRA, Hu et al. 2021): y = x·W + (alpha / rank) · x·a·b, with a and b alone trained.

The adapters are a tree of their own, `Model.adapters`; `model.replace(adapters=None)` is the base model over the very
same parameters, so the reference of the KL anchor costs no memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from omniopd_jax import gathering
from omniopd_jax.models.decoder import Model
from omniopd_jax.models.families import ModelError
from omniopd_jax.models.folder import TOKENIZER_FILES, copy_files, replace_folder
from omniopd_jax.models.parameters import Parameter, leaf, nest, parameter_table
from omniopd_jax.types import Array, PyTree


def linear_layers(model: Model) -> list[Parameter]:
    """The kernels that can carry an adapter: every linear layer of the decoder's blocks but routers and experts."""
    return [p for p in parameter_table(model.config) if p.path[-1] == "kernel" and p.path[-2] != "router"]


def add_adapters(
    model: Model, key: Array, *, rank: int, alpha: float, targets: str = ".*_proj", dtype: Any = jnp.float32
) -> Model:
    """The model with fresh adapters: a normal with variance 1 / inputs, b zero, so its output is unchanged.

    Args:
      rank: r ≥ 1.
      alpha: the adapters' output is scaled by alpha / rank.
      targets: regular expression over linear layers' names (q_proj ... down_proj), matched whole.

    Raises:
      ModelError: the pattern matches no linear layer.
    """
    layers = [layer for layer in linear_layers(model) if re.fullmatch(targets, layer.path[-2])]
    if not layers:
        known = ", ".join(layer.path[-2] for layer in linear_layers(model))
        raise ModelError(f"lora.targets={targets!r} matches none of the linear layers {known}.")
    leaves = {}
    for number, layer in enumerate(layers):
        a_shape, b_shape = _adapter_shapes(layer, rank)
        std = math.prod(layer.shape[1 : 1 + layer.num_in]) ** -0.5
        leaves[(*layer.path[:-1], "a")] = std * jax.random.normal(jax.random.fold_in(key, number), a_shape, dtype)
        leaves[(*layer.path[:-1], "b")] = jnp.zeros(b_shape, dtype)
    module = model.module.clone(adapter_scale=alpha / rank)
    return dataclasses.replace(model, module=module, adapters=nest(leaves))


def _adapter_shapes(layer: Parameter, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[L, *in, r] and [L, r, *out]."""
    inputs, outputs = layer.shape[1 : 1 + layer.num_in], layer.shape[1 + layer.num_in :]
    return (layer.shape[0], *inputs, rank), (layer.shape[0], rank, *outputs)


def adapter_axes(model: Model) -> PyTree:
    """A tree like `model.adapters` of logical axis names; the rank's axis is called "rank" and is never sharded."""
    leaves = {}
    for layer in _adapted(model):
        inputs, outputs = layer.axes[1 : 1 + layer.num_in], layer.axes[1 + layer.num_in :]
        leaves[(*layer.path[:-1], "a")] = ("layers", *inputs, "rank")
        leaves[(*layer.path[:-1], "b")] = ("layers", "rank", *outputs)
    return nest(leaves)


def _adapted(model: Model) -> list[Parameter]:
    paths = {tuple(entry.key for entry in path)[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(model.adapters)}
    return [layer for layer in linear_layers(model) if layer.path[:-1] in paths]


def merge(model: Model) -> Model:
    """The base model with the adapters' products added to its kernels (float32 sums), and no adapters."""
    if model.adapters is None:
        return model
    leaves = {p.path: merged(model, p, ()) for p in parameter_table(model.config)}
    return dataclasses.replace(model, params=nest(leaves), adapters=None)


def merged(model: Model, parameter: Parameter, index: tuple[int, ...]) -> Array:
    """One parameter, or the part of it at `index` of its stacked axes, with its adapter's product added."""
    kernel = leaf(model.params, parameter.path)[index]
    if model.adapters is None or parameter.path not in {layer.path for layer in _adapted(model)}:
        return kernel
    a, b = (leaf(model.adapters, (*parameter.path[:-1], name))[index].astype(jnp.float32) for name in "ab")
    num_out = len(parameter.shape) - 1 - parameter.num_in
    a = a.reshape(*a.shape[: a.ndim - 1 - parameter.num_in], -1, a.shape[-1])
    b = b.reshape(*b.shape[: b.ndim - num_out], -1)
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + model.module.adapter_scale * delta).astype(kernel.dtype)


def save_adapters(path: str | Path, model: Model, *, base: str = "", source: str | Path | None = None) -> None:
    """Writes an adapter folder that the peft package loads (adapter_config.json, adapter_model.safetensors).

    Args:
      base: name or folder of the base model, recorded for peft.
      source: a folder whose tokenizer files are copied along.

    Adapters that lie with several processes are written by process 0; all have to call this.

    Raises:
      ModelError: the model has no adapters.
    """
    if model.adapters is None:
        raise ModelError("This model has no adapters to export; export it merged.")
    layers = _adapted(model)
    rank = leaf(model.adapters, (*layers[0].path[:-1], "a")).shape[-1]
    alpha = round(model.module.adapter_scale * rank, 6)
    tensors = {}
    for layer in layers:
        a, b = (np.asarray(gathering.whole(leaf(model.adapters, (*layer.path[:-1], name)))) for name in "ab")
        for (index,), name in layer.hf_names().items():
            prefix = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[index].reshape(-1, rank).T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[index].reshape(rank, -1).T)
    if gathering.is_spread(model.adapters) and jax.process_index() > 0:
        return
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({layer.path[-2] for layer in layers}),
    }

    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if source is not None:
            copy_files(Path(source), folder, TOKENIZER_FILES)

    replace_folder(Path(path), write)
