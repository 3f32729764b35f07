"""The decoding loop that whole responses and branches share: a while loop over a documented state.

After gemma's `SamplingState`. Rows here are whatever is decoded side by side: A responses, or A = B·M·G branches.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from omniopd_jax.rollout import sampling
from omniopd_jax.rollout.sampling import Draw, SamplingRule
from omniopd_jax.types import Array, PyTree


@struct.dataclass
class DecodingState:
    """What the loop carries from token to token."""

    step: Array  # int32 scalar, columns of the buffers already written; every row fills the same column
    cache: PyTree  # all that was read and drawn, but for the last token
    token_A: Array  # int32, the last drawn token of each row, not in the cache yet
    is_active_A: Array  # bool, the row goes on
    tokens_AxT: Array  # int32, 0 where nothing was drawn
    mask_AxT: Array  # bool, True where a token was drawn
    logprob_AxT: Array  # float32, nats, 0 where nothing was drawn
    entropy_AxT: Array  # float32, nats, 0 where nothing was drawn


def begin(drawn: Draw, cache: PyTree, is_active_A: Array, *, max_new_tokens: int, rule: SamplingRule) -> DecodingState:
    """The state after the first draw, which comes from hidden states already read.

    Args:
      drawn: one draw a row (Q = 1).
      cache: the prefixes.
      is_active_A: bool, rows that are to be decoded at all; the others stay empty.
      max_new_tokens: T, columns of the buffers.
      rule: whose stop tokens end a row.
    """
    shape = (is_active_A.shape[0], max_new_tokens)
    state = DecodingState(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        token_A=jnp.zeros(shape[0], jnp.int32),
        is_active_A=is_active_A,
        tokens_AxT=jnp.zeros(shape, jnp.int32),
        mask_AxT=jnp.zeros(shape, bool),
        logprob_AxT=jnp.zeros(shape, jnp.float32),
        entropy_AxT=jnp.zeros(shape, jnp.float32),
    )
    return _record(state, drawn, rule)


def decode(
    state: DecodingState,
    read_token: Callable[[Array, PyTree, Array], tuple[Array, PyTree]],
    draw: Callable[[Array, Array], Draw],
    keys_A: Array,
    rule: SamplingRule,
) -> DecodingState:
    """Draws until the buffers are full or no row is active.

    Args:
      state: after `begin`.
      read_token: (token_A, cache, is_active_A) -> (hidden_AxD, cache with these tokens in it).
      draw: (hidden_AxD, uniform_Ax1) -> one draw a row.
      keys_A: typed keys; draw t of a row is a function of its hidden state, its key and t.
      rule: whose stop tokens end a row.
    """
    max_new_tokens = state.tokens_AxT.shape[1]

    def goes_on(state):
        return (state.step < max_new_tokens) & jnp.any(state.is_active_A)

    def advance(state):
        hidden_AxD, cache = read_token(state.token_A, state.cache, state.is_active_A)
        uniform_A = sampling.uniforms(keys_A, jnp.broadcast_to(state.step, state.token_A.shape))
        return _record(state.replace(cache=cache), draw(hidden_AxD, uniform_A[:, None]), rule)

    return jax.lax.while_loop(goes_on, advance, state)


def _record(state: DecodingState, drawn: Draw, rule: SamplingRule) -> DecodingState:
    """Writes one draw a row into column `step` and retires the rows that drew a stop token."""
    is_active_A = state.is_active_A

    def write(buffer_AxT, value_A):
        value_A = jnp.where(is_active_A, value_A, jnp.zeros_like(value_A))
        return jax.lax.dynamic_update_slice_in_dim(buffer_AxT, value_A[:, None], state.step, axis=1)

    token_A = jnp.where(is_active_A, drawn.token_AxQ[:, 0], 0)
    is_stop_A = jnp.zeros_like(is_active_A)
    for stop_token in rule.stop_tokens:
        is_stop_A |= token_A == stop_token
    return state.replace(
        step=state.step + 1,
        token_A=token_A,
        is_active_A=is_active_A & ~is_stop_A,
        tokens_AxT=write(state.tokens_AxT, token_A),
        mask_AxT=write(state.mask_AxT, is_active_A),
        logprob_AxT=write(state.logprob_AxT, drawn.logprob_AxQ[:, 0]),
        entropy_AxT=write(state.entropy_AxT, drawn.entropy_A),
    )
