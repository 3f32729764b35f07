"""From verdicts to weights: who carries what, over which denominator, and that baselines keep the gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo import arms
from omniopd_jax.types import Anchors

B, T, M, C, G = 3, 8, 2, 2, 3
MASK = np.arange(T) < np.array([8, 5, 7])[:, None]
ANCHORS = Anchors(
    start_BxM=np.array([[1, 5], [3, 0], [0, 4]], np.int32),
    is_valid_BxM=np.array([[True, True], [True, False], [True, True]]),
)
PRIOR = np.array([[0.5, 0.2], [0.3, 0.0], [0.9, 0.6]], np.float32)
COUNT = np.array([[4, 0], [1, 0], [3, 4]], np.float32)  # chunk (0, 1) heard nothing
SCORE_SUM = np.array([[3.0, 0.0], [0.25, 0.0], [1.5, 4.0]], np.float32)
AGREEMENT = np.array([[0.6, 0.0], [0.7, 0.0], [0.4, 1.0]], np.float32)
AUDITED = np.array([[True, False], [True, False], [True, True]])
TARGET = np.where(COUNT > 0, (SCORE_SUM + 2.0 * PRIOR) / (COUNT + 2.0), PRIOR)


verify_arm = jax.jit(arms.verify, static_argnames=("chunk_tokens", "normalise", "baseline"))
branch_arm = jax.jit(arms.branch, static_argnames="normalise")


def verify(**changes):
    settings = dict(chunk_tokens=C, prior_strength=2.0) | changes
    return verify_arm(MASK, ANCHORS, PRIOR, SCORE_SUM, COUNT, AGREEMENT, **settings)


def anchor_weights(is_audited, denominator, anchor_tokens="unaudited"):
    settings = dict(chunk_tokens=C, anchor_weight=0.1, anchor_tokens=anchor_tokens, denominator=denominator)
    return arms.anchor_weights(MASK, ANCHORS, is_audited, **settings)


def by_hand(value, denominator):
    """Token weights from chunk values, written out."""
    weight = np.zeros((B, T))
    for row, slot in zip(*np.nonzero(AUDITED), strict=True):
        start = ANCHORS.start_BxM[row, slot]
        weight[row, start : start + C] = value[row, slot] / denominator
    return weight


@pytest.mark.parametrize(("normalise", "denominator"), [("token", 20), ("sequence", 3)])
def test_published_weights_are_the_targets_over_the_denominator(normalise, denominator):
    weight, targets = verify(normalise=normalise)
    np.testing.assert_allclose(weight, by_hand(TARGET, denominator), rtol=1e-6)
    np.testing.assert_allclose(targets.target_BxM, TARGET, rtol=1e-6)
    np.testing.assert_array_equal(targets.is_audited_BxM, AUDITED)
    np.testing.assert_array_equal(targets.prior_BxM, PRIOR)
    # a chunk that heard nothing is not audited: its tokens carry the anchor
    unaudited = MASK & (by_hand(np.ones((B, M)), 1) == 0)
    assert unaudited[0, 5]
    over = arms.batch_denominator(MASK, normalise=normalise)
    carried = anchor_weights(targets.is_audited_BxM, over)
    np.testing.assert_allclose(carried, np.where(unaudited, 0.1 / denominator, 0), rtol=1e-6)
    everywhere = anchor_weights(targets.is_audited_BxM, over, "all")
    np.testing.assert_allclose(everywhere, np.where(MASK, 0.1 / denominator, 0), rtol=1e-6)


def test_rows_of_padding_are_no_responses():
    mask = np.concatenate([MASK, np.zeros((2, T), bool)])
    assert arms.batch_denominator(mask, normalise="sequence") == 3
    assert arms.batch_denominator(mask, normalise="token") == 20
    assert arms.batch_denominator(mask[3:], normalise="token") == 1


def test_parts_of_a_batch_with_its_denominator_are_the_batch():
    whole = verify(denominator=jnp.float32(20))
    for row in range(B):
        part = verify_arm(
            MASK[row : row + 1],
            jax.tree.map(lambda x, row=row: x[row : row + 1], ANCHORS),
            *(x[row : row + 1] for x in (PRIOR, SCORE_SUM, COUNT, AGREEMENT)),
            chunk_tokens=C,
            prior_strength=2.0,
            denominator=jnp.float32(20),
        )
        np.testing.assert_array_equal(part.weight_BxT[0], whole.weight_BxT[row])


def test_leave_one_out_takes_the_group_then_the_batch():
    # rows 0 and 2 are one prompt's; row 1 stands alone and is measured against the rest of the batch
    advantage = verify(baseline="leave_one_out", group_B=np.array([7, 9, 7])).targets.advantage_BxM
    others = np.array([np.mean(TARGET[2]), np.mean([TARGET[0, 0], *TARGET[2]]), TARGET[0, 0]])
    np.testing.assert_allclose(advantage, np.where(AUDITED, TARGET - others[:, None], 0), rtol=1e-5, atol=1e-7)
    ungrouped = verify(baseline="leave_one_out").targets.advantage_BxM
    others = np.array([np.mean([TARGET[1, 0], *TARGET[2]]), others[1], np.mean([TARGET[0, 0], TARGET[1, 0]])])
    np.testing.assert_allclose(ungrouped, np.where(AUDITED, TARGET - others[:, None], 0), rtol=1e-5, atol=1e-7)


def test_a_group_without_another_audited_chunk_falls_back_on_the_batch():
    heard = COUNT * np.array([[1], [1], [0]], np.float32)  # row 0's peer heard nothing
    result = verify_arm(
        MASK, ANCHORS, PRIOR, SCORE_SUM, heard, AGREEMENT,
        chunk_tokens=C, prior_strength=2.0, baseline="leave_one_out", group_B=np.array([7, 9, 7]),
    )  # fmt: skip
    np.testing.assert_allclose(result.targets.advantage_BxM[0, 0], TARGET[0, 0] - TARGET[1, 0], rtol=1e-5)


def test_alone_in_the_batch_there_is_no_baseline():
    one = [x[:1] for x in (MASK, PRIOR, SCORE_SUM, COUNT, AGREEMENT)]
    result = verify_arm(
        one[0], jax.tree.map(lambda x: x[:1], ANCHORS), *one[1:],
        chunk_tokens=C, prior_strength=2.0, baseline="leave_one_out",
    )  # fmt: skip
    np.testing.assert_allclose(result.targets.advantage_BxM, np.where(AUDITED, TARGET, 0)[:1], rtol=1e-6)


def test_teacher_agreement_is_what_one_more_text_of_the_teacher_would_earn():
    advantage = verify(baseline="teacher_agreement").targets.advantage_BxM
    baseline = np.where(COUNT >= 2, COUNT * AGREEMENT / (COUNT + 2.0), 0)
    np.testing.assert_allclose(advantage, np.where(AUDITED, TARGET - baseline, 0), rtol=1e-5, atol=1e-7)
    # a chunk as like the teacher's texts as they are to each other keeps the prior's share alone
    level = verify_arm(
        MASK, ANCHORS, PRIOR, COUNT * AGREEMENT, COUNT, AGREEMENT,
        chunk_tokens=C, prior_strength=2.0, baseline="teacher_agreement",
    )  # fmt: skip
    np.testing.assert_allclose(
        np.asarray(level.targets.advantage_BxM)[COUNT >= 2], (2.0 * PRIOR / (COUNT + 2.0))[COUNT >= 2], rtol=1e-5
    )


def one_token_policy():
    """A categorical policy over three texts of one token: its scores ∇ log π(x) and probabilities, exactly."""
    probability = np.array([0.2, 0.5, 0.3])
    return probability, np.eye(3) - probability  # score[x] = onehot(x) − π, the gradient in the logits


@pytest.mark.parametrize("group", [[0, 0, 0], [0, 1, 0], [0, 1, 2]])
def test_leave_one_out_keeps_the_expected_gradient_and_lowers_its_variance(group):
    """By enumeration of everything that three responses of one token can be."""
    probability, score = one_token_policy()
    similarity = np.array([0.9, 0.5, 0.4])
    moments = {}
    for baseline in ("none", "leave_one_out"):
        expected, second = np.zeros(3), 0.0
        for texts in itertools.product(range(3), repeat=3):
            texts = np.array(texts)
            result = verify_arm(
                np.ones((3, 1), bool),
                Anchors(start_BxM=np.zeros((3, 1), np.int32), is_valid_BxM=np.ones((3, 1), bool)),
                probability[texts, None].astype(np.float32),
                similarity[texts, None].astype(np.float32),
                np.ones((3, 1), np.float32),
                np.zeros((3, 1), np.float32),
                chunk_tokens=1,
                prior_strength=0.5,
                baseline=baseline,
                group_B=np.array(group),
            )
            gradient = np.asarray(result.weight_BxT, np.float64)[:, 0] @ score[texts]
            chance = np.prod(probability[texts])
            expected += chance * gradient
            second += chance * gradient @ gradient
        moments[baseline] = expected, second - expected @ expected
    np.testing.assert_allclose(moments["none"][0], moments["leave_one_out"][0], atol=1e-7)
    assert moments["leave_one_out"][1] < 0.5 * moments["none"][1]


PHI = np.array([[1.0, 0.4, 0.1], [0.4, 1.0, 0.3], [0.1, 0.3, 1.0]])
TEACHER = np.array([2, 2, 0, 1])  # the teacher's texts from this start


def branch_of(texts, repulsion):
    """The arm on every row of `texts` (outcomes × G), each a response of one token with one audited start."""
    outcomes, branches = texts.shape
    pairs = PHI[texts[:, :, None], texts[:, None, :]]
    others = (pairs.sum(2) - 1.0) / (branches - 1)
    return branch_arm(
        np.ones((outcomes, 1), bool),
        Anchors(start_BxM=np.zeros((outcomes, 1), np.int32), is_valid_BxM=np.ones((outcomes, 1), bool)),
        np.ones((outcomes, 1, branches, 1), bool),
        PHI[texts][:, :, TEACHER].mean(2)[:, None].astype(np.float32),
        others[:, None].astype(np.float32),
        np.full((outcomes, 1), 4.0, np.float32),
        repulsion=repulsion,
        denominator=jnp.float32(1),
    )


@pytest.mark.parametrize("repulsion", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("branches", [2, 3, 4])
def test_branch_is_an_unbiased_gradient_of_attraction_less_repulsion(branches, repulsion):
    """E φ(x, teacher) − λ/2 E φ(x, x'), by enumeration of every set of branches."""
    probability, score = one_token_policy()
    texts = np.array(list(itertools.product(range(3), repeat=branches)))
    weight = np.asarray(branch_of(texts, repulsion).branch_weight_BxRxC, np.float64)[:, :, 0]
    chance = np.prod(probability[texts], axis=1)
    expected = np.einsum("o,og,ogv->v", chance, weight, score[texts])
    attraction = PHI[:, TEACHER].mean(1)
    exact = (probability * (attraction - repulsion * PHI @ probability)) @ score
    np.testing.assert_allclose(expected, exact, atol=1e-7)


def test_equal_branches_teach_nothing():
    weights = branch_of(np.array([[1, 1, 1, 1], [2, 2, 2, 2]]), repulsion=1.0)
    np.testing.assert_allclose(weights.branch_weight_BxRxC, 0.0, atol=1e-7)


def test_branch_weights_stand_where_the_tree_wants_them():
    rng = np.random.default_rng(0)
    score = rng.random((B, M, G)).astype(np.float32)
    mask = rng.random((B, M, G, C)) < 0.7
    weights = branch_arm(MASK, ANCHORS, mask, score, np.zeros_like(score), COUNT, repulsion=0.0)
    expected = (score - (score.sum(2, keepdims=True) - score) / 2) * AUDITED[:, :, None]
    np.testing.assert_allclose(weights.advantage_BxMxG, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        weights.branch_weight_BxRxC, (expected[..., None] * mask / (G * 20)).reshape(B, M * G, C), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(weights.is_audited_BxM, AUDITED)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "teacher_agreement"])
def test_jit_and_permutation(baseline):
    settings = dict(chunk_tokens=C, prior_strength=2.0, baseline=baseline)
    arguments = (MASK, ANCHORS, PRIOR, SCORE_SUM, COUNT, AGREEMENT)
    group = np.array([7, 9, 7])
    plain = arms.verify(*arguments, group_B=group, **settings)
    whole = verify_arm(*arguments, group_B=group, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), plain, whole)
    order = np.array([2, 0, 1])
    permuted = verify_arm(*jax.tree.map(lambda x: np.asarray(x)[order], arguments), group_B=group[order], **settings)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-6, atol=1e-8), whole, permuted
    )


@pytest.mark.parametrize("setting", ["normalise", "baseline"])
def test_names_that_do_not_exist_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}='nothing' must be"):
        verify(**{setting: "nothing"})


def test_anchors_on_tokens_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="anchor_tokens='nothing' must be"):
        anchor_weights(AUDITED, 1.0, "nothing")


def test_one_branch_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="at least 2 branches a chunk"):
        branch_arm(
            MASK, ANCHORS, np.ones((B, M, 1, C), bool), np.ones((B, M, 1)), np.ones((B, M, 1)), COUNT, repulsion=0.0
        )  # fmt: skip
