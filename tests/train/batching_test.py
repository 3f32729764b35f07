"""Packing changes what is computed, never what is summed."""

from collections import defaultdict

import jax
import numpy as np
import pytest

from omniopd_jax.data.prompts import bucket_width
from omniopd_jax.train import batching
from omniopd_jax.types import TokenTree

B, P, T, R, C = 6, 3, 40, 10, 4


def random_tree(seed: int, *, has_trunk_weight: bool, density: float = 0.7) -> TokenTree:
    """Few distinct branches, so that many are equal; some without weight, some rows without any."""
    rng = np.random.default_rng(seed)
    length_BxR = rng.integers(1, C + 1, (B, R))
    branch_mask = np.arange(C) < length_BxR[..., None]
    weight = rng.normal(size=(B, R, 1)) * (rng.random((B, R, 1)) < density) * (rng.random((B, 1, 1)) < 0.8)
    mask_BxT = np.arange(T) < rng.integers(21, 24, (B, 1))
    is_weighted_BxT = mask_BxT & (np.arange(T) < 12) & (np.arange(B) < 3)[:, None]
    trunk_weight = rng.normal(size=(B, T)) * is_weighted_BxT * has_trunk_weight
    return TokenTree(
        prompt_tokens_BxP=rng.integers(0, 30, (B, P)).astype(np.int32),
        prompt_mask_BxP=np.ones((B, P), bool),
        tokens_BxT=rng.integers(0, 30, (B, T)).astype(np.int32),
        mask_BxT=mask_BxT,
        weight_BxT=trunk_weight.astype(np.float32),
        anchor_weight_BxT=(np.abs(trunk_weight) * (rng.random((B, T)) < 0.5)).astype(np.float32),
        branch_tokens_BxRxC=rng.integers(0, 2, (B, R, C)).astype(np.int32),
        branch_mask_BxRxC=branch_mask,
        branch_weight_BxRxC=(weight * branch_mask).astype(np.float32),
        branch_start_BxR=rng.choice([2, 20], (B, R)).astype(np.int32),
    )


def contents(tree: TokenTree) -> dict[tuple, np.ndarray]:
    """What a tree sums: (prefix, tokens) of each branch → its weights; (prefix, token) of the trunk → its weights."""
    found = defaultdict(float)
    for b in range(len(tree.tokens_BxT)):
        prompt = tuple(tree.prompt_tokens_BxP[b])
        for r in range(tree.branch_start_BxR.shape[1]):
            mask = tree.branch_mask_BxRxC[b, r]
            prefix = prompt + tuple(tree.tokens_BxT[b, : tree.branch_start_BxR[b, r]])
            key = (prefix, tuple(tree.branch_tokens_BxRxC[b, r][mask]))
            found[key] += tree.branch_weight_BxRxC[b, r].astype(np.float64).sum()
        for t in range(tree.tokens_BxT.shape[1]):
            key = (prompt + tuple(tree.tokens_BxT[b, :t]), int(tree.tokens_BxT[b, t]))
            found["trunk", key] += tree.weight_BxT[b, t]
            found["anchor", key] += tree.anchor_weight_BxT[b, t]
    return {key: value for key, value in found.items() if abs(value) > 1e-6}


