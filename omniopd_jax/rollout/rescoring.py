"""The entropy of a rollout from one forward pass over it, instead of from the decode loop."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from omniopd_jax import models
from omniopd_jax.algo.entropy import entropy_and_logprob
from omniopd_jax.types import Rollout


@functools.partial(jax.jit, static_argnames="block_tokens")
def rescore(model: models.Model, rollout: Rollout, *, block_tokens: int = 512) -> Rollout:
    """The same responses with entropy_BxT of one pass over the whole sequences.

    Both sources are exact over the full vocabulary and differ by rounding alone; in 16 bits that can move a peak.

    Args:
      block_tokens: tokens a block of the vocabulary scan.
    """
    hidden_BxSxD, _ = models.read(model, *rollout.sequence())
    entropy_BxT, _ = entropy_and_logprob(
        hidden_BxSxD[:, rollout.prompt_tokens_BxP.shape[1] - 1 : -1],  # column s predicts the token at s + 1
        models.unembedding(model),
        rollout.tokens_BxT,
        block_tokens=block_tokens,
        logit_softcap=model.config.final_logit_softcap,
    )
    return dataclasses.replace(rollout, entropy_BxT=jnp.where(rollout.mask_BxT, entropy_BxT, 0.0))
