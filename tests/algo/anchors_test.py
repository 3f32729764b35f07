"""The scheduler against a brute-force reading of the paper, and what must hold of every choice."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd_jax.algo.anchors import chunk_mask, chunk_values, select_anchors, spread_chunks
from omniopd_jax.types import Anchors

T = 20
SHAPES = [(3, 1, 0.4), (4, 3, 1.0), (10, 2, 0.5), (2, 20, 1.0), (2, 21, 1.0)]  # M, C, cap
select = jax.jit(select_anchors, static_argnames=("num_chunks", "chunk_tokens", "max_fraction", "positions"))


def brute_force(entropy, length, num_chunks, chunk_tokens, max_fraction):
    """The paper's words: again and again the highest entropy whose chunk fits and overlaps with none."""
    starts = []
    for _ in range(num_chunks):
        if (len(starts) + 1) * chunk_tokens > max_fraction * length + 1e-6:
            break
        fitting = [
            t
            for t in range(length - chunk_tokens + 1)
            if all(t + chunk_tokens <= s or s + chunk_tokens <= t for s in starts)
        ]
        if not fitting:
            break
        starts.append(max(fitting, key=lambda t: (entropy[t], -t)))
    return sorted(starts)


def starts_of(anchors, row):
    return np.asarray(anchors.start_BxM)[row][np.asarray(anchors.is_valid_BxM)[row]].tolist()


# few distinct values: most rows hold ties
rows = st.lists(st.integers(0, 5), min_size=T, max_size=T)
batches = st.lists(st.tuples(rows, st.integers(0, T)), min_size=4, max_size=4)


@pytest.mark.parametrize(("num_chunks", "chunk_tokens", "max_fraction"), SHAPES)
@settings(max_examples=40, deadline=None)
@given(batch=batches)
def test_peaks_are_those_of_the_brute_force(num_chunks, chunk_tokens, max_fraction, batch):
    entropy = np.array([row for row, _ in batch], np.float32)
    length = np.array([length for _, length in batch])
    anchors = select(
        entropy,
        np.arange(T) < length[:, None],
        num_chunks=num_chunks,
        chunk_tokens=chunk_tokens,
        max_fraction=max_fraction,
    )
    assert anchors.start_BxM.shape == anchors.is_valid_BxM.shape == (4, num_chunks)
    assert anchors.start_BxM.dtype == jnp.int32
    for row in range(4):
        assert starts_of(anchors, row) == brute_force(entropy[row], length[row], num_chunks, chunk_tokens, max_fraction)
    np.testing.assert_array_equal(np.where(anchors.is_valid_BxM, 0, anchors.start_BxM), 0)


KINDS = ["peak", "entropy_weighted", "random"]
SETTINGS = dict(num_chunks=4, chunk_tokens=3, max_fraction=0.6)


@pytest.mark.parametrize("positions", KINDS)
@settings(max_examples=40, deadline=None)
@given(batch=batches, seed=st.integers(0, 2**31 - 1))
def test_every_choice_fits_and_none_overlaps(positions, batch, seed):
    entropy = np.array([row for row, _ in batch], np.float32)
    length = np.array([length for _, length in batch])
    keys = jax.random.split(jax.random.key(seed), 4)
    anchors = select(entropy, np.arange(T) < length[:, None], positions=positions, keys_B=keys, **SETTINGS)
    for row in range(4):
        starts = starts_of(anchors, row)
        assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(starts))
        assert all(0 <= start <= length[row] - 3 for start in starts)
        assert 3 * len(starts) <= 0.6 * length[row] + 1e-6
        assert starts or length[row] < 5  # 0.6 · 5 tokens hold one chunk


@pytest.mark.parametrize("positions", KINDS)
def test_a_row_depends_on_neither_neighbours_nor_order_nor_padding(positions):
    rng = np.random.default_rng(2)
    entropy, length = rng.random((4, T), np.float32), np.array([20, 15, 9, 12])
    mask, keys = np.arange(T) < length[:, None], jax.random.split(jax.random.key(3), 4)
    chosen = functools.partial(select, positions=positions, **SETTINGS)
    whole = chosen(entropy, mask, keys_B=keys)
    order = np.array([3, 1, 0, 2])
    permuted = chosen(entropy[order], mask[order], keys_B=keys[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), whole, permuted)
    others = np.arange(4)[:, None] != 2
    company = chosen(np.where(others, 1 - entropy, entropy), mask | others, keys_B=keys)
    assert starts_of(company, 2) == starts_of(whole, 2) != []
    wide = np.pad(entropy, ((0, 0), (0, 7)), constant_values=9.0), np.pad(mask, ((0, 0), (0, 7)))
    jax.tree.map(np.testing.assert_array_equal, whole, chosen(*wide, keys_B=keys))


