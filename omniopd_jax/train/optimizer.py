"""AdamW with a schedule and clipping by global norm (optax)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from omniopd_jax.config import OptimizerConfig
from omniopd_jax.types import PyTree


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update k = 0, 1, …: a linear warm-up, then constant, or a cosine or a line down to 0 at `steps`.

    The warm-up reaches the full rate at update `warmup_steps`, and its first update is not idle:
    rate · (k + 1) / (warmup_steps + 1).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping to `clip_norm` (0: none), then AdamW; matrices alone decay, norms and biases do not."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.state_dtype),
        mask=decays,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decays(params: PyTree) -> PyTree:
    """True on leaves that weight decay acts on. By name: under a scan over layers a norm's scale has two axes too."""

    def is_matrix(path: tuple, leaf: object) -> bool:
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        return not ("norm" in name or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
