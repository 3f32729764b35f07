"""An update's matrix products and nothing else: what no trainer on the same library can undercut."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.bench.programs import work
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.models import DecoderConfig
from omniopd_jax.train.compilation import CompileCounter


def of_update(c: DecoderConfig, tokens: int, predicted: int) -> list[list[int]]:
    """[rows, inputs, outputs, how often, 1 for the head] of every weight; JSON for contestants of any library.

    Each is multiplied with four times: student and reference forward, towards the inputs, towards the weight. The
    products of attention with itself are left out.
    """
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = [(c.hidden_size, queries, 1), (c.hidden_size, keys, 2), (queries, c.hidden_size, 1)]
    layer += [(c.hidden_size, c.mlp_dim, 2), (c.mlp_dim, c.hidden_size, 1)]
    products = [[tokens, inputs, outputs, c.num_layers * count, 0] for inputs, outputs, count in layer]
    return [*products, [predicted, c.hidden_size, c.vocab_size, 1, 1]]


def products(spec: Spec) -> Work:
    """`products`: see `of_update`. The head lies by rows of the vocabulary, as a tied embedding does."""
    counter = CompileCounter()
    dtype = jnp.dtype(spec["dtype"])
    operands, is_head = [], []
    keys = iter(jax.random.split(jax.random.key(0), 4 * sum(count for *_, count, _ in spec["products"])))
    for rows, inputs, outputs, count, head in spec["products"]:
        weight = (outputs, inputs) if head else (inputs, outputs)
        for _ in range(count):
            shapes = ((rows, inputs), (rows, outputs), weight, weight)
            operands.append(tuple(jax.random.normal(next(keys), shape, dtype) for shape in shapes))
            is_head.append(bool(head))

    @jax.jit
    def multiply(operands: Any) -> Any:
        corners = []
        for (x, dy, weight, reference), head in zip(operands, is_head, strict=True):
            w, r = (weight.T, reference.T) if head else (weight, reference)
            # Behind the barrier each product is computed whole, though one number of it is asked for.
            whole = jax.lax.optimization_barrier((x @ w, x @ r, dy @ w.T, x.T @ dy))
            corners += [product[0, 0] for product in whole]
        return jnp.stack(corners)

    return work(lambda: multiply(operands), counter)
