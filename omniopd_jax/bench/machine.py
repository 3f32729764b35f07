"""What the machine can do: its best matrix product and how fast it reads memory, measured where the work runs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from omniopd_jax.bench.protocol import Spec, Work

_SIZE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
_BYTES = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**31}


def prepare(spec: Spec) -> Work:
    """Both rates, and jax's matrix product apart from numpy's: where XLA's is the slower one, it is a limit too."""
    import jax
    import jax.numpy as jnp

    backend = jax.default_backend()
    name = spec["dtype"]
    if name == "auto":
        name = "float32" if backend == "cpu" else "bfloat16"
    dtype = jnp.dtype(name)
    size = _SIZE.get(backend, 4096)
    left, right = jnp.ones((size, size), dtype), jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    # Sums of columns: the adds keep up with the memory, which a chain of scalar adds would not.
    stream = jnp.ones((_BYTES.get(backend, 2**28) // 4096, 1024), jnp.float32)
    columns = jax.jit(lambda x: jnp.sum(x, axis=0))
    host = np.ones((1024, 1024), np.float32)

    def run() -> dict[str, Any]:
        flops = 2.0 * size**3
        rates = {"xla_flops_per_s": flops / _seconds(lambda: jax.block_until_ready(product(left, right)))}
        if backend == "cpu" and dtype == jnp.float32:
            rates["blas_flops_per_s"] = 2.0 * 1024**3 / _seconds(lambda: host @ host)
        rates["bytes_per_s"] = stream.nbytes / _seconds(lambda: jax.block_until_ready(columns(stream)))
        return rates

    return Work(run, about={"device": jax.devices()[0].device_kind, "platform": backend, "dtype": name})


def _seconds(function: Callable[[], Any]) -> float:
    """The fastest of five: a rate is what the machine can do, not what it did while disturbed."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def describe(device: str) -> dict[str, Any]:
    """What a figure should be read with."""
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
