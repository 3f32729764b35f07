"""Attention of whole sequences by kernels made for an accelerator; `attention` is what every machine can do.

They never hold a matrix of scores: memory grows with the sequence and not with its square. Both are exact up to
rounding, and neither knows a softcap or a window that differs between layers; where a model has one, `attention` does
the work (`kernel_of` says so).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from omniopd_jax.models.families import DecoderConfig, ModelError
from omniopd_jax.models.layout import BATCH, Layout
from omniopd_jax.models.listing import moved
from omniopd_jax.types import Array

_LANES = 128  # of a TPU: splash attention wants its blocks, and so the sequence, to be multiples
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Which kernel reads whole sequences. Hashable: part of the module."""

    name: str = "xla"  # xla | cudnn | splash
    is_interpreted: bool = False  # splash on a machine without a TPU, for checks


def kernel_of(setting: str, config: DecoderConfig, dtype: Any, device: Any, *, whose: str = "student") -> str:
    """The kernel that `student.attention` (or another's) means for a model that computes in `dtype` on a jax device.

    "auto" is cudnn on a GPU in 16 bits where model and GPU allow it, else xla.

    Raises:
      ModelError: the kernel asked for cannot serve this model or machine.
    """
    platform, capability = device.platform, getattr(device, "compute_capability", "")
    has_cap, has_windows = config.attention_softcap is not None, any(config.window_L)
    reason = ""
    if has_cap:
        reason = "the model caps its attention scores"
    elif has_windows:
        reason = "the model's layers have windows"
    elif setting in ("auto", "cudnn") and jnp.dtype(dtype).itemsize != 2:
        reason = f"it computes in 16 bits and the model in {jnp.dtype(dtype).name}"
    elif setting in ("auto", "cudnn") and (config.head_dim % 8 or config.head_dim > 128):
        reason = f"heads of {config.head_dim} are no multiple of 8 up to 128"
    elif setting in ("auto", "cudnn") and platform == "gpu" and not _has_flash_attention(capability):
        reason = f"it needs an NVIDIA GPU of compute capability 8.0 or more and this one's is {capability or 'unknown'}"
    if setting == "auto":
        return "cudnn" if platform == "gpu" and not reason else "xla"
    if setting == "cudnn" and platform != "gpu":
        reason = f"it needs a GPU and this is a {platform}"
    if setting == "splash":
        if platform != "tpu":
            reason = f"it needs a TPU and this is a {platform}"
        elif importlib.util.find_spec("jax.experimental.pallas.ops.tpu.splash_attention") is None:
            reason = "this jax does not have it"
    if setting != "xla" and reason:
        raise ModelError(f"config.{whose}.attention={setting!r} cannot be used: {reason}; 'xla' always can.")
    return setting


def _has_flash_attention(capability: str) -> bool:
    """Of a GPU's compute capability in jax's words: "9.0", or of another make "gfx942"."""
    major = str(capability).partition(".")[0]
    return major.isdecimal() and int(major) >= 8


def kernel_attention(
    kernel: Kernel,
    q_BxSxHxE: Array,
    k_BxSxKxE: Array,
    v_BxSxKxE: Array,
    mask_BxS: Array,
    *,
    scale: float,
    layout: Layout | None = None,
) -> Array:
    """Causal attention over the real tokens, as `contexts.causal_attention` without windows and softcap.

    The compiler cannot split splash over a mesh: it is split by hand, by the model's layout.

    Returns:
      out_BxSxHxE; what stands on padding is finite and means nothing.
    """
    if layout is not None and k_BxSxKxE.shape[2] % layout.shares("kv_heads"):
        # Heads are split and the few keys are not: each head gets keys of its own, which are split alike.
        groups = q_BxSxHxE.shape[2] // k_BxSxKxE.shape[2]
        k_BxSxKxE, v_BxSxKxE = jnp.repeat(k_BxSxKxE, groups, axis=2), jnp.repeat(v_BxSxKxE, groups, axis=2)
    if kernel.name == "splash":
        run = functools.partial(_splash_local, is_interpreted=kernel.is_interpreted)
        return _splash(run, layout, q_BxSxHxE, k_BxSxKxE, v_BxSxKxE, mask_BxS, scale)
    return compact_attention(q_BxSxHxE, k_BxSxKxE, v_BxSxKxE, mask_BxS, scale=scale, implementation="cudnn")


def compact_attention(
    q_BxSxHxE: Array, k_BxSxKxE: Array, v_BxSxKxE: Array, mask_BxS: Array, *, scale: float, implementation: Any
) -> Array:
    """`jax.nn.dot_product_attention` on rows whose real tokens have moved to the front.

    Padding may stand anywhere, and the kernel skips only what lies beyond a row's length: moved to the front, a row is
    causal up to its length and no mask of S × S is needed.
    """
    order_BxS = jnp.argsort(~mask_BxS, axis=1, stable=True)
    back_BxS = jnp.argsort(order_BxS, axis=1)
    length_B = jnp.sum(mask_BxS, axis=1, dtype=jnp.int32)

    out = jax.nn.dot_product_attention(
        moved(q_BxSxHxE, order_BxS, back_BxS),
        moved(k_BxSxKxE, order_BxS, back_BxS),
        moved(v_BxSxKxE, order_BxS, back_BxS),
        scale=scale,
        is_causal=True,
        query_seq_lengths=jnp.maximum(length_B, 1),
        key_value_seq_lengths=jnp.maximum(length_B, 1),
        implementation=implementation,
    )
    return moved(out, back_BxS, order_BxS)


def _splash(
    run: Callable[..., Any], layout: Layout | None, q: Array, k: Array, v: Array, mask_BxS: Array, scale: float
) -> Array:
    """TPU's splash attention. Padding is a segment of its own, so that real queries see real keys alone."""
    length = q.shape[1]
    padded = -(-length // _LANES) * _LANES

    def fill(array: Array) -> Array:
        return jnp.pad(array, [(0, 0), (0, padded - length)] + [(0, 0)] * (array.ndim - 2))

    def heads_first(array: Array) -> Array:
        return fill(array).swapaxes(1, 2)

    if layout is not None and layout.mesh.size > 1:
        places = dict(layout.rules)
        batch = places[BATCH] if q.shape[0] % layout.shares(BATCH) == 0 else None
        rows, of_heads, of_keys = (Spec(batch, *axes) for axes in ((), (places["heads"],), (places["kv_heads"],)))
        run = jax.shard_map(
            run,
            mesh=layout.mesh,
            in_specs=(of_heads, of_keys, of_keys, rows),
            out_specs=of_heads,
            check_vma=False,
        )
    out = run(heads_first(q) * jnp.asarray(scale, q.dtype), heads_first(k), heads_first(v), fill(mask_BxS))
    return out.swapaxes(1, 2)[:, :length].astype(v.dtype)


def _splash_local(
    q_BxHxSxE: Array, k_BxKxSxE: Array, v_BxKxSxE: Array, mask_BxS: Array, *, is_interpreted: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, length = q_BxHxSxE.shape[1:3]
    block = next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    attend = splash.make_splash_mha(causal, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=is_interpreted)
    segment_BxS = mask_BxS.astype(jnp.int32)
    return jax.vmap(lambda q, k, v, ids: attend(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids)))(
        q_BxHxSxE, k_BxKxSxE, v_BxKxSxE, segment_BxS
    )
