"""Blocks of tokens: what keeps anything of shape [B, T, V] from ever existing.

The unembedding is applied to a block of tokens at a time inside one `lax.scan`. The functions that use these blocks
take their gradients themselves: `fused` while a block's logits are there, `entropy` and `divergences` in a backward
pass that computes them again. The unembedding's gradient adds up in the scan's carry, so memory grows with the block
and not with T.
The idea is google/tunix's `compute_chunked_logps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from omniopd_jax.types import Array, PyTree


def scan_blocks(
    function: Callable[..., Any], carry: PyTree, arrays: tuple[Array, ...], *, block_tokens: int
) -> tuple[PyTree, PyTree]:
    """Runs `carry, outputs = function(carry, *blocks)` over blocks of tokens.

    A block holds every sequence (a few neighbouring tokens of each), so a batch that is sharded over its first axis
    keeps all its devices busy in every block. Only where B > block_tokens is B cut too.

    Args:
      function: reads the carry and one [n, ...] block of each array; returns the new carry and [n, ...] outputs.
      carry: any pytree.
      arrays: each [B, T, ...].
      block_tokens: n is at most this (to within the rounding that spreads T evenly). It need not divide B·T: what is
        missing is filled with zeros and cut off again.

    Returns:
      The last carry, and the outputs as [B, T, ...].
    """
    rows, tokens = arrays[0].shape[:2]
    cuts_T = max(1, min(tokens, -(-rows * tokens // block_tokens)))
    cuts_B = max(1, -(-rows // block_tokens))
    block_T, block_B = -(-tokens // cuts_T), -(-rows // cuts_B)

    def split(array: Array) -> Array:
        rest = array.shape[2:]
        fill = [(0, block_B * cuts_B - rows), (0, block_T * cuts_T - tokens)] + [(0, 0)] * len(rest)
        array = jnp.pad(array, fill).reshape(block_B, cuts_B, cuts_T, block_T, *rest)
        return jnp.moveaxis(array, (1, 2), (0, 1)).reshape(cuts_B * cuts_T, block_B * block_T, *rest)

    def join(blocks: Array) -> Array:
        rest = blocks.shape[2:]
        array = jnp.moveaxis(blocks.reshape(cuts_B, cuts_T, block_B, block_T, *rest), (0, 1), (1, 2))
        return array.reshape(block_B * cuts_B, cuts_T * block_T, *rest)[:rows, :tokens]

    carry, outputs = jax.lax.scan(lambda state, blocks: function(state, *blocks), carry, tuple(map(split, arrays)))
    return carry, jax.tree.map(join, outputs)


def head_rows(unembed_DxV: Array, dtype: Any) -> Array:
    """The head as VxD in `dtype`: what every block reads.

    Where the head is tied it is the transpose of the embedding, and this transposes it back to what lies in memory.
    Inside the scan a compiler could not: there it would be handed a transposed copy, as an untied head is here (on a
    CPU; elsewhere layouts are the compiler's). The head must be finite: backward a row of −inf would meet its own
    probability of 0.
    """
    return unembed_DxV.T.astype(dtype)


def block_logits(hidden_nxD: Array, head_VxD: Array, logit_softcap: float | None) -> Array:
    """float32 logits [n, V] of one block; the operands keep the hidden states' dtype, the sum is float32."""
    logits = jnp.matmul(hidden_nxD, head_VxD.T, preferred_element_type=jnp.float32)
    return logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)


def pull_back(
    logits_gradient: Array,
    logits: Array,
    hidden_nxD: Array,
    head_VxD: Array,
    logit_softcap: float | None,
) -> tuple[Array, Array]:
    """From dL/dlogits of a block to (dL/dhidden [n, D], dL/dunembed [D, V] in float32)."""
    if logit_softcap is not None:
        logits_gradient = logits_gradient * (1.0 - jnp.square(logits / logit_softcap))
    logits_gradient = logits_gradient.astype(hidden_nxD.dtype)
    hidden_gradient = jnp.matmul(logits_gradient, head_VxD, preferred_element_type=jnp.float32)
    unembed_gradient = jnp.matmul(hidden_nxD.T, logits_gradient, preferred_element_type=jnp.float32)
    return hidden_gradient.astype(hidden_nxD.dtype), unembed_gradient


def check_shapes(hidden_BxTxD: Array, unembed_DxV: Array, targets_BxT: Array, block_tokens: int) -> None:
    """Raises ValueError with one sentence where the arrays do not belong together."""
    if hidden_BxTxD.ndim != 3 or targets_BxT.shape != hidden_BxTxD.shape[:2]:
        raise ValueError(
            f"hidden states must be [B, T, D] and targets [B, T], got {hidden_BxTxD.shape} and {targets_BxT.shape}."
        )
    if unembed_DxV.ndim != 2 or unembed_DxV.shape[0] != hidden_BxTxD.shape[2]:
        raise ValueError(
            f"the unembedding must be [D, V] with D={hidden_BxTxD.shape[2]} as in the hidden states, "
            f"got {unembed_DxV.shape}."
        )
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}.")
