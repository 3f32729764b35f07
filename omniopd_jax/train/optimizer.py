"""AdamW with a schedule and clipping by global norm (optax)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from omniopd_jax.config import OptimizerConfig
from omniopd_jax.train.one_pass import in_one_pass
from omniopd_jax.types import Array, PyTree


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


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A clip by global norm, then a rule of optax that looks at one number at a time. Its state is the rule's."""

    rule: optax.GradientTransformation
    schedule: optax.Schedule  # the rule's learning rate at update k
    clip_norm: float  # 0: none

    def init(self, params: PyTree) -> PyTree:
        """The state before the first update."""
        return self.rule.init(params)

    def update(
        self, grads: PyTree, state: PyTree, params: PyTree, *, norm: Array, is_kept: Array, is_one_pass: bool = False
    ) -> tuple[PyTree, PyTree, Array]:
        """One update.

        Args:
          grads: like the parameters.
          norm: their global norm.
          is_kept: bool scalar; False gives parameters and state back as they were.
          is_one_pass: one device reads and writes its memory once, see `one_pass`.

        Returns:
          (parameters, state, global norm of the change that was asked for).
        """
        scale = jnp.ones_like(norm)
        if self.clip_norm:
            # what `optax.clip_by_global_norm` does, as one factor: to divide every gradient would be another pass
            scale = self.clip_norm / jnp.maximum(norm, self.clip_norm)
        update = functools.partial(_update, self.rule, scale, is_kept)
        if is_one_pass:
            update = functools.partial(in_one_pass, update, self.init)
        params, state, squares = update(grads, state, params)
        return params, state, jnp.sqrt(squares)


def _update(
    rule: optax.GradientTransformation, scale: Array, is_kept: Array, grads: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree, Array]:
    """(parameters, state, sum of the change's squares)"""
    grads = jax.tree.map(lambda leaf: (leaf * scale).astype(leaf.dtype), grads)
    change, changed = rule.update(grads, state, params)
    after = (optax.apply_updates(params, change), changed)
    params, state = jax.tree.map(lambda new, old: jnp.where(is_kept, new, old), after, (params, state))
    return params, state, optax.tree.norm(change, squared=True)


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """Clipping to `clip_norm` (0: none), then AdamW; matrices alone decay, norms and biases do not."""
    schedule = learning_rate_schedule(config, steps)
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.state_dtype),
        mask=decays,
    )
    return Optimizer(adamw, schedule, config.clip_norm)


def decays(params: PyTree) -> PyTree:
    """True on leaves that weight decay acts on. By name: under a scan over layers a norm's scale has two axes too."""

    def is_matrix(path: tuple, leaf: object) -> bool:
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        return not ("norm" in name or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
