"""Laws of listed tokens: what is listed is computed as without a list, what is not is 0 and passes nothing on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.models.listing import listing
from tests.models import parity

TOKENS, MASK = parity.tokens_and_mask()
B, S = TOKENS.shape
R, C = 3, 4
BRANCH_TOKENS, BRANCH_MASK = parity.branch_tokens_and_mask(B, R, C)
RNG = np.random.default_rng(4)
BRANCH_MASK[3] = False  # a row without branches
START = np.array([[3, 9, 9], [8, 12, 20], [1, 9, 15], [5, 5, 20]])
END = np.array([14, 20, 17, 0])  # of each row's trunk so much is read; the last row not at all


def places(is_listed_BxX: np.ndarray, groups: int, spare: int = 3) -> np.ndarray:
    """place_UxJxW from the definition, position by position."""
    rows = len(is_listed_BxX) // groups
    lists = []
    for u in range(groups):
        of_group = is_listed_BxX[u * rows : (u + 1) * rows]
        lists.append([j * of_group.shape[1] + x for j, x in np.argwhere(of_group)])
    width = -(-(max(map(len, lists)) + spare) // rows)
    none = rows * is_listed_BxX.shape[1]
    return np.array([row + [none] * (rows * width - len(row)) for row in lists], np.int32).reshape(groups, rows, width)


def is_read() -> np.ndarray:
    trunk = MASK & (np.arange(S) < END[:, None])
    return np.concatenate([trunk, BRANCH_MASK.reshape(B, R * C)], axis=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_list_holds_what_is_listed_and_gives_it_back(groups):
    is_listed = is_read()
    place = places(is_listed, groups)
    array = RNG.normal(size=(*is_listed.shape, 2, 3)).astype(np.float32)
    moves = listing(place, is_listed.shape[1])
    in_list = np.asarray(moves.in_list(array))
    assert in_list.shape == (B, place.shape[2], 2, 3)
    for u, in_group in enumerate(np.split(in_list, groups)):
        want = np.split(array, groups)[u][np.split(is_listed, groups)[u]]
        in_order = in_group.reshape(-1, 2, 3)
        np.testing.assert_array_equal(in_order[: len(want)], want)
        assert not in_order[len(want) :].any()
    np.testing.assert_array_equal(moves.in_rows(in_list), array * is_listed[..., None, None])


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_go_back_the_way_that_values_came(groups):
    """⟨y, A x⟩ = ⟨Aᵀ y, x⟩ for both moves, and each is the other's transpose."""
    is_listed = is_read()
    moves = listing(places(is_listed, groups), is_listed.shape[1])
    rows = RNG.normal(size=(*is_listed.shape, 2)).astype(np.float32)
    listed = RNG.normal(size=moves.in_list(rows).shape).astype(np.float32)
    for move, inverse, x, y in (
        (moves.in_list, moves.in_rows, rows, listed),
        (moves.in_rows, moves.in_list, listed, rows),
    ):
        out, pull = jax.vjp(move, jnp.asarray(x))
        (gradient,) = pull(jnp.asarray(y))
        np.testing.assert_allclose(np.vdot(y, out), np.vdot(gradient, x), rtol=1e-4)
        np.testing.assert_array_equal(gradient, inverse(y))


@pytest.fixture(scope="module", params=["windows", "experts", "adapters"])
def model(request):
    if request.param == "windows":  # two ropes, a window, soft-caps
        return parity.tiny_model("Gemma 3 (text)", attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
    if request.param == "experts":
        return parity.tiny_model("Qwen3-MoE")
    adapted = models.add_adapters(parity.tiny_model("SmolLM2"), jax.random.key(1), rank=3, alpha=6.0)
    noisy = jax.tree.map(lambda x: x + 0.1 * RNG.standard_normal(x.shape).astype(np.float32), adapted.adapters)
    return dataclasses.replace(adapted, adapters=noisy)


def test_a_listed_tree_and_its_gradients_are_those_of_the_whole_tree(model):
    trunk_weight = RNG.normal(size=(B, S, 1)) * is_read()[:, :S, None]
    branch_weight = RNG.normal(size=(B, R, C, 1)) * BRANCH_MASK[..., None]

    def loss(trained, place):
        changed = {"params": trained} if model.adapters is None else {"adapters": trained}
        both = models.read_tree(
            dataclasses.replace(model, **changed), TOKENS, MASK, BRANCH_TOKENS, BRANCH_MASK, START, place_UxJxW=place
        )
        return jnp.sum(jnp.sin(both[0]) * trunk_weight) + jnp.sum(jnp.sin(both[1]) * branch_weight), both

    gradient = parity.quick_jit(jax.grad(loss, has_aux=True))
    trained = model.params if model.adapters is None else model.adapters
    plain, (hidden, branch_hidden) = gradient(trained, None)
    for groups in (1, 2):
        ours, (listed, branch_listed) = gradient(trained, places(is_read(), groups))
        for found, want, is_listed in (
            (listed, hidden, is_read()[:, :S]),
            (branch_listed, branch_hidden, BRANCH_MASK),
        ):
            np.testing.assert_allclose(np.asarray(found)[is_listed], np.asarray(want)[is_listed], atol=2e-5, rtol=1e-5)
            assert not np.asarray(found)[~is_listed].any()
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)


def test_sequences_without_branches_are_listed_too(model):
    whole, _ = parity.quick_jit(models.read)(model, TOKENS, MASK)
    is_listed = is_read()[:, :S]
    found, _ = parity.quick_jit(models.read)(model, TOKENS, MASK, place_UxJxW=places(is_listed, 1))
    np.testing.assert_allclose(np.asarray(found)[is_listed], np.asarray(whole)[is_listed], atol=2e-5, rtol=1e-5)
