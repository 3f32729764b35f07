"""The decoding loop that whole responses, refilled slots and branches share: a while loop over a documented state.

After gemma's `SamplingState`. Rows here are whatever is decoded side by side: A responses, or A = B·M·G branches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from omniopd_jax import models
from omniopd_jax.rollout import sampling
from omniopd_jax.rollout.sampling import Draw, SamplingRule
from omniopd_jax.types import Array, PyTree

FEW_ROWS = 32  # up to here a layer's products are faster in tiles, with 64 rows slower (docs/benchmarks.md)


@struct.dataclass
class DecodingState:
    """What the loop carries from token to token."""

    step: Array  # int32 scalar, columns of the buffers already written; every row fills the same column
    cache: PyTree  # all that was read and drawn, but for the last token
    token_A: Array  # int32, the last drawn token of each row, not in the cache yet
    drawn_A: Array  # int32, tokens that each row has drawn in all: the number of its next draw
    is_active_A: Array  # bool, the row goes on
    has_stopped_A: Array  # bool, the row has drawn a stop token
    tokens_AxT: Array  # int32, 0 where nothing was drawn
    mask_AxT: Array  # bool, True where a token was drawn
    logprob_AxT: Array  # float32, nats, 0 where nothing was drawn
    entropy_AxT: Array  # float32, nats, 0 where nothing was drawn


def start(cache: PyTree, token_A: Array, drawn_A: Array, is_active_A: Array, *, max_new_tokens: int) -> DecodingState:
    """A state with empty buffers of T = max_new_tokens columns."""
    shape = (token_A.shape[0], max_new_tokens)
    return DecodingState(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        token_A=token_A,
        drawn_A=drawn_A,
        is_active_A=is_active_A,
        has_stopped_A=jnp.zeros(shape[0], bool),
        tokens_AxT=jnp.zeros(shape, jnp.int32),
        mask_AxT=jnp.zeros(shape, bool),
        logprob_AxT=jnp.zeros(shape, jnp.float32),
        entropy_AxT=jnp.zeros(shape, jnp.float32),
    )


def record(state: DecodingState, drawn: Draw, rule: SamplingRule, *, limit: int) -> DecodingState:
    """Writes one draw a row into column `step` and retires rows that drew a stop token or their last token.

    Args:
      drawn: one draw a row (Q = 1); those of inactive rows are ignored.
      limit: tokens that a row may draw in all.
    """
    is_active_A = state.is_active_A

    def write(buffer_AxT, value_A):
        value_A = jnp.where(is_active_A, value_A, jnp.zeros_like(value_A))
        return jax.lax.dynamic_update_slice_in_dim(buffer_AxT, value_A[:, None], state.step, axis=1)

    token_A = jnp.where(is_active_A, drawn.token_AxQ[:, 0], 0)
    is_stop_A = jnp.zeros_like(is_active_A)
    for stop_token in rule.stop_tokens:
        is_stop_A |= token_A == stop_token
    is_stop_A &= is_active_A
    drawn_A = state.drawn_A + is_active_A
    return dataclasses.replace(
        state,
        step=state.step + 1,
        token_A=token_A,
        drawn_A=drawn_A,
        is_active_A=is_active_A & ~is_stop_A & (drawn_A < limit),
        has_stopped_A=state.has_stopped_A | is_stop_A,
        tokens_AxT=write(state.tokens_AxT, token_A),
        mask_AxT=write(state.mask_AxT, is_active_A),
        logprob_AxT=write(state.logprob_AxT, drawn.logprob_AxQ[:, 0]),
        entropy_AxT=write(state.entropy_AxT, drawn.entropy_A),
    )


def decode(
    state: DecodingState,
    read_token: Callable[[Array, PyTree, Array], tuple[Array, PyTree]],
    draw: Callable[[Array, Array], Draw],
    keys_A: Array,
    rule: SamplingRule,
    *,
    limit: int,
    until: Array | int,
    num_left: Array | int = 0,
) -> DecodingState:
    """Draws until a column is reached or few enough rows are active.

    Args:
      state: each active row has a last token that is not in the cache yet.
      read_token: (token_A, cache, is_active_A) -> (hidden_AxD, cache with these tokens in it).
      draw: (hidden_AxD, uniform_Ax1) -> one draw a row.
      keys_A: typed keys; draw t of a row is a function of its hidden state, its key and t.
      rule: whose stop tokens end a row.
      limit: tokens that a row may draw in all.
      until: columns of the buffers to fill at most.
      num_left: the loop also ends as soon as no more than this many rows are active.
    """

    def goes_on(state):
        return (state.step < until) & (jnp.sum(state.is_active_A) > num_left)

    def advance(state):
        hidden_AxD, cache = read_token(state.token_A, state.cache, state.is_active_A)
        uniform_A = sampling.uniforms(keys_A, state.drawn_A)
        drawn = draw(hidden_AxD, uniform_A[:, None])
        return record(dataclasses.replace(state, cache=cache), drawn, rule, limit=limit)

    return jax.lax.while_loop(goes_on, advance, state)


def stepper(model: models.Model, rows: int) -> models.Model:
    """The model as the decoding loops of so many rows are handed it: on a CPU laid out once for all of them.

    On an accelerator the loop's own program does it, because weights that lie there twice may not fit.
    """
    if jax.default_backend() != "cpu":
        return model
    return models.laid_out_for_decoding(model, has_few_rows=rows <= FEW_ROWS)


def head(model: models.Model, rule: SamplingRule) -> Callable[[Array, Array], Draw]:
    """(hidden_AxD, uniform_AxQ) -> Draw with this model's output projection."""
    return functools.partial(
        sampling.draw_from_hidden,
        rule=rule,
        head=models.decoding_head(model),
        logit_softcap=model.config.final_logit_softcap,
    )
