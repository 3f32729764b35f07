"""The one loss: which token feels which term, and what can never reach the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo import arms
from omniopd_jax.algo.losses import omniopd_loss, tree_loss
from omniopd_jax.algo.targets import chunk_prior, posterior_target
from omniopd_jax.types import Anchors, TokenTree

B, T, R, C = 2, 7, 3, 2
MASK = np.arange(T) < np.array([7, 4])[:, None]
ANCHORS = Anchors(start_BxM=np.array([[1, 5], [0, 0]], np.int32), is_valid_BxM=np.array([[True, True], [True, False]]))
AUDITED = np.array([[0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0]], bool)
TARGET = np.array([[0.8, 0.1], [0.5, 0.7]], np.float32)  # the last slot is empty; its value must not matter
RNG = np.random.default_rng(0)
LOGPROB, KL = -RNG.random((B, T)).astype(np.float32), RNG.random((B, T)).astype(np.float32)


def tree(**changes):
    weights = dict(
        weight_BxT=np.where(MASK, RNG.normal(size=(B, T)), 0).astype(np.float32),
        anchor_weight_BxT=np.where(MASK & ~AUDITED, 0.01, 0).astype(np.float32),
        branch_weight_BxRxC=np.random.default_rng(1).normal(size=(B, R, C)).astype(np.float32),
    )
    rest = dict(
        prompt_tokens_BxP=np.zeros((B, 1), np.int32),
        prompt_mask_BxP=np.ones((B, 1), bool),
        tokens_BxT=np.zeros((B, T), np.int32),
        mask_BxT=MASK,
        branch_tokens_BxRxC=np.zeros((B, R, C), np.int32),
        branch_mask_BxRxC=np.ones((B, R, C), bool),
        branch_start_BxR=np.zeros((B, R), np.int32),
    )
    return TokenTree(**(rest | weights | changes))


def test_the_loss_is_the_sum_of_its_three_terms():
    branch_logprob, leaves = -np.ones((B, R, C), np.float32), tree()
    loss, metrics = tree_loss(LOGPROB, branch_logprob, KL, leaves)
    terms = (
        -np.sum(leaves.weight_BxT.astype(np.float64) * LOGPROB),
        -np.sum(leaves.branch_weight_BxRxC.astype(np.float64) * branch_logprob),
        np.sum(leaves.anchor_weight_BxT.astype(np.float64) * KL),
    )
    np.testing.assert_allclose(loss, sum(terms), rtol=1e-5)
    for name, value in zip(("loss/trunk", "loss/branch", "loss/anchor"), terms, strict=True):
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    np.testing.assert_array_equal(metrics["loss/total"], loss)
    np.testing.assert_allclose(metrics["anchor/kl_sum"], KL[MASK & ~AUDITED].sum(), rtol=1e-6)
    assert metrics["anchor/tokens"] == np.sum(MASK & ~AUDITED)


def test_what_has_weight_zero_reaches_neither_loss_nor_gradient():
    leaves = tree()
    broken_logprob = np.where(leaves.weight_BxT == 0, np.nan, LOGPROB)
    broken_kl = np.where(leaves.anchor_weight_BxT == 0, np.inf, KL)
    branch_weight = leaves.branch_weight_BxRxC.copy()
    branch_weight[0] = 0
    leaves = leaves.replace(branch_weight_BxRxC=branch_weight)
    branch_logprob = np.full((B, R, C), -1.0, np.float32)
    broken_branch = branch_logprob.copy()
    broken_branch[0] = -np.inf

    def value_and_gradient(*arrays):
        return jax.value_and_grad(lambda *a: tree_loss(*a, leaves)[0], argnums=(0, 1, 2))(*map(jnp.asarray, arrays))

    clean = value_and_gradient(LOGPROB, branch_logprob, KL)
    broken = value_and_gradient(broken_logprob, broken_branch, broken_kl)
    jax.tree.map(np.testing.assert_array_equal, clean, broken)


def test_micro_batches_add_up_to_the_batch():
    branch_logprob, leaves = -np.ones((B, R, C), np.float32), tree()
    whole_loss, whole = tree_loss(LOGPROB, branch_logprob, KL, leaves)
    parts = []
    for b in range(B):
        row = jax.tree.map(lambda x, b=b: x[b : b + 1], (LOGPROB, branch_logprob, KL, leaves))
        parts.append(tree_loss(*row))
    np.testing.assert_allclose(whole_loss, sum(loss for loss, _ in parts), rtol=1e-6)
    for name, value in whole.items():
        np.testing.assert_allclose(value, sum(metrics[name] for _, metrics in parts), rtol=1e-6, err_msg=name)


SETTINGS = [(normalise, anchor_tokens) for normalise in ("token", "sequence") for anchor_tokens in ("unaudited", "all")]


@pytest.mark.parametrize(("normalise", "anchor_tokens"), SETTINGS)
def test_the_paper_s_loss_is_its_equation(normalise, anchor_tokens):
    loss, metrics = omniopd_loss(
        LOGPROB, KL, MASK, ANCHORS, TARGET,
        chunk_tokens=C, anchor_weight=0.1, normalise=normalise, anchor_tokens=anchor_tokens,
    )  # fmt: skip
    chunks = sum(
        TARGET[b, m] * LOGPROB[b, ANCHORS.start_BxM[b, m] : ANCHORS.start_BxM[b, m] + C].sum()
        for b in range(B)
        for m in range(2)
        if ANCHORS.is_valid_BxM[b, m]
    )
    anchor = KL[MASK if anchor_tokens == "all" else MASK & ~AUDITED].sum()
    denominator = MASK.sum() if normalise == "token" else B
    np.testing.assert_allclose(loss, (-chunks + 0.1 * anchor) / denominator, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/trunk"], -chunks / denominator, rtol=1e-5)


@pytest.mark.parametrize(("normalise", "anchor_tokens"), SETTINGS)
def test_it_is_the_verify_arm_through_the_tree(normalise, anchor_tokens):
    prior = chunk_prior(LOGPROB, ANCHORS, chunk_tokens=C)
    count = np.full((B, 2), 4.0, np.float32)
    target = posterior_target(4 * TARGET, count, prior, prior_strength=1.0)
    shared = dict(chunk_tokens=C, anchor_weight=0.1, normalise=normalise, anchor_tokens=anchor_tokens)
    weights = arms.verify(
        MASK, ANCHORS, prior, 4 * TARGET, count, 0 * count, chunk_tokens=C, prior_strength=1.0, normalise=normalise
    )
    leaves = tree(
        weight_BxT=weights.weight_BxT,
        anchor_weight_BxT=arms.anchor_weights(
            MASK,
            ANCHORS,
            weights.targets.is_audited_BxM,
            chunk_tokens=C,
            anchor_weight=0.1,
            anchor_tokens=anchor_tokens,
            denominator=arms.batch_denominator(MASK, normalise=normalise),
        ),
        branch_weight_BxRxC=np.zeros((B, 0, C), np.float32),
    )
    through_the_tree = tree_loss(LOGPROB, np.zeros((B, 0, C), np.float32), KL, leaves)
    jax.tree.map(
        np.testing.assert_array_equal, through_the_tree, omniopd_loss(LOGPROB, KL, MASK, ANCHORS, target, **shared)
    )


def gradients(wrap=lambda f: f, target=TARGET, **settings):
    settings = dict(chunk_tokens=C, anchor_weight=0.1) | settings

    def loss(logprob, kl, target):
        return omniopd_loss(logprob, kl, MASK, ANCHORS, target, **settings)[0]

    return wrap(jax.grad(loss, argnums=(0, 1, 2)))(LOGPROB, KL, target)


def test_each_token_feels_its_own_term_alone():
    d_logprob, d_kl, d_target = (np.asarray(g) for g in gradients())
    assert np.all(d_logprob[AUDITED] < 0)
    np.testing.assert_array_equal(d_logprob[~AUDITED], 0.0)
    np.testing.assert_array_equal(d_kl[AUDITED], 0.0)
    np.testing.assert_allclose(d_kl[MASK & ~AUDITED], 0.1 / MASK.sum(), rtol=1e-6)
    np.testing.assert_array_equal(d_kl[~MASK], 0.0)
    np.testing.assert_array_equal(d_target, 0.0)  # π̂ is a constant
    _, d_kl_everywhere, _ = gradients(anchor_tokens="all")
    np.testing.assert_allclose(d_kl_everywhere, np.where(MASK, 0.1 / MASK.sum(), 0), rtol=1e-6)


def test_padding_is_exactly_nothing():
    """Four more columns and a row of padding, full of NaN: the same loss, and gradients of exactly 0 there."""
    settings = dict(chunk_tokens=C, anchor_weight=0.1)
    wider = [np.pad(x, ((0, 1), (0, 4)), constant_values=np.nan) for x in (LOGPROB, KL)]
    more = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 1))), ANCHORS)
    mask, target = np.pad(MASK, ((0, 1), (0, 4))), np.pad(TARGET, ((0, 1), (0, 1)))

    def loss(logprob, kl):
        return omniopd_loss(logprob, kl, mask, more, target, **settings)[0]

    padded, padded_gradients = jax.value_and_grad(loss, argnums=(0, 1))(*wider)
    np.testing.assert_allclose(padded, omniopd_loss(LOGPROB, KL, MASK, ANCHORS, TARGET, **settings)[0], rtol=1e-6)
    for padded_gradient, gradient in zip(padded_gradients, gradients(), strict=False):
        np.testing.assert_array_equal(padded_gradient, np.pad(gradient, ((0, 1), (0, 4))))


def test_jit_and_permutation():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradients(), gradients(jax.jit))
    settings = dict(chunk_tokens=C, anchor_weight=0.1)
    loss, _ = omniopd_loss(LOGPROB, KL, MASK, ANCHORS, TARGET, **settings)
    swapped, _ = omniopd_loss(
        LOGPROB[::-1], KL[::-1], MASK[::-1], jax.tree.map(lambda x: x[::-1], ANCHORS), TARGET[::-1], **settings
    )
    np.testing.assert_allclose(loss, swapped, rtol=1e-6)


@pytest.mark.parametrize(("agrees", "factor"), [(1.0, 1.0), (0.0, 0.0)])
def test_a_teacher_that_agrees_raises_the_chunk_and_one_that_never_does_only_the_prior(agrees, factor):
    """One gradient step on the logits of a small policy whose response is a single chunk."""
    tokens, count, strength, rate = np.array([[2, 0]]), 4.0, 1.0, 0.1
    logits = np.random.default_rng(3).normal(size=(1, 2, 3)).astype(np.float32)
    anchors = Anchors(start_BxM=np.zeros((1, 1), np.int32), is_valid_BxM=np.ones((1, 1), bool))

    def logprob(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]

    def loss(logits):
        values = logprob(logits)
        prior = chunk_prior(values, anchors, chunk_tokens=2)
        weights = arms.verify(
            np.ones((1, 2), bool), anchors, prior, np.full((1, 1), agrees * count), np.full((1, 1), count),
            np.full((1, 1), 1.0), chunk_tokens=2, prior_strength=strength,
        )  # fmt: skip
        return -jnp.sum(weights.weight_BxT * values), weights

    (_, weights), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    prior = float(weights.targets.prior_BxM[0, 0])
    share = (factor * count + strength * prior) / (count + strength)
    np.testing.assert_allclose(weights.weight_BxT, share / 2, rtol=1e-6)
    assert np.all(np.asarray(logprob(logits - rate * gradient) - logprob(logits)) > 0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        tree_loss(LOGPROB[:, 1:], np.zeros((B, R, C)), KL, tree())
