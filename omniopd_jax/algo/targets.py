"""The Dirichlet-multinomial target: how far the teacher's texts bear the student's chunk out.

    prior      π̄ = exp( 1/C Σ_{t in chunk} log π_θ(y_t) )        the student's own confidence, a geometric mean
    posterior  π̂ = (k + α π̄) / (n + α)                           k = Σ_i φ(chunk, continuation i) over n received

Paper: "posterior mean of a Dirichlet-multinomial". With n ≤ N instead of N a lost continuation weakens the evidence
instead of counting as disagreement (ours).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omniopd_jax.algo.anchors import chunk_values
from omniopd_jax.types import Anchors, Array


def chunk_prior(logprob_BxT: Array, anchors: Anchors, *, chunk_tokens: int) -> Array:
    """π̄ of each chunk, float32 in [0, 1], no gradient; 0 in invalid slots.

    Args:
      logprob_BxT: float32, nats, of the response's tokens.
      anchors: the chunks' starts.
      chunk_tokens: C, the denominator of the mean.
    """
    mean_BxM = jnp.mean(chunk_values(logprob_BxT, anchors, chunk_tokens=chunk_tokens), axis=2, dtype=jnp.float32)
    return jax.lax.stop_gradient(jnp.where(anchors.is_valid_BxM, jnp.exp(mean_BxM), 0.0))


def posterior_target(score_sum_BxM: Array, count_BxM: Array, prior_BxM: Array, *, prior_strength: float) -> Array:
    """π̂ of each chunk, float32 in [0, 1], no gradient.

    Args:
      score_sum_BxM: k, the sum of similarities over the continuations received.
      count_BxM: n, how many were received. n = 0 gives the prior, whatever α is.
      prior_BxM: π̄.
      prior_strength: α ≥ 0. With n = α half of the target is the student's own confidence.
    """
    count_BxM = jnp.asarray(count_BxM, jnp.float32)
    has_evidence = count_BxM > 0
    total = jnp.where(has_evidence, count_BxM + prior_strength, 1.0)
    posterior = (score_sum_BxM + prior_strength * prior_BxM) / total
    return jax.lax.stop_gradient(jnp.where(has_evidence, posterior, prior_BxM))
