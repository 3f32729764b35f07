"""What our contestants share: a model with random weights, and work that counts its compilations and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax import models
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.bench.shapes import read_shape
from omniopd_jax.train.compilation import CompileCounter


def model_of(spec: Spec) -> models.Model:
    """The folder `spec["folder"]` if there is one (then other libraries read the same), else random weights."""
    dtype, compute = jnp.dtype(spec.get("param_dtype", spec["dtype"])), jnp.dtype(spec["dtype"])
    if spec.get("folder"):
        return models.load_model(spec["folder"], dtype=dtype, compute_dtype=compute)
    return models.init_model(read_shape(spec["model"]), jax.random.key(0), dtype, compute_dtype=compute)


def work(run: Callable[[], Any], counter: CompileCounter, more: Mapping[str, Any] | None = None) -> Work:
    """`run` as a contestant: its result is waited for.

    Args:
      run: returns arrays, or a mapping that says more about the run (then it has waited itself).
      counter: made before anything was compiled.
      more: what the contestant says of itself.
    """

    def once() -> Mapping[str, Any] | None:
        result = run()
        if isinstance(result, Mapping) and all(isinstance(value, (int, float, str)) for value in result.values()):
            return result
        jax.block_until_ready(result)
        return None

    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    device = jax.devices()[0]

    def memory() -> tuple[int, int]:
        stats = device.memory_stats() or {}
        return stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0)

    return Work(
        once,
        about={"versions": versions, "device": device.device_kind} | dict(more or {}),
        counter=lambda: counter.count,
        memory=None if device.platform == "cpu" else memory,
    )
