"""The two sources of entropy: the decode loop and a pass of its own."""

import jax
import numpy as np
import pytest

from omniopd_jax import prng
from omniopd_jax.algo.anchors import select_anchors
from omniopd_jax.rollout.rescoring import rescore
from omniopd_jax.rollout.sampler import sample
from tests.rollout.conftest import VOCAB

B, P, T = 6, 5, 24


@pytest.fixture(scope="module")
def rollout(model):
    tokens = np.random.default_rng(0).integers(2, VOCAB, (B, P)).astype(np.int32)
    mask = np.ones((B, P), bool)
    mask[0, :3] = False
    keys = prng.row_keys(jax.random.key(0), np.arange(B))
    return sample(model, tokens, mask, keys, max_new_tokens=T, stop_tokens=(7,), banned_tokens=(0, 1))


def test_both_sources_choose_the_same_anchors_in_float32(model, rollout):
    again = rescore(model, rollout, block_tokens=20)
    np.testing.assert_allclose(again.entropy_BxT, rollout.entropy_BxT, atol=2e-4)
    np.testing.assert_array_equal(again.entropy_BxT[~rollout.mask_BxT], 0)
    ours, theirs = (
        select_anchors(one.entropy_BxT, one.mask_BxT, num_chunks=3, chunk_tokens=3, max_fraction=0.6)
        for one in (rollout, again)
    )
    assert ours.is_valid_BxM.sum() >= B
    np.testing.assert_array_equal(ours.is_valid_BxM, theirs.is_valid_BxM)
    np.testing.assert_array_equal(ours.start_BxM, theirs.start_BxM)


def test_all_else_stays(model, rollout):
    again = rescore(model, rollout)
    for name in ("tokens_BxT", "mask_BxT", "logprob_BxT", "is_finished_B"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rollout, name))
