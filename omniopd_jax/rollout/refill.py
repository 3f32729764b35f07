"""Continuous batching: W prompts on fewer slots; a slot whose response has ended takes the next waiting prompt.

The device decodes until a few slots are idle; the host then looks at two small arrays, hands the idle slots to waiting
prompts, and lets it go on. The cache has room for the longest of the responses that are being decoded, not for the
longest that may come. When nobody waits any more, the responses that are left move into half as many slots whenever
these are enough, so that the last ones do not pay for slots that stand idle. All else stays on the device, and nothing
but the sizes is compiled anew.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniopd_jax import gathering, models
from omniopd_jax.models.layout import Layout, full_rows
from omniopd_jax.rollout import decoding, sampling
from omniopd_jax.rollout.columns import cache_sizes, replace_rows, resized, widen
from omniopd_jax.rollout.sampling import SamplingRule
from omniopd_jax.types import Array, Rollout


@struct.dataclass
class Slots:
    """B slots between two rounds, and what all W responses have so far. A slot that never had a prompt has row W."""

    cache: models.KVCache  # columns used as a ring, never fewer than an active slot's prompt and tokens
    row_B: Array  # int32, which of the W prompts the slot works on
    token_B: Array  # int32, the last drawn token, not in the cache yet
    drawn_B: Array  # int32, tokens drawn so far
    is_active_B: Array  # bool
    tokens_WxT: Array  # int32
    mask_WxT: Array  # bool
    logprob_WxT: Array  # float32
    entropy_WxT: Array  # float32
    is_finished_W: Array  # bool, a stop token was drawn


def sample(
    model: models.Model,
    tokens_WxP: Array,
    mask_WxP: Array,
    keys_W: Array,
    *,
    slots: int,
    max_new_tokens: int,
    rule: SamplingRule,
) -> Rollout:
    """`sampler.sample` for W prompts with at most `slots` of them on the device at a time, in the order given."""
    num_prompts = tokens_WxP.shape[0]
    layout = model.module.layout
    group = group_of(slots, layout)
    # Rows of one device may move together; rows that lie on several stay where they are.
    fewest = group if layout is None or layout.mesh.size == 1 else slots
    width = tokens_WxP.shape[1]
    sizes = cache_sizes(width, max_new_tokens)
    columns = sizes[0]
    state = empty_slots(model, tokens_WxP, slots=slots, max_new_tokens=max_new_tokens, columns=columns)
    stepper = decoding.stepper(model, slots)
    waiting = 0  # the next prompt to be admitted
    is_active, drawn = np.zeros(slots, bool), np.zeros(slots, np.int32)
    while True:
        idle = np.flatnonzero(~is_active)
        while waiting < num_prompts and len(idle) >= group:
            rows = np.arange(waiting, waiting + group)
            row_F, slot_F = np.minimum(rows, num_prompts).astype(np.int32), idle[:group].astype(np.int32)
            state = admit(model, state, tokens_WxP, mask_WxP, keys_W, row_F, slot_F, rule=rule)
            is_active[slot_F], drawn[slot_F] = True, 1
            waiting, idle = waiting + group, idle[group:]
        is_waiting = waiting < num_prompts
        size = len(is_active)
        if not is_waiting and size > fewest and is_active.sum() <= size // 2:
            # Nobody waits and half the slots are idle: what is left goes on in half as many.
            size = size // 2
            kept = np.argsort(~is_active, kind="stable")[:size].astype(np.int32)
            state, is_active, drawn = _keep(state, kept), is_active[kept], drawn[kept]
        if is_waiting:
            num_left = slots - group
        else:
            num_left = size // 2 if size > fewest else 0
        if is_active.sum() > num_left or is_waiting:
            # A response of n tokens has n - 1 in the cache; those of full length have ended, known here or not.
            longest = min(int(drawn.max(where=is_active, initial=0)), max_new_tokens - 1)
            fitting = fitting_size(sizes, columns, width, longest)
            if fitting != columns:
                columns = fitting
                state = dataclasses.replace(state, cache=resized(state.cache, columns))
            steps = columns - width - longest + 1
            state = decode_round(stepper, state, keys_W, np.int32(num_left), np.int32(steps), rule=rule)
            is_active, drawn = map(np.array, gathering.whole((state.is_active_B, state.drawn_B)))
        if not is_waiting and not is_active.any():
            break
    return Rollout(
        prompt_tokens_BxP=tokens_WxP,
        prompt_mask_BxP=mask_WxP,
        tokens_BxT=state.tokens_WxT,
        mask_BxT=state.mask_WxT,
        logprob_BxT=state.logprob_WxT,
        is_finished_B=state.is_finished_W,
        entropy_BxT=state.entropy_WxT,
    )


def fitting_size(sizes: tuple[int, ...], columns: int, width: int, longest: int) -> int:
    """The smallest of the sizes that holds a prompt and `longest` tokens; below `columns` with a quarter to spare."""
    return next(size for size in sizes if longest <= (size - width) * (1 if size >= columns else 0.75))


def group_of(slots: int, layout: Layout | None) -> int:
    """Prompts admitted at a time: a few share the prefill's cost, and until then fewer slots than that stand idle."""
    return min(slots, full_rows(layout, max(1, slots // 8)))


@functools.partial(jax.jit, static_argnames=("slots", "max_new_tokens", "columns"))
def empty_slots(model: models.Model, tokens_WxP: Array, *, slots: int, max_new_tokens: int, columns: int) -> Slots:
    """Slots that never had a prompt, with a cache of so many columns."""
    num_prompts, width = tokens_WxP.shape
    nothing = jnp.zeros((slots, 1), jnp.int32)
    _, cache = models.read(model, nothing, nothing > 0, cache_length=1)
    assert cache is not None  # a length was given
    cache = widen(cache, columns)
    shape = (num_prompts, max_new_tokens)
    return Slots(
        cache=dataclasses.replace(cache, length=jnp.asarray(width, jnp.int32)),
        row_B=jnp.full(slots, num_prompts, jnp.int32),
        token_B=nothing[:, 0],
        drawn_B=nothing[:, 0],
        is_active_B=nothing[:, 0] > 0,
        tokens_WxT=jnp.zeros(shape, jnp.int32),
        mask_WxT=jnp.zeros(shape, bool),
        logprob_WxT=jnp.zeros(shape, jnp.float32),
        entropy_WxT=jnp.zeros(shape, jnp.float32),
        is_finished_W=jnp.zeros(num_prompts, bool),
    )


@functools.partial(jax.jit, static_argnames="rule", donate_argnames="state")
def admit(
    model: models.Model,
    state: Slots,
    tokens_WxP: Array,
    mask_WxP: Array,
    keys_W: Array,
    row_F: Array,
    slot_F: Array,
    *,
    rule: SamplingRule,
) -> Slots:
    """Reads F waiting prompts, draws their first tokens and puts them into F idle slots. Row W is no prompt."""
    num_prompts, limit = state.tokens_WxT.shape
    read_F = jnp.minimum(row_F, num_prompts - 1)
    tokens_FxP, keys_F = tokens_WxP[read_F], keys_W[read_F]
    mask_FxP = mask_WxP[read_F] & (row_F < num_prompts)[:, None]
    hidden_FxPxD, cache = models.read(model, tokens_FxP, mask_FxP, cache_length=tokens_FxP.shape[1])
    assert cache is not None  # a length was given
    zero_F = jnp.zeros_like(row_F)
    drawn = decoding.head(model, rule)(hidden_FxPxD[:, -1], sampling.uniforms(keys_F, zero_F)[:, None])
    fresh = decoding.start(cache, zero_F, zero_F, jnp.any(mask_FxP, axis=1), max_new_tokens=1)
    fresh = decoding.record(fresh, drawn, rule, limit=limit)

    is_slot_BxF = jnp.arange(state.row_B.shape[0])[:, None] == slot_F
    state = dataclasses.replace(
        state,
        cache=replace_rows(state.cache, cache, jnp.argmax(is_slot_BxF, axis=1), jnp.any(is_slot_BxF, axis=1)),
        row_B=state.row_B.at[slot_F].set(row_F),
        token_B=state.token_B.at[slot_F].set(fresh.token_A),
        drawn_B=state.drawn_B.at[slot_F].set(fresh.drawn_A),
        is_active_B=state.is_active_B.at[slot_F].set(fresh.is_active_A),
    )
    return _collect(state, fresh, row_F, zero_F)


@jax.jit
def _keep(state: Slots, slot_F: Array) -> Slots:
    """The same responses in fewer slots: those of the F given ones; the others must be idle."""
    rows = dataclasses.replace(state.cache, length=())
    cache = jax.tree.map(lambda array: jnp.take(array, slot_F, axis=0), rows)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, length=state.cache.length),
        row_B=state.row_B[slot_F],
        token_B=state.token_B[slot_F],
        drawn_B=state.drawn_B[slot_F],
        is_active_B=state.is_active_B[slot_F],
    )


@functools.partial(jax.jit, static_argnames="rule", donate_argnames="state")
def decode_round(
    model: models.Model, state: Slots, keys_W: Array, num_left: Array, steps: Array, *, rule: SamplingRule
) -> Slots:
    """Decodes until no more than `num_left` slots are active, so many steps at most."""
    (num_prompts, limit), columns = state.tokens_WxT.shape, state.cache.mask_BxS.shape[1]
    stepper = models.for_decoding(model)

    def read_token(token_B, cache, is_active_B):
        cache = dataclasses.replace(cache, length=cache.length % columns)
        return models.decode(stepper, token_B, cache, is_real_B=is_active_B)

    before = decoding.start(state.cache, state.token_B, state.drawn_B, state.is_active_B, max_new_tokens=limit)
    after = decoding.decode(
        before,
        read_token,
        decoding.head(model, rule),
        keys_W[jnp.minimum(state.row_B, num_prompts - 1)],
        rule,
        limit=limit,
        until=jnp.minimum(steps, limit),
        num_left=num_left,
    )
    state = dataclasses.replace(
        state, cache=after.cache, token_B=after.token_A, drawn_B=after.drawn_A, is_active_B=after.is_active_A
    )
    return _collect(state, after, state.row_B, before.drawn_A)


def _collect(state: Slots, part: decoding.DecodingState, row_A: Array, first_A: Array) -> Slots:
    """Writes the buffers of a round into the responses that they belong to, from token `first_A` on."""
    num_prompts, limit = state.tokens_WxT.shape
    column_AxT = first_A[:, None] + jnp.arange(part.mask_AxT.shape[1])
    at = (row_A[:, None], jnp.where(part.mask_AxT, column_AxT, limit))  # outside of the array: dropped

    def put(whole_WxT, part_AxT):
        return whole_WxT.at[at].set(part_AxT, mode="drop")

    stopped_A = jnp.where(part.has_stopped_A, row_A, num_prompts)
    return dataclasses.replace(
        state,
        tokens_WxT=put(state.tokens_WxT, part.tokens_AxT),
        mask_WxT=put(state.mask_WxT, part.mask_AxT),
        logprob_WxT=put(state.logprob_WxT, part.logprob_AxT),
        entropy_WxT=put(state.entropy_WxT, part.entropy_AxT),
        is_finished_W=state.is_finished_W.at[stopped_A].set(True, mode="drop"),
    )
