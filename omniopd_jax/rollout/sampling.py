"""From logits to a token: the draw itself, and what the model thought of it.

One uniform number a draw and the inverse of the cumulative distribution, instead of V Gumbel variates: the
exponentials are needed for the log-probability anyway. Shared by the sampler, the refilled sampler and the branches.

Extra axes here: A independent distributions, Q draws from each; the vocabulary as U blocks of W tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from omniopd_jax.models import tiles
from omniopd_jax.types import Array


@dataclasses.dataclass(frozen=True)
class SamplingRule:
    """How tokens are drawn and when a row ends. Hashable: a static argument of the jitted loops."""

    temperature: float = 1.0  # divides the logits; 0: greedy, ties to the smaller token id
    top_k: int = 0  # keep the k likeliest tokens (ties with the last one stay too); 0: all
    top_p: float = 1.0  # of these keep the fewest likeliest ones that hold this probability; 1: all
    min_p: float = 0.0  # of these keep those at least this likely relative to the likeliest; 0: all
    stop_tokens: tuple[int, ...] = ()  # a row ends with the first of these
    banned_tokens: tuple[int, ...] = ()  # never drawn: padding, start tokens, whatever would corrupt lengths

    def check(self, vocab_size: int) -> None:
        """Raises ValueError with one sentence for the first setting that cannot be."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or the number of tokens to keep, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}.")
        for name in ("stop_tokens", "banned_tokens"):
            for token in getattr(self, name):
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} holds {token}, which is no id of a vocabulary of {vocab_size}.")
        if self.stop_tokens and set(self.stop_tokens) <= set(self.banned_tokens):
            raise ValueError(f"every stop token {self.stop_tokens} is banned: no response could ever end.")
        if len(set(self.banned_tokens)) >= vocab_size:
            raise ValueError("every token of the vocabulary is banned.")


@struct.dataclass
class Draw:
    """What was drawn from A distributions, Q times each."""

    token_AxQ: Array  # int32
    logprob_AxQ: Array  # float32, nats, at temperature 1 over the full vocabulary, banned tokens included
    entropy_A: Array  # float32, nats, of the same distribution


def draw_from_hidden(
    hidden_AxD: Array,
    uniform_AxQ: Array,
    rule: SamplingRule,
    *,
    head: tiles.Matrix,
    logit_softcap: float | None = None,
    block_logits: int = 2**26,
) -> Draw:
    """`draw` from hidden states that have passed the final norm.

    Args:
      hidden_AxD: compute dtype; the logits come out in float32.
      uniform_AxQ: in [0, 1).
      rule: see SamplingRule.
      head: the output projection.
      logit_softcap: c of c · tanh(logits / c), or None.
      block_logits: logits that may exist at once; more rows are taken in equal blocks (M·N branches of many responses
        with a vocabulary of 150,000 would fill a device).
    """

    def drawn_from(hidden_AxD, uniform_AxQ):
        logits_AxV = tiles.product(hidden_AxD, head, jnp.float32)
        if logit_softcap is not None:
            logits_AxV = logit_softcap * jnp.tanh(logits_AxV / logit_softcap)
        return draw(logits_AxV, uniform_AxQ, rule)

    rows = hidden_AxD.shape[0]
    num_blocks = -(-rows // max(1, block_logits // tiles.num_columns(head)))
    if num_blocks <= 1:
        return drawn_from(hidden_AxD, uniform_AxQ)
    block = -(-rows // num_blocks)

    def split(array):
        return jnp.pad(array, ((0, num_blocks * block - rows), (0, 0))).reshape(num_blocks, block, -1)

    drawn = jax.lax.map(lambda pair: drawn_from(*pair), (split(hidden_AxD), split(uniform_AxQ)))
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:])[:rows], drawn)


def uniforms(keys_A: Array, step_A: Array) -> jax.Array:
    """uniform_A in [0, 1), each a function of its own key and its own step alone."""
    return jax.vmap(lambda key, step: jax.random.uniform(jax.random.fold_in(key, step)))(keys_A, step_A)


