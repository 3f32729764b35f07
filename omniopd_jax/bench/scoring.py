"""Entropy and log-probability of given tokens over a large vocabulary: in blocks, or dense."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.algo.entropy import entropy_and_logprob
from omniopd_jax.bench.programs import work
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.train.compilation import CompileCounter


def score(spec: Spec) -> Work:
    """`kind`: "blocks" (ours) or "dense" (jax.nn.log_softmax of all logits at once)."""
    counter = CompileCounter()
    batch, tokens, width, vocabulary = spec["batch"], spec["new_tokens"], spec["width"], spec["vocabulary"]
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(spec["dtype"])
    hidden_BxTxD = jax.random.normal(keys[0], (batch, tokens, width), dtype)
    unembed_DxV = jax.random.normal(keys[1], (width, vocabulary), dtype) * width**-0.5
    targets_BxT = jax.random.randint(keys[2], (batch, tokens), 0, vocabulary)

    @jax.jit
    def dense(hidden_BxTxD: Any, unembed_DxV: Any, targets_BxT: Any) -> Any:
        logits = jnp.matmul(hidden_BxTxD, unembed_DxV, preferred_element_type=jnp.float32)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return entropy, jnp.take_along_axis(logprobs, targets_BxT[..., None], axis=-1)[..., 0]

    function = dense if spec["kind"] == "dense" else jax.jit(entropy_and_logprob)
    return work(lambda: function(hidden_BxTxD, unembed_DxV, targets_BxT), counter)