@pytest.mark.parametrize("has_trunk_weight", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_packing_keeps_every_weight_and_nothing_else(seed, has_trunk_weight):
    tree = random_tree(seed, has_trunk_weight=has_trunk_weight)
    packed = batching.pack(tree, smallest_branches=2)
    before, after = contents(tree), contents(packed)
    assert before.keys() == after.keys()
    np.testing.assert_allclose([after[key] for key in before], list(before.values()), rtol=1e-5, atol=1e-7)
    assert len(packed.tokens_BxT) == B
    assert packed.branch_start_BxR.shape[1] <= R
    assert packed.tokens_BxT.shape[1] == 24


def test_equal_branches_become_one():
    tree = random_tree(0, has_trunk_weight=False, density=1.0)
    tree = jax.tree.map(np.array, tree)
    for array in (tree.branch_tokens_BxRxC, tree.branch_mask_BxRxC, tree.branch_start_BxR):
        array[:] = array[:, :1]
    tree.branch_weight_BxRxC[:] = 0.25
    packed = batching.pack(tree, smallest_branches=1)
    assert packed.branch_start_BxR.shape == (B, 1)
    np.testing.assert_array_equal(packed.branch_weight_BxRxC, np.full((B, 1, C), R * 0.25, np.float32))


def test_weights_that_cancel_are_dropped_and_a_full_row_moves_on_to_an_empty_one():
    tree = jax.tree.map(np.array, random_tree(1, has_trunk_weight=False, density=1.0))
    tree.branch_weight_BxRxC[:] = 0
    tree.branch_weight_BxRxC[0] = np.arange(1, R + 1)[:, None]  # all of the weight in one row
    tree.branch_tokens_BxRxC[0] = np.arange(R)[:, None]  # all different
    packed = batching.pack(tree, smallest_branches=2)
    assert packed.branch_start_BxR.shape[1] == 2  # 10 branches in 5 rows of 2, not one row of 10
    assert sorted(packed.branch_weight_BxRxC[:, :, 0].ravel())[-R:] == list(range(1, R + 1))
    tree.branch_tokens_BxRxC[0] = 1
    tree.branch_mask_BxRxC[0] = True
    tree.branch_start_BxR[0] = 20
    tree.branch_weight_BxRxC[0] = np.where(np.arange(R) % 2, 0.3, -0.3)[:, None]
    tree.branch_weight_BxRxC[1, 0] = 1.0
    assert (batching.pack(tree).branch_weight_BxRxC != 0).any(axis=2).sum() == 1


def test_a_tree_without_any_weight_packs():
    tree = jax.tree.map(np.zeros_like, random_tree(2, has_trunk_weight=False))
    packed = batching.pack(tree)
    assert packed.branch_start_BxR.shape == (B, 0)


def test_buckets_are_few_and_wide_enough():
    sizes = [bucket_width(size, smallest=1) for size in range(1, 2000)]
    assert all(size >= wanted for wanted, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 22
    assert max(size / wanted for wanted, size in enumerate(sizes, start=1)) <= 1.5


def test_micro_batches_are_consecutive_rows():
    tree = random_tree(3, has_trunk_weight=True)
    parts = batching.micro_batches(tree, 3)
    np.testing.assert_array_equal(parts.tokens_BxT[1], tree.tokens_BxT[2:4])


def test_what_only_some_arms_have_is_packed_with_the_rest():
    rng = np.random.default_rng(3)
    rows, tokens, slots = 4, 40, 8
    mask = np.arange(tokens) < np.array([40, 20, 9, 30])[:, None]
    weight = np.where(np.arange(tokens) < 18, rng.normal(size=(rows, tokens)), 0).astype(np.float32) * mask
    power = np.where(np.arange(slots) < 4, 0.5, 0).astype(np.float32) * np.ones((rows, 1), np.float32)
    tree = TokenTree(
        prompt_tokens_BxP=np.zeros((rows, 2), np.int32),
        prompt_mask_BxP=np.ones((rows, 2), bool),
        tokens_BxT=rng.integers(0, 9, (rows, tokens)).astype(np.int32),
        mask_BxT=mask,
        weight_BxT=np.zeros((rows, tokens), np.float32),
        anchor_weight_BxT=np.zeros((rows, tokens), np.float32),
        branch_tokens_BxRxC=np.ones((rows, slots, 2), np.int32),
        branch_mask_BxRxC=np.ones((rows, slots, 2), bool),
        branch_weight_BxRxC=np.ones((rows, slots, 2), np.float32),
        branch_start_BxR=np.ones((rows, slots), np.int32),
        ratio_weight_BxT=weight,
        old_logprob_BxT=rng.normal(size=(rows, tokens)).astype(np.float32),
        divergence_weight_BxT=np.abs(weight),
        power_BxT=np.full((rows, tokens), 0.5, np.float32),
        branch_power_BxR=power,
    )
    packed = batching.pack(tree, smallest_branches=2)
    end = packed.tokens_BxT.shape[1]
    assert 18 <= end < tokens, "the trunk ends where the last of any weight does"
    for name in ("ratio_weight_BxT", "divergence_weight_BxT", "old_logprob_BxT", "power_BxT"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(tree, name)[:, :end])
    # equal branches are one, but not across powers
    np.testing.assert_array_equal(packed.branch_weight_BxRxC, np.full((rows, 2, 2), 4.0))
    np.testing.assert_array_equal(np.sort(packed.branch_power_BxR), [[0, 0.5]] * rows)


def ragged_tree(seed: int, *, has_trunk_weight: bool = False, chunk: int = C) -> TokenTree:
    """`random_tree` with prompts of various lengths and holes in the branches' weights."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(np.array, random_tree(seed, has_trunk_weight=has_trunk_weight))
    tree.prompt_mask_BxP[:] = np.arange(P) >= rng.integers(0, P, (B, 1))
    tree.branch_weight_BxRxC[rng.random((B, R, C)) < 0.3] = 0
    names = ("branch_tokens_BxRxC", "branch_mask_BxRxC", "branch_weight_BxRxC")
    return tree.replace(**{name: getattr(tree, name)[:, :, :chunk] for name in names})


def counting(tree: TokenTree, b: int) -> tuple[set[int], set[int]]:
    """(positions read, positions scored) of a row: a token is read if one with a weight comes after it, on the trunk
    or on a branch that leaves the trunk after it."""
    read, scored = set(), set()
    trunk = list(range(P + tree.tokens_BxT.shape[1]))
    is_real = np.concatenate([tree.prompt_mask_BxP[b], tree.mask_BxT[b]])
    for t in range(tree.tokens_BxT.shape[1]):
        if tree.weight_BxT[b, t] or tree.anchor_weight_BxT[b, t]:
            read |= {s for s in trunk if s < P + t and is_real[s]}
    slots, chunk = tree.branch_tokens_BxRxC.shape[1:]
    for r in range(slots):
        for c in range(chunk):
            if tree.branch_weight_BxRxC[b, r, c]:
                scored.add(r * chunk + c)
                read |= {s for s in trunk if s < P + tree.branch_start_BxR[b, r] and is_real[s]}
                own = {before for before in range(c) if tree.branch_mask_BxRxC[b, r, before]}
                read |= {len(trunk) + r * (chunk - 1) + before for before in own}
    return read, scored


@pytest.mark.parametrize("chunk", [C, 1])
@pytest.mark.parametrize("has_trunk_weight", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_lists_hold_each_token_that_something_with_a_weight_sees(groups, has_trunk_weight, chunk):
    tree = ragged_tree(4, has_trunk_weight=has_trunk_weight, chunk=chunk)
    packed = batching.pack(tree, groups=groups, smallest_branches=2, list_from=1)
    before, after = contents(tree), contents(packed)
    assert before.keys() == after.keys()
    slots = packed.branch_start_BxR.shape[1]
    widths = (P + packed.tokens_BxT.shape[1] + slots * (chunk - 1), slots * chunk)
    rows = B // groups
    for place, width, which in zip((packed.read_UxJxW, packed.scored_UxJxW), widths, (0, 1), strict=True):
        assert place.shape[:2] == (groups, rows)
        lengths = []
        for u in range(groups):
            listed = place[u].ravel()
            want = [j * width + x for j in range(rows) for x in sorted(counting(packed, u * rows + j)[which])]
            np.testing.assert_array_equal(listed[: len(want)], want)
            assert (listed[len(want) :] == rows * width).all()
            lengths.append(len(want))
        assert place[0].size < max(lengths) * (17 / 16, 9 / 8)[which] + rows
    assert packed.read_UxJxW.size + packed.scored_UxJxW.size <= 15 / 16 * B * sum(widths)


def test_small_trees_and_full_ones_have_no_lists():
    tree = ragged_tree(4)
    assert batching.pack(tree).read_UxJxW is None
    assert batching.pack(tree, list_from=10**4).read_UxJxW is None
    full = jax.tree.map(np.array, random_tree(0, has_trunk_weight=False))
    full.prompt_mask_BxP[:] = full.mask_BxT[:] = full.branch_mask_BxRxC[:] = True
    full.weight_BxT[:] = full.branch_weight_BxRxC[:] = 1
    full.branch_tokens_BxRxC[:] = np.arange(R)[:, None]
    assert batching.pack(full, list_from=1).read_UxJxW is None


def test_groups_get_rows_whose_lists_are_about_as_long():
    tree = jax.tree.map(np.array, random_tree(0, has_trunk_weight=False))
    tree.mask_BxT[:] = True
    tree.branch_weight_BxRxC[:] = 0
    end_B = np.array([37, 35, 30, 5, 3, 1])
    tree.anchor_weight_BxT[:] = np.arange(T) == end_B[:, None]
    packed = batching.pack(tree, groups=2, list_from=1)
    found = sorted(tuple(sorted(np.argmax(part, axis=1))) for part in packed.anchor_weight_BxT.reshape(2, 3, -1))
    assert found == [(1, 30, 35), (3, 5, 37)], "not 37 + 35 + 30 and 5 + 3 + 1"


@pytest.mark.parametrize("count", [8, 16])
def test_lengths_of_lists_are_few_and_close(count):
    lengths = [batching.list_length(wanted, count) for wanted in range(5000)]
    assert all(length >= wanted for wanted, length in enumerate(lengths))
    assert max(length - wanted * (1 + 1 / count) for wanted, length in enumerate(lengths)) <= 0
    assert len({length for length in lengths if 512 <= length < 1024}) == count