def test_jit_changes_nothing():
    entropy = np.random.default_rng(0).random((4, T), np.float32)
    mask, keys = np.arange(T) < np.array([20, 3, 11, 0])[:, None], jax.random.split(jax.random.key(1), 4)
    plain, jitted = (f(entropy, mask, positions="random", keys_B=keys, **SETTINGS) for f in (select_anchors, select))
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)


def frequencies(positions, entropy, draws=6000):
    """How often each start comes out as the pair of chosen starts, over many keys."""
    anchors = select(
        np.broadcast_to(entropy, (draws, len(entropy))),
        np.ones((draws, len(entropy)), bool),
        num_chunks=2,
        chunk_tokens=1,
        positions=positions,
        keys_B=jax.random.split(jax.random.key(4), draws),
    )
    counts = np.zeros((len(entropy), len(entropy)))
    np.add.at(counts, tuple(np.asarray(anchors.start_BxM).T), 1.0)
    return counts / draws


@pytest.mark.parametrize(("positions", "exponent"), [("entropy_weighted", 1.0), ("random", 0.0)])
def test_draws_are_without_replacement_in_proportion_to_their_weights(positions, exponent):
    entropy = np.array([0.5, 1.0, 2.0, 0.1], np.float32)
    share = entropy**exponent / np.sum(entropy**exponent)
    expected = np.zeros((4, 4))
    for first in range(4):
        for second in set(range(4)) - {first}:
            pair = min(first, second), max(first, second)
            expected[pair] += share[first] * share[second] / (1 - share[first])
    # 4 standard errors of a share near one half
    np.testing.assert_allclose(frequencies(positions, entropy), expected, atol=4 * 0.5 / np.sqrt(6000))


def test_zero_entropy_is_drawn_last_and_not_never():
    counts = frequencies("entropy_weighted", np.array([0.0, 1.0, 0.0, 0.0], np.float32))
    assert counts[0, 1] + counts[1, 2] + counts[1, 3] == 1.0


def test_the_cap_is_counted_in_whole_numbers():
    # 0.3 · 10 / 3 is 1 on paper; a float a hair below would audit nothing
    entropy, mask = np.ones((1, 10), np.float32), np.ones((1, 10), bool)
    anchors = select(entropy, mask, num_chunks=4, chunk_tokens=3, max_fraction=0.3)
    assert starts_of(anchors, 0) == [0]
    assert starts_of(select(entropy, mask, num_chunks=4, chunk_tokens=3, max_fraction=0.29), 0) == []


def test_chunks_are_cut_out_and_put_back():
    anchors = Anchors(start_BxM=np.array([[1, 4, 0]]), is_valid_BxM=np.array([[True, True, False]]))
    value = np.arange(8.0)[None]
    chunks = chunk_values(value, anchors, chunk_tokens=2)
    np.testing.assert_array_equal(chunks, [[[1, 2], [4, 5], [0, 0]]])
    np.testing.assert_array_equal(
        spread_chunks(np.array([[10.0, 20.0, 30.0]]), anchors, tokens=8, chunk_tokens=2), [[0, 10, 10, 0, 20, 20, 0, 0]]
    )
    np.testing.assert_array_equal(
        chunk_mask(anchors, tokens=8, chunk_tokens=2), np.array([[0, 1, 1, 0, 1, 1, 0, 0]], bool)
    )


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(num_chunks=0, chunk_tokens=2), "num_chunks and chunk_tokens must be at least 1"),
        (dict(num_chunks=1, chunk_tokens=2, positions="peaks"), "positions='peaks' must be"),
        (dict(num_chunks=1, chunk_tokens=2, positions="random"), "needs keys_B"),
    ],
)
def test_settings_that_cannot_run_are_named(settings_, message):
    with pytest.raises(ValueError, match=message):
        select_anchors(np.ones((2, 4), np.float32), np.ones((2, 4), bool), **settings_)
