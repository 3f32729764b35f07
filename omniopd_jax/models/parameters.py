"""The table of a decoder's parameters: where each stands in the tree, its axes, its start, its name in HF checkpoints.

One table serves initialisation, loading, saving and sharding, so that they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax.models.families import DecoderConfig
from omniopd_jax.types import Array, PyTree

AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "experts", "layers")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree. Leading `layers` and `experts` axes are separate tensors in a checkpoint."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a logical name an axis, from AXES
    hf_name: str  # with {layer} and {expert} where those axes exist
    num_stacked: int = 0  # leading axes that a checkpoint holds as separate tensors
    num_in: int = 0  # input axes after those; > 0: HF stores the matrix as [out, in]
    mean: float = 0.0  # of its initial values
    std: float = 0.0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in a checkpoint."""
        own = self.shape[self.num_stacked :]
        if self.num_in:
            return (math.prod(own[self.num_in :]), math.prod(own[: self.num_in]))
        return (math.prod(own),) if self.num_stacked else own

    def hf_names(self) -> dict[tuple[int, ...], str]:
        """Index into the stacked axes → name in a checkpoint."""
        names = {}
        for index in np.ndindex(self.shape[: self.num_stacked]):
            names[index] = self.hf_name.format(**dict(zip(("layer", "expert"), index, strict=False)))
        return names

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """A checkpoint's tensor in our axes (a view)."""
        return (tensor.T if self.num_in else tensor).reshape(self.shape[self.num_stacked :])

    def to_hf(self, tensor: np.ndarray) -> np.ndarray:
        """One of our tensors (stacked axes taken off) as a checkpoint holds it, contiguous."""
        if self.num_in:
            return np.ascontiguousarray(tensor.reshape(self.hf_shape[::-1]).T)
        return np.ascontiguousarray(tensor.reshape(self.hf_shape))


def parameter_table(config: DecoderConfig) -> list[Parameter]:
    """Every parameter of a decoder, in the order in which checkpoints list them."""
    c = config
    rows = [
        Parameter(
            ("embedding",),
            (c.vocab_size, c.hidden_size),
            ("vocab", "embed"),
            "model.embed_tokens.weight",
            std=c.hidden_size**-0.5 / c.embedding_scale,
        )
    ]
    rows += _layer_rows(c)
    norm = Parameter(("final_norm", "scale"), (c.hidden_size,), ("embed",), "model.norm.weight", mean=1 - c.norm_offset)
    rows.append(norm)
    if not c.is_tied:
        shape, axes = (c.hidden_size, c.vocab_size), ("embed", "vocab")
        rows.append(Parameter(("lm_head",), shape, axes, "lm_head.weight", num_in=1, std=c.hidden_size**-0.5))
    return rows


def _layer_rows(c: DecoderConfig) -> list[Parameter]:
    sizes = dict(
        embed=c.hidden_size,
        heads=c.num_heads,
        kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        mlp=c.mlp_dim,
        experts=c.num_experts,
        layers=c.num_layers,
    )
    rows = []

    def add(path: str, axes: str, hf_name: str, **fields: Any) -> None:
        names = ("layers", *axes.split())
        shape = tuple(sizes[name] for name in names)
        row = Parameter(("layers", *path.split(".")), shape, names, "model.layers.{layer}." + hf_name, 1)
        rows.append(dataclasses.replace(row, **fields))

    def norm(path: str, axes: str, hf_name: str) -> None:
        add(f"{path}.scale", axes, f"{hf_name}.weight", mean=1 - c.norm_offset)

    def linear(path: str, inputs: str, outputs: str, has_bias: bool, hf_name: str, gain: float = 1.0) -> None:
        num_inputs = math.prod(sizes[name] for name in inputs.split())
        fields = dict(num_in=len(inputs.split()), std=gain * num_inputs**-0.5)
        add(f"{path}.kernel", f"{inputs} {outputs}", f"{hf_name}.weight", **fields)
        if has_bias:
            add(f"{path}.bias", outputs, f"{hf_name}.bias")

    residual_gain = (2 * c.num_layers) ** -0.5  # the residual stream's variance does not grow with depth
    for ours, theirs in _NORMS[c.norm_placement].items():
        norm(ours, "embed", theirs)
    for name in ("q", "k", "v"):
        heads = "heads" if name == "q" else "kv_heads"
        linear(f"attention.{name}_proj", "embed", f"{heads} head_dim", c.has_qkv_bias, f"self_attn.{name}_proj")
        if c.qk_norm != "none" and name != "v":
            axes = "head_dim" if c.qk_norm == "head" else f"{heads} head_dim"
            norm(f"attention.{name}_norm", axes, f"self_attn.{name}_norm")
    linear("attention.o_proj", "heads head_dim", "embed", c.has_o_bias, "self_attn.o_proj", residual_gain)
    if c.num_experts:
        linear("mlp.router", "embed", "experts", False, "mlp.gate")
        for name, axes in (("gate_proj", "embed mlp"), ("up_proj", "embed mlp"), ("down_proj", "mlp embed")):
            std = c.hidden_size**-0.5 if name != "down_proj" else residual_gain * c.mlp_dim**-0.5
            hf_name = f"mlp.experts.{{expert}}.{name}.weight"
            add(f"mlp.{name}", f"experts {axes}", hf_name, num_in=1, num_stacked=2, std=std)
    else:
        linear("mlp.gate_proj", "embed", "mlp", c.has_mlp_bias, "mlp.gate_proj")
        linear("mlp.up_proj", "embed", "mlp", c.has_mlp_bias, "mlp.up_proj")
        linear("mlp.down_proj", "mlp", "embed", c.has_mlp_bias, "mlp.down_proj", residual_gain)
    return rows


# our norm → the checkpoint's; `post_attention_layernorm` means two things in HF's families
_NORMS = {
    "pre": {"attention_pre_norm": "input_layernorm", "mlp_pre_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_pre_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_pre_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def nest(leaves: dict[tuple[str, ...], object]) -> PyTree:
    """Path → leaf, as nested dicts."""
    tree: dict = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


def leaf(tree: PyTree, path: tuple[str, ...]) -> Any:
    """The leaf at a path of nested dicts."""
    for name in path:
        tree = tree[name]
    return tree


def initial_params(config: DecoderConfig, key: Array, dtype: Any) -> PyTree:
    """Random parameters: normal, variance 1 / inputs, outputs into the residual stream smaller by sqrt(2 L).

    All come from one draw: a generator compiled per parameter takes longer than training a small model's first steps.
    """
    table = parameter_table(config)
    sizes = [math.prod(row.shape) if row.std else 0 for row in table]
    noise = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    leaves = {}
    for row, draw in zip(table, noise, strict=True):
        values = row.std * draw.reshape(row.shape) if row.std else jnp.zeros(row.shape)
        leaves[row.path] = (row.mean + values).astype(dtype)
    return nest(leaves)
