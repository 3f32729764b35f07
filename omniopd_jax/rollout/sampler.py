"""Whole responses: the prompts are read once, then tokens are drawn until every row has stopped.

What row b draws at its step t is a function of its prompt, of keys_B[b] and of t: neighbours, the row's place in the
batch and the width of the padding do not matter (beyond float32 reassociation of the logits).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from omniopd_jax import models
from omniopd_jax.rollout import decoding, refill, sampling
from omniopd_jax.rollout.columns import cache_sizes, segments, widen
from omniopd_jax.rollout.decoding import DecodingState
from omniopd_jax.rollout.sampling import SamplingRule
from omniopd_jax.types import Array, Rollout


def sample(
    model: models.Model,
    tokens_BxP: Array,
    mask_BxP: Array,
    keys_B: Array,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    banned_tokens: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    slots: int = 0,
) -> Rollout:
    """Samples one response a prompt.

    Compiled once for each combination of shapes and keyword arguments; new parameters, prompts or keys of the same
    shapes reuse it. Callers pad prompts to a few widths for that reason.

    Args:
      model: parameters may change between calls without recompilation.
      tokens_BxP: int32, left-padded prompts. A row of padding alone gives an empty response.
      mask_BxP: bool, True on real tokens.
      keys_B: typed keys, one a row (`prng.row_keys`).
      max_new_tokens: T, the longest response; the loop ends earlier when every row has stopped.
      stop_tokens: ids that end a response; the one drawn is part of it.
      banned_tokens: ids that are never drawn (padding, start tokens).
      temperature: 1 is on-policy, 0 greedy.
      top_k: 0 is off; see SamplingRule for the order in which these three apply.
      top_p: 1 is off.
      min_p: 0 is off.
      slots: responses decoded side by side; as they end, waiting prompts take their places, so that one long response
        does not hold up the rest. 0: all B at once. The results are the same.

    Returns:
      Rollout with log-probability and exact entropy of every step at temperature 1 over the full vocabulary, whatever
      the sampling settings: those of the model's full forward pass.

    Raises:
      ValueError: a setting that cannot be, or prompts that do not fit together.
    """
    if tokens_BxP.shape != mask_BxP.shape or len(tokens_BxP.shape) != 2 or tokens_BxP.shape[1] < 1:
        raise ValueError(
            f"prompts must be tokens_BxP and mask_BxP with P >= 1, got {tokens_BxP.shape}, {mask_BxP.shape}."
        )
    if keys_B.shape != tokens_BxP.shape[:1]:
        raise ValueError(f"{tokens_BxP.shape[0]} prompts need as many keys, one a row; got shape {keys_B.shape}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    rule = SamplingRule(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=tuple(stop_tokens),
        banned_tokens=tuple(banned_tokens),
    )
    rule.check(model.config.vocab_size)
    if slots < 0:
        raise ValueError(f"slots must be 0 (all prompts at once) or more, got {slots}.")
    if 0 < slots < tokens_BxP.shape[0]:
        return refill.sample(model, tokens_BxP, mask_BxP, keys_B, slots=slots, max_new_tokens=max_new_tokens, rule=rule)
    width = tokens_BxP.shape[1]
    state = read_prompts(model, tokens_BxP, mask_BxP, keys_B, max_new_tokens=max_new_tokens, rule=rule)
    stepper = decoding.stepper(model, len(tokens_BxP))
    for until, columns in zip(segments(max_new_tokens), cache_sizes(width, max_new_tokens), strict=True):
        state = dataclasses.replace(state, cache=widen_cache(state.cache, columns=columns))
        state = decode_segment(stepper, state, keys_B, until=until, rule=rule)
        if until < max_new_tokens and not jnp.any(state.is_active_A):
            break
    return Rollout(
        prompt_tokens_BxP=tokens_BxP,
        prompt_mask_BxP=mask_BxP,
        tokens_BxT=state.tokens_AxT,
        mask_BxT=state.mask_AxT,
        logprob_BxT=state.logprob_AxT,
        is_finished_B=state.has_stopped_A,
        entropy_BxT=state.entropy_AxT,
    )


widen_cache = jax.jit(widen, static_argnames="columns")


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "rule"))
def read_prompts(
    model: models.Model, tokens_BxP: Array, mask_BxP: Array, keys_B: Array, *, max_new_tokens: int, rule: SamplingRule
) -> DecodingState:
    """Reads the prompts and draws the first token of each response."""
    hidden_BxPxD, cache = models.read(model, tokens_BxP, mask_BxP, cache_length=tokens_BxP.shape[1])
    zero_B = jnp.zeros(tokens_BxP.shape[0], jnp.int32)
    state = decoding.start(cache, zero_B, zero_B, jnp.any(mask_BxP, axis=1), max_new_tokens=max_new_tokens)
    drawn = decoding.head(model, rule)(hidden_BxPxD[:, -1], sampling.uniforms(keys_B, zero_B)[:, None])
    return decoding.record(state, drawn, rule, limit=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("until", "rule"), donate_argnames="state")
def decode_segment(
    model: models.Model, state: DecodingState, keys_B: Array, *, until: int, rule: SamplingRule
) -> DecodingState:
    """Decodes up to `until` tokens a response; the cache has room for them."""
    stepper = models.for_decoding(model)

    def read_token(token_B, cache, is_active_B):
        return models.decode(stepper, token_B, cache, is_real_B=is_active_B)

    limit = state.tokens_AxT.shape[1]
    return decoding.decode(state, read_token, decoding.head(model, rule), keys_B, rule, limit=limit, until=until)
