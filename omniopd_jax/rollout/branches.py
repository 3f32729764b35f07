"""Many continuations off one cached response: M starts a response, G continuations a start, no prefix read twice.

The M prefixes of a response are nested, so the response is read once; a branch attends to the shared cache up to its
own start and to its own new tokens. The shared cache is never copied; a branch adds C columns of its own. A local
teacher samples its N continuations this way, the student its K branches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from omniopd_jax import models
from omniopd_jax.rollout import decoding, sampling
from omniopd_jax.rollout.sampling import Draw, SamplingRule
from omniopd_jax.types import Array, Branches, PyTree


@struct.dataclass
class Trunk:
    """Responses as one model has read them."""

    hidden_BxSxD: Array  # after the final norm; column s predicts the token at column s + 1
    cache: PyTree  # KVCache of S columns


@jax.jit
def read_trunk(model: models.Model, tokens_BxS: Array, mask_BxS: Array) -> Trunk:
    """Reads packed sequences (prompt, then response: `Rollout.sequence`) once.

    Args:
      model: whoever is going to continue: the student, or a local teacher with the same tokenizer.
      tokens_BxS: int32.
      mask_BxS: bool, True on real tokens.
    """
    hidden_BxSxD, cache = models.read(model, tokens_BxS, mask_BxS, cache_length=tokens_BxS.shape[1])
    return Trunk(hidden_BxSxD=hidden_BxSxD, cache=cache)


def sample_branches(
    model: models.Model,
    trunk: Trunk,
    start_BxM: Array,
    is_valid_BxM: Array,
    keys_B: Array,
    *,
    prompt_width: int,
    num_branches: int,
    length: int,
    stop_tokens: tuple[int, ...] = (),
    banned_tokens: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Branches:
    """Samples G continuations from each start of each response.

    A branch's draws are a function of its prefix, keys_B[b], the start's value, its number g and the step: neither the
    other starts of the response nor the other responses matter. A start that occurs twice gives the same branches.

    Args:
      model: the one that read the trunk.
      trunk: from `read_trunk`.
      start_BxM: int32, response positions in [0, T); the branch replaces the response from there on.
      is_valid_BxM: bool; other slots give masks that are False throughout.
      keys_B: typed keys, one a response; or keys_BxM, one a start, where each start is a request of its own.
      prompt_width: P, columns of the trunk before the response's first token.
      num_branches: G (a teacher's N).
      length: C, the longest branch.
      stop_tokens, banned_tokens, temperature, top_k, top_p, min_p: see SamplingRule.

    Returns:
      Branches; log-probabilities at temperature 1 over the full vocabulary.

    Raises:
      ValueError: a setting that cannot be, or arrays that do not fit together.
    """
    batch, columns = trunk.hidden_BxSxD.shape[:2]
    if start_BxM.shape != is_valid_BxM.shape or len(start_BxM.shape) != 2 or start_BxM.shape[0] != batch:
        raise ValueError(
            f"a trunk of {batch} responses needs start_BxM and is_valid_BxM with as many rows, "
            f"got {start_BxM.shape} and {is_valid_BxM.shape}."
        )
    if keys_B.shape not in ((batch,), start_BxM.shape):
        raise ValueError(
            f"{batch} responses need as many keys, one a response or one a start; got shape {keys_B.shape}."
        )
    if not 1 <= prompt_width <= columns:
        raise ValueError(f"prompt_width must lie between 1 and the trunk's {columns} columns, got {prompt_width}.")
    if num_branches < 1 or length < 1:
        raise ValueError(f"num_branches and length must be at least 1, got {num_branches} and {length}.")
    rule = SamplingRule(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=tuple(stop_tokens),
        banned_tokens=tuple(banned_tokens),
    )
    rule.check(model.config.vocab_size)
    return _sample_branches(
        model, trunk, start_BxM, is_valid_BxM, keys_B,
        prompt_width=prompt_width, num_branches=num_branches, length=length, rule=rule,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("prompt_width", "num_branches", "length", "rule"))
def _sample_branches(
    model: models.Model,
    trunk: Trunk,
    start_BxM: Array,
    is_valid_BxM: Array,
    keys_B: Array,
    *,
    prompt_width: int,
    num_branches: int,
    length: int,
    rule: SamplingRule,
) -> Branches:
    batch, slots = start_BxM.shape
    draw = decoding.head(model, rule)
    stepper = models.for_decoding(model)

    def read_token(token_A, cache, is_active_A):
        hidden_BxRxD, cache = models.decode_branches(stepper, token_A.reshape(batch, -1), cache)
        return hidden_BxRxD.reshape(-1, hidden_BxRxD.shape[-1]), cache

    column_BxM = jnp.where(is_valid_BxM, prompt_width + start_BxM, prompt_width)
    keys_A = branch_keys(keys_B, start_BxM, num_branches).reshape(-1)
    # One distribution a start serves all its branches.
    hidden_BxMxD = jnp.take_along_axis(trunk.hidden_BxSxD, column_BxM[..., None] - 1, axis=1)
    hidden_BMxD = hidden_BxMxD.reshape(-1, hidden_BxMxD.shape[-1])
    uniform_A = sampling.uniforms(keys_A, jnp.zeros(keys_A.shape, jnp.int32))
    drawn = draw(hidden_BMxD, uniform_A.reshape(-1, num_branches))
    drawn = Draw(
        token_AxQ=drawn.token_AxQ.reshape(-1, 1),
        logprob_AxQ=drawn.logprob_AxQ.reshape(-1, 1),
        entropy_A=jnp.repeat(drawn.entropy_A, num_branches),
    )
    # As in the sampler, the last token drawn needs no column.
    cache = models.open_branches(trunk.cache, jnp.repeat(column_BxM, num_branches, axis=1), max(length - 1, 1))
    state = decoding.start(
        cache,
        token_A=jnp.zeros(keys_A.shape, jnp.int32),
        drawn_A=jnp.zeros(keys_A.shape, jnp.int32),
        is_active_A=jnp.repeat(is_valid_BxM.reshape(-1), num_branches),
        max_new_tokens=length,
    )
    state = decoding.record(state, drawn, rule, limit=length)
    state = decoding.decode(state, read_token, draw, keys_A, rule, limit=length, until=length)
    shape = (batch, slots, num_branches, length)
    return Branches(
        tokens_BxMxGxC=state.tokens_AxT.reshape(shape),
        mask_BxMxGxC=state.mask_AxT.reshape(shape),
        logprob_BxMxGxC=state.logprob_AxT.reshape(shape),
    )


def branch_keys(keys_B: Array, start_BxM: Array, num_branches: int) -> jax.Array:
    """keys_BxMxG: one key a branch, from its response's (or its start's) key, its start's value and its number."""

    def one(key, start, number):
        return jax.random.fold_in(jax.random.fold_in(key, start), number)

    keys_BxM = keys_B if keys_B.ndim == 2 else jnp.broadcast_to(keys_B[:, None], start_BxM.shape)
    over_branches = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(jax.vmap(over_branches, in_axes=(0, 0, None)), in_axes=(0, 0, None))(
        keys_BxM, start_BxM, jnp.arange(num_branches)
    )