def draw(logits_AxV: Array, uniform_AxQ: Array, rule: SamplingRule) -> Draw:
    """Draws Q tokens from each of A distributions; float32 throughout.

    The log-probability and the entropy are the model's own (temperature 1, nothing banned or cut off), so that they
    equal those of a full forward pass; only the choice obeys the rule.

    Args:
      logits_AxV: of the next token; -inf is allowed.
      uniform_AxQ: in [0, 1), one a draw. Ignored when greedy.
      rule: see SamplingRule.
    """
    logits_AxV = logits_AxV.astype(jnp.float32)
    shifted_AxV = logits_AxV - jnp.max(logits_AxV, axis=-1, keepdims=True)
    weight_AxV = jnp.exp(shifted_AxV)
    total_A = jnp.sum(weight_AxV, axis=-1)
    # 0 · (-inf) is NaN: sum only where there is weight.
    mean_A = jnp.sum(jnp.where(weight_AxV > 0, weight_AxV * shifted_AxV, 0.0), axis=-1) / total_A
    log_total_A = jnp.log(total_A)

    if rule.banned_tokens:
        is_banned_V = np.zeros(logits_AxV.shape[-1], bool)
        is_banned_V[list(rule.banned_tokens)] = True
        allowed_AxV = jnp.where(is_banned_V, -jnp.inf, logits_AxV)
    else:
        allowed_AxV = logits_AxV
    if rule.temperature == 0:
        token_AxQ = jnp.broadcast_to(jnp.argmax(allowed_AxV, axis=-1)[:, None], uniform_AxQ.shape)
    else:
        if rule.banned_tokens or rule.temperature != 1:
            # A new maximum: next to a likely banned token the others' exponentials would underflow.
            peak_Ax1 = jnp.max(allowed_AxV, axis=-1, keepdims=True)
            weight_AxV = jnp.exp((allowed_AxV - peak_Ax1) / rule.temperature)
        token_AxQ = inverse_cdf(truncate(weight_AxV, rule), uniform_AxQ)
    token_AxQ = token_AxQ.astype(jnp.int32)
    logprob_AxQ = jnp.take_along_axis(shifted_AxV, token_AxQ, axis=-1) - log_total_A[:, None]
    return Draw(token_AxQ=token_AxQ, logprob_AxQ=logprob_AxQ, entropy_A=log_total_A - mean_A)


def truncate(weight_AxV: Array, rule: SamplingRule) -> jax.Array:
    """Sets to 0 what top-k, then top-p of the rest, then min-p cut off.

    Args:
      weight_AxV: float32 in [0, 1], 1 at the likeliest token; probabilities up to a factor.
    """
    if rule.top_k:
        threshold_Ax1 = _largest_threshold(
            weight_AxV, lambda is_kept_AxV: jnp.sum(is_kept_AxV, axis=-1, keepdims=True) >= rule.top_k
        )
        weight_AxV = jnp.where(weight_AxV >= threshold_Ax1, weight_AxV, 0.0)
    if rule.top_p < 1:
        total_AxV = weight_AxV
        target_Ax1 = rule.top_p * jnp.sum(weight_AxV, axis=-1, keepdims=True)
        threshold_Ax1 = _largest_threshold(
            weight_AxV,
            lambda is_kept_AxV: jnp.sum(jnp.where(is_kept_AxV, total_AxV, 0.0), axis=-1, keepdims=True) >= target_Ax1,
        )
        weight_AxV = jnp.where(weight_AxV >= threshold_Ax1, weight_AxV, 0.0)
    if rule.min_p > 0:
        weight_AxV = jnp.where(weight_AxV >= rule.min_p, weight_AxV, 0.0)
    return weight_AxV


