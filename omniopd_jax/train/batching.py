"""The border between host and device: the only place that fetches arrays and the only one that builds global ones.

It also packs what an update has to compute. Of a tree of weights only what counts goes to the devices: equal branches
are merged, branches without weight dropped, and the trunk ends where nothing is weighted any more. What is left still
stands in rows of one width; large batches say in addition which tokens of them count.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from omniopd_jax import gathering
from omniopd_jax.data.prompts import bucket_width
from omniopd_jax.train.sharding import batch_sharding
from omniopd_jax.types import Array, PyTree, TokenTree

# A weight this small beside the largest is what rounding left of an exact 0 (a baseline that equals its reward).
_DUST = 1e-6


def to_host(tree: PyTree) -> PyTree:
    """Every array of a tree as numpy, whole on every process; waits for the devices (and for the other processes)."""
    return gathering.whole(tree)


def to_devices(tree: PyTree, mesh: Mesh, *, axis: int = 0) -> PyTree:
    """Global arrays, B (`axis`) split over data × fsdp. Every process gives all rows; only its devices' rows travel."""
    sharding = batch_sharding(mesh, axis=axis)
    return jax.tree.map(lambda array: gathering.spread(array, sharding), tree)


def sliced(tree: PyTree, start: int, end: int) -> PyTree:
    """These rows of every array. Host arrays."""
    return jax.tree.map(lambda array: array[start:end], tree)


