"""Controls: the same run with evidence that says nothing. What still improves did not come from the teacher.

    constant   every audited chunk has the batch's mean evidence, so that nothing tells chunks apart
    shuffled   every audited chunk has the evidence of another one, drawn from the batch without replacement

Evidence is k, the agreement, π̄ and the branches' scores. Ours; the paper shows neither.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omniopd_jax.algo.registry import Seen
from omniopd_jax.types import Array

_EVIDENCE = ("agreement_BxM", "prior_BxM", "branch_score_BxMxG", "branch_overlap_BxMxG")


def controlled(seen: Seen, control: str, key: Array) -> Seen:
    """`seen` under a control.

    Args:
      seen: of the whole batch.
      control: "none" | "constant" | "shuffled".
      key: names the permutation.
    """
    if control == "none":
        return seen
    if control not in ("constant", "shuffled"):
        raise ValueError(f'control={control!r} must be "none", "constant" or "shuffled".')
    assert seen.anchors is not None
    count_BxM = jnp.asarray(seen.count_BxM, jnp.float32)
    is_audited_BxM = seen.anchors.is_valid_BxM & (count_BxM > 0)
    given = {name: getattr(seen, name) for name in _EVIDENCE if getattr(seen, name) is not None}
    if control == "constant":
        # a chunk keeps its n, so that its target is (n · mean + α · mean prior) / (n + α)
        score_BxM = jnp.asarray(seen.score_sum_BxM) / jnp.maximum(count_BxM, 1.0)
        made = {name: _mean(value, is_audited_BxM) for name, value in given.items()}
        return seen._replace(score_sum_BxM=count_BxM * _mean(score_BxM, is_audited_BxM), **made)
    given |= {"score_sum_BxM": seen.score_sum_BxM, "count_BxM": count_BxM}
    return seen._replace(**{name: _permuted(value, is_audited_BxM, key) for name, value in given.items()})


def _mean(value: Array, is_audited_BxM: Array) -> Array:
    """The mean over audited chunks (and what is in them), in every one of them; 0 elsewhere."""
    is_audited = is_audited_BxM.reshape(is_audited_BxM.shape + (1,) * (jnp.ndim(value) - 2))
    count = jnp.maximum(jnp.sum(jnp.broadcast_to(is_audited, jnp.shape(value))), 1)
    return jnp.where(is_audited, jnp.sum(jnp.where(is_audited, value, 0.0)) / count, 0.0)


def _permuted(value: Array, is_audited_BxM: Array, key: Array) -> Array:
    """The values of audited chunks in another order; what is not audited stays."""
    is_audited_K = is_audited_BxM.reshape(-1)
    number_K = jnp.arange(is_audited_K.size)
    to_K = jnp.argsort(jnp.where(is_audited_K, number_K, number_K + is_audited_K.size))  # audited ones first
    drawn_K = jax.random.uniform(key, is_audited_K.shape)
    from_K = jnp.lexsort((number_K, jnp.where(is_audited_K, drawn_K, 2.0)))  # audited ones first, in any order
    flat = jnp.asarray(value).reshape(is_audited_K.size, *jnp.shape(value)[2:])
    return flat.at[to_K].set(flat[from_K]).reshape(jnp.shape(value))
