"""Where the teacher is asked: the paper's peak-entropy scheduler, with a fixed number of slots.

Greedy: the highest entropy first; chunk m covers [start, start + C) and *starts* at its peak; chunks do not overlap; a
chunk that would run past the response is no candidate; a tie goes to the earlier token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omniopd_jax.types import Anchors, Array


def select_anchors(
    entropy_BxT: Array,
    response_mask_BxT: Array,
    *,
    num_chunks: int,
    chunk_tokens: int,
    max_fraction: float = 1.0,
    positions: str = "peak",
    keys_B: Array | None = None,
) -> Anchors:
    """Chooses up to M non-overlapping chunks a response; fewer where fewer fit.

    Greedy choice does not pack: after M peaks, a response may have gaps of up to C − 1 tokens that no chunk fits in.

    Args:
      entropy_BxT: float, nats, of the distribution that produced each token.
      response_mask_BxT: bool, True on the response's tokens, which fill [0, length).
      num_chunks: M, slots a response.
      chunk_tokens: C.
      max_fraction: at most floor(max_fraction · length / C) chunks of a response are audited, so that the rest
        carries the anchor (ours; 1.0 is the paper, whose own ablation collapses where nothing carries it).
      positions: "peak" (the paper) | "entropy_weighted": starts drawn one after the other in proportion to their
        entropy | "random": drawn uniformly | "lowest": the lowest entropy first, a control. The last three are ours.
      keys_B: one typed key a row for the drawn kinds, so that a row's chunks do not depend on its neighbours.

    Returns:
      Anchors with ascending starts in the first slots; start 0 where invalid.
    """
    if entropy_BxT.ndim != 2 or response_mask_BxT.shape != entropy_BxT.shape:
        raise ValueError(
            f"entropy and response mask must both be [B, T], got {entropy_BxT.shape} and {response_mask_BxT.shape}."
        )
    if num_chunks < 1 or chunk_tokens < 1:
        raise ValueError(f"num_chunks and chunk_tokens must be at least 1, got {num_chunks} and {chunk_tokens}.")
    tokens = entropy_BxT.shape[1]
    score_BxT = _scores(entropy_BxT, positions, keys_B)
    position_T = jnp.arange(tokens)
    length_B = jnp.sum(response_mask_BxT, axis=1, dtype=jnp.int32)
    # a table in whole numbers for every length: float32 would round 0.3 · 10 / 3 to either side of 1
    most = jnp.array([int(max_fraction * length / chunk_tokens + 1e-9) for length in range(tokens + 1)], jnp.int32)
    most_B = most[length_B]

    def choose(free_BxT, slot):
        open_score = jnp.where(free_BxT, score_BxT, -jnp.inf)
        start_B = jnp.argmax(open_score, axis=1).astype(jnp.int32)  # the first of equals
        is_valid_B = jnp.any(free_BxT, axis=1) & (slot < most_B)
        is_near = jnp.abs(position_T[None, :] - start_B[:, None]) < chunk_tokens
        return free_BxT & ~(is_near & is_valid_B[:, None]), (start_B, is_valid_B)

    fits_BxT = response_mask_BxT & (position_T[None, :] + chunk_tokens <= length_B[:, None])
    _, (start_MxB, is_valid_MxB) = jax.lax.scan(choose, fits_BxT, jnp.arange(num_chunks))
    start_BxM = jnp.sort(jnp.where(is_valid_MxB, start_MxB, tokens).T, axis=1)
    is_valid_BxM = start_BxM < tokens
    return Anchors(start_BxM=jnp.where(is_valid_BxM, start_BxM, 0), is_valid_BxM=is_valid_BxM)


def _scores(entropy_BxT: Array, positions: str, keys_B: Array | None) -> Array:
    if positions == "peak":
        return entropy_BxT
    if positions == "lowest":
        return -entropy_BxT
    if positions not in ("entropy_weighted", "random"):
        raise ValueError(f'positions={positions!r} must be "peak", "entropy_weighted", "random" or "lowest".')
    if keys_B is None or keys_B.shape != entropy_BxT.shape[:1]:
        raise ValueError(f"positions={positions!r} draws and needs keys_B, one key for each of the B rows.")
    # Gumbel top-k: the greedy order of log w + Gumbel noise is a sequence of draws in proportion to w
    noise_BxT = jax.vmap(lambda key: jax.random.gumbel(key, entropy_BxT.shape[1:]))(keys_B)
    if positions == "random":
        return noise_BxT
    return jnp.log(jnp.maximum(entropy_BxT, jnp.finfo(jnp.float32).tiny)) + noise_BxT


def chunk_values(value_BxT: Array, anchors: Anchors, *, chunk_tokens: int) -> Array:
    """The tokens of each chunk, value_BxMxC; 0 in invalid slots."""
    index_BxMxC = anchors.start_BxM[:, :, None] + jnp.arange(chunk_tokens)
    index_BxMxC = jnp.where(anchors.is_valid_BxM[:, :, None], index_BxMxC, 0)
    rows = jnp.arange(value_BxT.shape[0])[:, None, None]
    return jnp.where(anchors.is_valid_BxM[:, :, None], jnp.asarray(value_BxT)[rows, index_BxMxC], 0)


def spread_chunks(value_BxM: Array, anchors: Anchors, *, tokens: int, chunk_tokens: int) -> Array:
    """Each chunk's value on its C tokens, 0 elsewhere: value_BxT with T = `tokens`.

    A token of two chunks (a start may have been moved to a clean cut) gets the sum, as in the sum over chunks.
    """
    distance_BxMxT = jnp.arange(tokens) - anchors.start_BxM[:, :, None]
    is_inside = (distance_BxMxT >= 0) & (distance_BxMxT < chunk_tokens) & anchors.is_valid_BxM[:, :, None]
    return jnp.sum(jnp.where(is_inside, jnp.asarray(value_BxM)[:, :, None], 0), axis=1)


def chunk_mask(anchors: Anchors, *, tokens: int, chunk_tokens: int) -> Array:
    """True on the tokens of every valid chunk: mask_BxT with T = `tokens`."""
    return spread_chunks(anchors.is_valid_BxM.astype(jnp.int32), anchors, tokens=tokens, chunk_tokens=chunk_tokens) > 0
