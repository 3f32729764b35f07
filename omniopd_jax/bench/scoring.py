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
    """`kind`: "blocks" (ours) or "dense" (jax.nn.log_softmax of all logits at once). The head is a tied embedding."""
    counter = CompileCounter()
    batch, tokens, width, vocabulary = spec["batch"], spec["new_tokens"], spec["width"], spec["vocabulary"]
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = jnp.dtype(spec["dtype"])
    hidden_BxTxD = jax.random.normal(keys[0], (batch, tokens, width), dtype)
    embedding_VxD = jax.random.normal(keys[1], (vocabulary, width), dtype) * width**-0.5
    targets_BxT = jax.random.randint(keys[2], (batch, tokens), 0, vocabulary)

    def blocks(hidden_BxTxD: Any, embedding_VxD: Any, targets_BxT: Any) -> Any:
        return entropy_and_logprob(hidden_BxTxD, embedding_VxD.T, targets_BxT)

    def dense(hidden_BxTxD: Any, embedding_VxD: Any, targets_BxT: Any) -> Any:
        logits = jnp.matmul(hidden_BxTxD, embedding_VxD.T, preferred_element_type=jnp.float32)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return entropy, jnp.take_along_axis(logprobs, targets_BxT[..., None], axis=-1)[..., 0]

    function = jax.jit({"dense": dense, "blocks": blocks}[spec["kind"]])
    return work(lambda: function(hidden_BxTxD, embedding_VxD, targets_BxT), counter)
