"""Our own contestants, by name: `python -m omniopd_jax.bench.ours`, spoken to through `protocol`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from omniopd_jax import heap
from omniopd_jax.bench.protocol import Spec, Work, serve

# name → module of this room and the function that prepares it
_PREPARE = {
    "machine": ("machine", "prepare"),
    "rollout": ("generation", "rollout"),
    "refill": ("generation", "refill"),
    "audit": ("generation", "audit"),
    "anchors": ("generation", "anchors"),
    "score": ("scoring", "score"),
    "update": ("updates", "update"),
    "products": ("products", "products"),
    "start": ("runs", "start"),
    "step": ("runs", "step"),
    "similarity": ("texts", "similarity"),
}


def prepare(spec: Spec) -> Work:
    module, name = _PREPARE[spec["work"]]
    function: Callable[[Spec], Work] = getattr(importlib.import_module(f"omniopd_jax.bench.{module}"), name)
    return function(spec)


if __name__ == "__main__":
    heap.keep_freed_memory()  # as every command of ours does
    serve(prepare)