def _largest_threshold(weight_AxV: Array, is_enough: Callable[[Array], Array]) -> jax.Array:
    """The largest float32 threshold_Ax1 for which the weights not below it are enough; 0 where nothing is.

    Bisection over the bit patterns of float32, which are ordered like the numbers themselves: exact after 30 passes,
    several times cheaper than sorting the vocabulary.
    """

    def halve(_, bounds):
        low_Ax1, high_Ax1 = bounds  # enough at low, not enough at high
        middle_Ax1 = (low_Ax1 + high_Ax1) // 2
        is_enough_Ax1 = is_enough(weight_AxV >= jax.lax.bitcast_convert_type(middle_Ax1, jnp.float32))
        return jnp.where(is_enough_Ax1, middle_Ax1, low_Ax1), jnp.where(is_enough_Ax1, high_Ax1, middle_Ax1)

    low_Ax1 = jnp.zeros((weight_AxV.shape[0], 1), jnp.int32)
    above_one = np.float32(1.0).view(np.int32) + 1  # no weight reaches it
    low_Ax1, _ = jax.lax.fori_loop(0, 30, halve, (low_Ax1, jnp.full_like(low_Ax1, above_one)))
    return jax.lax.bitcast_convert_type(low_Ax1, jnp.float32)


def inverse_cdf(weight_AxV: Array, uniform_AxQ: Array) -> jax.Array:
    """The token at which the cumulative weight first exceeds uniform · total; never one of weight 0.

    Two levels, about sqrt(V) blocks of about sqrt(V) tokens: cheaper than a cumulative sum over the vocabulary, and
    its float32 sums are short. Rounding can leave no candidate at either level (or one without weight where sums of
    different association disagree), so candidates must have weight and the last one with weight stands in.

    Args:
      weight_AxV: float32, not negative, at least one positive in each row.
      uniform_AxQ: float32 in [0, 1). Their grain is 2^-23, so rarer tokens come out only approximately in proportion.

    Returns:
      token_AxQ, int32 in [0, V).
    """
    vocab_size = weight_AxV.shape[-1]
    block = 1 << (vocab_size.bit_length() // 2)
    num_blocks = -(-vocab_size // block)
    weight_AxV = jnp.pad(weight_AxV, ((0, 0), (0, num_blocks * block - vocab_size)))
    weight_AxUxW = weight_AxV.reshape(-1, num_blocks, block)
    sum_AxU = jnp.sum(weight_AxUxW, axis=-1)
    cumulative_AxU = jnp.cumsum(sum_AxU, axis=-1)
    target_AxQ = uniform_AxQ * cumulative_AxU[:, -1:]
    index_AxQ = _first_above(cumulative_AxU[:, None], sum_AxU[:, None], target_AxQ)
    before_AxU = cumulative_AxU - sum_AxU
    rest_AxQ = target_AxQ - jnp.take_along_axis(before_AxU, index_AxQ, axis=1)
    inside_AxQxW = jnp.take_along_axis(weight_AxUxW, index_AxQ[..., None], axis=1)
    offset_AxQ = _first_above(jnp.cumsum(inside_AxQxW, axis=-1), inside_AxQxW, rest_AxQ)
    # Weights that are not numbers have no candidate at all; the index stays legal and the log-probability tells.
    return jnp.clip(index_AxQ * block + offset_AxQ, 0, vocab_size - 1)


def _first_above(cumulative_AxQxU: Array, weight_AxQxU: Array, target_AxQ: Array) -> jax.Array:
    """index_AxQ of the first positive weight whose cumulative sum exceeds the target, else of the last positive one."""
    has_weight = weight_AxQxU > 0
    is_candidate = (cumulative_AxQxU > target_AxQ[..., None]) & has_weight
    last = weight_AxQxU.shape[-1] - 1 - jnp.argmax(has_weight[..., ::-1], axis=-1)
    return jnp.where(jnp.any(is_candidate, axis=-1), jnp.argmax(is_candidate, axis=-1), last).astype(jnp.int32)