def micro_batches(tree: TokenTree, count: int) -> TokenTree:
    """Splits rows into `count` equal parts along a new first axis: [B, …] → [count, B / count, …]. Host arrays."""
    return jax.tree.map(lambda array: array.reshape(count, array.shape[0] // count, *array.shape[1:]), tree)


def pack(
    tree: TokenTree,
    *,
    groups: int = 1,
    smallest_trunk: int = 16,
    smallest_branches: int = 8,
    list_from: int = 0,
) -> TokenTree:
    """The same loss and gradients from fewer tokens. Host arrays.

    - Equal branches (same response, start and tokens) become one whose weight is their sum.
    - Branches of weight 0 go.
    - The branches that are left move together into R' ≤ R slots. A response with more than R' of them continues in the
      row of one that needs none; its trunk is repeated there without weight. R' is the smallest bucket for which B
      rows are enough.
    - The trunk is cut, to a bucket, after the last token that is weighted or that a branch sees.
    - Of a tree of at least `list_from` positions the tokens that count are listed, where that leaves out 1/16.

    Row order means nothing afterwards: a tree is a sum.

    Args:
      tree: B rows.
      groups: parts of B / groups rows that lie on a device of their own or are computed one after the other.
      smallest_trunk, smallest_branches: the smallest buckets of T' and R'.
      list_from: see `train.list_tokens_from`; 0: no lists.
    """
    row_K, branches = _merged(tree)
    has_weight_BxT = _has_weight(tree)
    rows = len(tree.tokens_BxT)
    count_B = np.bincount(row_K, minlength=rows)
    width = _branch_slots(count_B, has_weight_BxT.any(axis=1), smallest_branches, tree.branch_start_BxR.shape[1])
    source, slots = _layout(count_B, has_weight_BxT.any(axis=1), width)

    end = max(int(np.max(np.flatnonzero(has_weight_BxT.any(axis=0)), initial=-1)) + 1, branches["start"].max(initial=0))
    end = min(max(bucket_width(int(end), smallest=1), smallest_trunk), tree.tokens_BxT.shape[1])
    first_copy = np.zeros(rows, bool)
    first_copy[np.unique(source, return_index=True)[1]] = True

    def trunk(array: np.ndarray) -> np.ndarray:
        return array[source, :end]

    def once(weight: np.ndarray) -> np.ndarray:
        return np.where(first_copy[:, None], trunk(weight), np.float32(0))

    def branch(values: np.ndarray) -> np.ndarray:
        packed = np.zeros((rows, width, *values.shape[1:]), values.dtype)
        for row, numbers in enumerate(slots):
            packed[row, : len(numbers)] = values[numbers]
        return packed

    packed = TokenTree(
        prompt_tokens_BxP=tree.prompt_tokens_BxP[source],
        prompt_mask_BxP=tree.prompt_mask_BxP[source],
        tokens_BxT=trunk(tree.tokens_BxT),
        mask_BxT=trunk(tree.mask_BxT),
        weight_BxT=once(tree.weight_BxT),
        anchor_weight_BxT=once(tree.anchor_weight_BxT),
        branch_tokens_BxRxC=branch(branches["tokens"]),
        branch_mask_BxRxC=branch(branches["mask"]),
        branch_weight_BxRxC=branch(branches["weight"]),
        branch_start_BxR=branch(branches["start"]),
        divergence_weight_BxT=None if tree.divergence_weight_BxT is None else once(tree.divergence_weight_BxT),
        ratio_weight_BxT=None if tree.ratio_weight_BxT is None else once(tree.ratio_weight_BxT),
        old_logprob_BxT=None if tree.old_logprob_BxT is None else trunk(tree.old_logprob_BxT),
        power_BxT=None if tree.power_BxT is None else trunk(tree.power_BxT),
        branch_power_BxR=None if tree.branch_power_BxR is None else branch(branches["power"]),
    )
    return _listed(packed, groups, list_from)


def _has_weight(tree: TokenTree) -> Array:
    """has_weight_BxT: whether a term wants the trunk's token."""
    weights = (tree.weight_BxT, tree.anchor_weight_BxT, tree.divergence_weight_BxT, tree.ratio_weight_BxT)
    return np.any([weight != 0 for weight in weights if weight is not None], axis=0)


def _listed(tree: TokenTree, groups: int, list_from: int) -> TokenTree:
    """The tree with its lists, where they are worth it; then rows change places, so that no list is much longer."""
    trunks = tree.prompt_tokens_BxP.size + tree.tokens_BxT.size
    positions = trunks + tree.branch_tokens_BxRxC[:, :, 1:].size + tree.branch_tokens_BxRxC.size
    if not 0 < list_from <= positions:
        return tree
    is_read, is_scored = _is_read(tree), (tree.branch_weight_BxRxC != 0).reshape(len(tree.tokens_BxT), -1)
    order = _balanced(is_read.sum(axis=1) + is_scored.sum(axis=1), groups)
    # every pair of lengths is a program, so the second has fewer
    read, scored = _places(is_read[order], groups, lengths=16), _places(is_scored[order], groups, lengths=8)
    if read.size + scored.size > positions * 15 / 16:
        return tree
    tree = jax.tree.map(lambda array: array[order], tree)
    return dataclasses.replace(tree, read_UxJxW=read, scored_UxJxW=scored)


def _is_read(tree: TokenTree) -> np.ndarray:
    """is_read [B, P + T + R · (C − 1)]: whether anything that has a weight sees the token."""
    rows, prompt_width = tree.prompt_tokens_BxP.shape
    has_weight_BxT, has_weight_BxRxC = _has_weight(tree), tree.branch_weight_BxRxC != 0
    has_branch_BxR = has_weight_BxRxC.any(axis=2)
    # of the response: all tokens before the last one with a weight, and those that a branch sees
    weighted = np.where(has_weight_BxT, np.arange(has_weight_BxT.shape[1]), -1).max(axis=1, initial=-1)
    seen = np.where(has_branch_BxR, tree.branch_start_BxR, -1).max(axis=1, initial=-1)
    end_B = np.maximum(weighted, seen)
    mask_BxS = np.concatenate([tree.prompt_mask_BxP, tree.mask_BxT], axis=1)
    trunk_BxS = mask_BxS & (np.arange(mask_BxS.shape[1]) < prompt_width + end_B[:, None]) & (end_B >= 0)[:, None]
    # of a branch likewise
    comes_BxRxC = np.flip(np.logical_or.accumulate(np.flip(has_weight_BxRxC, axis=2), axis=2), axis=2)[:, :, 1:]
    branch_BxRxC = comes_BxRxC & tree.branch_mask_BxRxC[:, :, :-1]
    return np.concatenate([trunk_BxS, branch_BxRxC.reshape(rows, -1)], axis=1)


def _balanced(count_B: np.ndarray, groups: int) -> np.ndarray:
    """Rows in an order in which groups of equally many follow each other whose counts are close: dealt to and fro."""
    order = np.arange(len(count_B))
    if groups > 1:
        dealt = np.argsort(-count_B, kind="stable").reshape(-1, groups)
        dealt[1::2] = dealt[1::2, ::-1]
        order = np.sort(dealt.T, axis=1).reshape(-1)
    return order


def _places(counts_BxX: np.ndarray, groups: int, *, lengths: int) -> np.ndarray:
    """place_UxJxW of `models.listing.listing`, where `counts` is True; lists as long as the longest, to a bucket."""
    counts, rows = counts_BxX.reshape(groups, -1), len(counts_BxX) // groups
    width = -(-list_length(int(counts.sum(axis=1).max(initial=0)), lengths) // rows)
    place = np.full((groups, rows * width), counts.shape[1], np.int32)
    for number, of_group in enumerate(counts):
        listed = np.flatnonzero(of_group)
        place[number, : len(listed)] = listed
    return place.reshape(groups, rows, width)


def list_length(count: int, lengths: int) -> int:
    """The smallest bucket that holds `count`: so many of them, a power of two, for each doubling."""
    step = 1 << max(0, count.bit_length() - lengths.bit_length())
    return -(-count // step) * step


def _merged(tree: TokenTree) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(row of each branch that is left, ascending; its tokens, mask, weight, start and power)."""
    width = tree.branch_tokens_BxRxC.shape[2]
    row, slot = np.nonzero((tree.branch_weight_BxRxC != 0).any(axis=2))
    mask = tree.branch_mask_BxRxC[row, slot]
    tokens = np.where(mask, tree.branch_tokens_BxRxC[row, slot], 0).astype(np.int32)
    start = tree.branch_start_BxR[row, slot].astype(np.int32)
    weight = tree.branch_weight_BxRxC[row, slot]
    power_BxR = np.zeros(tree.branch_start_BxR.shape, np.float32)
    power = (power_BxR if tree.branch_power_BxR is None else np.asarray(tree.branch_power_BxR, np.float32))[row, slot]
    if len(row):
        places = [row[:, None], start[:, None], power.view(np.int32)[:, None]]
        key = np.concatenate([*places, mask, tokens], axis=1).astype(np.int32)
        _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
        summed = np.zeros((len(first), width), np.float32)
        np.add.at(summed, group.reshape(-1), weight)
        is_kept = np.abs(summed).max(axis=1) > _DUST * np.abs(weight).max()
        # in the order in which they came
        order = np.argsort(first[is_kept])
        first, weight = first[is_kept][order], summed[is_kept][order]
        row, mask, tokens, start, power = row[first], mask[first], tokens[first], start[first], power[first]
    return row, {"tokens": tokens, "mask": mask, "weight": weight, "start": start, "power": power}


def _rows_needed(count_B: np.ndarray, has_trunk_B: np.ndarray, width: int) -> np.ndarray:
    return np.maximum(-(-count_B // max(width, 1)), has_trunk_B)


def _branch_slots(count_B: np.ndarray, has_trunk_B: np.ndarray, smallest: int, most_slots: int) -> int:
    most = int(count_B.max(initial=0))
    if most == 0:
        return 0
    width = smallest
    while _rows_needed(count_B, has_trunk_B, width).sum() > len(count_B):
        width = bucket_width(width + 1, smallest)
    return min(width, most_slots)


def _layout(count_B: np.ndarray, has_trunk_B: np.ndarray, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(response whose trunk each of the B packed rows holds, numbers of the branches in it)."""
    rows = len(count_B)
    needed_B = _rows_needed(count_B, has_trunk_B, width)
    offset_B = np.cumsum(count_B) - count_B
    source: list[int] = []
    slots: list[np.ndarray] = []
    for response in range(rows):
        numbers = np.arange(offset_B[response], offset_B[response] + count_B[response])
        for piece in range(needed_B[response]):
            source.append(response)
            slots.append(numbers[piece * width : (piece + 1) * width])
    empty = rows - len(source)  # rows left over repeat the first response without weight
    return np.array(source + [source[0] if source else 0] * empty), slots + [np.arange(0)] * empty
