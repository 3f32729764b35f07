"""Arms against the textbook: losses and gradients written out in torch, float64, over a table of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.algo import registry
from omniopd_jax.algo.controls import controlled
from omniopd_jax.algo.losses import clipped_ratio, k3_kl, tree_loss, with_confidence
from omniopd_jax.algo.registry import Seen, Settings
from omniopd_jax.types import Anchors, TokenTree

B, T, V = 4, 6, 7
M, N, C = 2, 3, 2
RNG = np.random.default_rng(0)
MASK = np.arange(T) < np.array([6, 4, 5, 3])[:, None]
LOGITS = RNG.normal(size=(B, T, V)).astype(np.float32)
OLD, REFERENCE, TEACHER = (LOGITS + RNG.normal(0, 0.4, (3, B, T, V))).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
SETTINGS = Settings(
    chunk_tokens=C,
    prior_strength=1.0,
    baseline="none",
    repulsion=0.0,
    normalise="token",
    anchor_weight=0.1,
    anchor_tokens="unaudited",
    divergence="reverse_kl",
    scale_advantage=True,
)
GROUP = np.array([0, 0, 2, 2], np.int32)
REWARD = np.array([1.0, 0.0, 0.25, 1.0], np.float32)
ANCHORS = Anchors(
    np.array([[0, 3], [1, 0], [0, 2], [0, 0]], np.int32), np.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
)
COUNT = np.array([[3, 2], [1, 0], [0, 3], [0, 0]], np.float32)  # chunk (2, 0) heard nothing
TEXT_MASK = (np.arange(N)[:, None] < COUNT[:, :, None, None]) & (RNG.random((B, M, N, 1)) < np.array([2.0, 0.6]))
TEXT_LOGITS = RNG.normal(size=(B, M, N, C, V)).astype(np.float32)
TEXTS = RNG.integers(0, V, (B, M, N, C)).astype(np.int32)


def logprob(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def tree(mask=MASK, **fields):
    empty = np.zeros((B, 0, 1))
    none = np.zeros((B, T), np.float32)
    given = dict(weight_BxT=none, anchor_weight_BxT=none, branch_tokens_BxRxC=empty, branch_mask_BxRxC=empty)
    given |= dict(branch_weight_BxRxC=empty, branch_start_BxR=np.zeros((B, 0)))
    prompt = np.zeros((B, 1))
    return TokenTree(
        prompt_tokens_BxP=prompt, prompt_mask_BxP=prompt, tokens_BxT=TOKENS, mask_BxT=mask, **given | fields
    )


def ours(given, logits=LOGITS, kl=None, **options):
    """(loss, gradient in the logits) of a tree over the table of logits."""

    @jax.jit
    def loss(logits):
        at = logprob(logits, TOKENS)
        none = jnp.zeros(given.branch_weight_BxRxC.shape)
        return tree_loss(at, none, jnp.zeros((B, T)) if kl is None else kl(at), given, **options)[0]

    return jax.value_and_grad(loss)(logits)


def theirs(loss, logits=LOGITS):
    """The same of a loss in torch, given log-probabilities of the tokens and of the whole vocabulary."""
    torch = pytest.importorskip("torch")
    table = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    everything = torch.log_softmax(table, dim=-1)
    value = loss(everything.gather(-1, torch.tensor(TOKENS).long()[..., None])[..., 0], everything)
    value.backward()
    return value.item(), table.grad.numpy()


def same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-5, atol=1e-7)


def tensor(array):
    import torch

    return torch.tensor(np.asarray(array), dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
def test_sft_is_cross_entropy_and_its_power_is_dft(power):
    """DFT's loss (arXiv 2508.05629, equation 9) is − sg(p) log p; a power between is between."""
    weights = registry.sft(Seen(answer_mask_BxT=MASK), SETTINGS)
    given = tree(weight_BxT=np.asarray(weights.answer_BxT), power_BxT=np.full((B, T), power, np.float32))

    def reference(at, _):
        return -(at.detach().exp() ** power * at * tensor(MASK)).sum() / MASK.sum()

    same(ours(given), theirs(reference))


@pytest.mark.parametrize(("normalise", "scale"), [("response", True), ("token", True), ("sequence", False)])
def test_grpo_is_its_published_loss(normalise, scale):
    """Equation 3 of arXiv 2402.03300 with its k3 KL, as TRL writes it; token-level: DAPO; unscaled: Dr. GRPO."""
    settings = SETTINGS._replace(normalise=normalise, scale_advantage=scale)
    old, reference_logprob = logprob(OLD, TOKENS), logprob(REFERENCE, TOKENS)
    weights = registry.grpo(Seen(mask_BxT=MASK, reward_B=REWARD, group_B=GROUP), settings)
    each = np.where(MASK, 1.0 / np.asarray(registry.denominators(MASK, normalise)), 0.0).astype(np.float32)
    given = tree(ratio_weight_BxT=np.asarray(weights.ratio_BxT), old_logprob_BxT=old, anchor_weight_BxT=0.04 * each)

    def reference(at, _):
        import torch

        rewards = tensor(REWARD).reshape(2, 2)
        advantage = rewards - rewards.mean(1, keepdim=True)
        if scale:
            advantage = advantage / (rewards.std(1, keepdim=True) + 1e-4)
        advantage = advantage.reshape(B, 1)
        ratio = torch.exp(at - tensor(old))
        gap = tensor(reference_logprob) - at
        token = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.04 * (gap.exp() - gap - 1)
        token = token * tensor(MASK)
        if normalise == "response":
            return (token.sum(1) / tensor(MASK).sum(1)).mean()
        return token.sum() / (MASK.sum() if normalise == "token" else B)

    same(ours(given, kl=lambda at: k3_kl(reference_logprob, at), clip=0.2), theirs(reference))


def test_a_clipped_token_has_no_gradient_and_an_unmoved_one_the_plain_one():
    weight = np.array([[1.0, 1.0, -1.0, -1.0, 1.0, 0.0]], np.float32)
    moved = np.log(np.array([[1.5, 0.5, 0.5, 1.5, 1.0, 9.0]], np.float32))
    value, is_clipped = clipped_ratio(moved, np.zeros_like(moved), weight, clip=0.2)
    np.testing.assert_allclose(value, [[1.2, 0.5, -0.8, -1.5, 1.0, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(is_clipped, [[True, False, True, False, False, False]])
    gradient = jax.grad(lambda at: clipped_ratio(at, np.zeros_like(moved), weight, clip=0.2)[0].sum())(moved)
    np.testing.assert_allclose(gradient, [[0.0, 0.5, 0.0, -1.5, 1.0, 0.0]], rtol=1e-6)


def test_a_group_of_equal_rewards_says_nothing():
    for reward in (0.0, 0.1, 1.0):
        given = np.array([reward, reward, 0.0, 1.0], np.float32)
        advantage = np.asarray(registry.group_advantage(given, GROUP, scale=True))
        np.testing.assert_array_equal(advantage[:2], 0)
        np.testing.assert_allclose(advantage[2:], np.array([-0.5, 0.5]) / (np.sqrt(0.5) + 1e-4), rtol=1e-6)
        np.testing.assert_array_equal(registry.group_advantage(given, GROUP, scale=False), [0, 0, -0.5, 0.5])


def test_imitate_is_the_mean_cross_entropy_of_the_teachers_texts():
    seen = Seen(mask_BxT=MASK, anchors=ANCHORS, count_BxM=COUNT, text_mask_BxMxNxC=TEXT_MASK)
    weights = registry.imitate(seen, SETTINGS)
    given = np.asarray(weights.text_BxMxNxC)

    @jax.jit
    def loss(logits):
        return -jnp.sum(given * logprob(logits, TEXTS))

    torch = pytest.importorskip("torch")
    table = torch.tensor(TEXT_LOGITS, dtype=torch.float64, requires_grad=True)
    at = torch.log_softmax(table, -1).gather(-1, torch.tensor(TEXTS).long()[..., None])[..., 0]
    total = 0.0
    for b, m in np.argwhere(COUNT > 0):
        texts = [at[b, m, n][torch.tensor(TEXT_MASK[b, m, n])].sum() for n in range(int(COUNT[b, m]))]
        total = total - torch.stack(texts).mean()
    total = total / MASK.sum()
    total.backward()
    found = jax.value_and_grad(loss)(TEXT_LOGITS)
    same(found, (total.item(), table.grad.numpy()))
    np.testing.assert_array_equal(weights.is_audited_BxM, COUNT > 0)


def test_the_sampled_form_of_opd_is_an_unbiased_gradient_of_the_reverse_kl():
    """All V tokens at every position, each with its probability, instead of draws."""
    settings = SETTINGS._replace(divergence="sampled")
    log_student, log_teacher = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(TEACHER)
    expected = np.zeros((B, T, V))
    for token in range(V):
        seen = Seen(mask_BxT=MASK, logprob_BxT=log_student[..., token], teacher_logprob_BxT=log_teacher[..., token])
        weight = np.asarray(registry.opd(seen, settings).trunk_BxT) * np.exp(log_student[..., token])
        slope = np.eye(V)[token] - np.exp(log_student)
        expected += -weight[..., None] * slope

    def reference(_, everything):
        gap = everything - tensor(log_teacher)
        return ((everything.exp() * gap).sum(-1) * tensor(MASK)).sum() / MASK.sum()

    np.testing.assert_allclose(expected, theirs(reference)[1], rtol=2e-5, atol=1e-7)


def test_a_divergence_enters_the_loss_by_its_weights():
    weights = registry.opd(Seen(mask_BxT=MASK), SETTINGS._replace(normalise="sequence"))
    divergence = np.abs(RNG.normal(size=(B, T))).astype(np.float32)
    given = tree(divergence_weight_BxT=np.asarray(weights.divergence_BxT))
    loss, metrics = tree_loss(np.zeros((B, T)), np.zeros((B, 0, 1)), np.zeros((B, T)), given, divergence_BxT=divergence)
    np.testing.assert_allclose(loss, divergence[MASK].sum() / B, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["opd/divergence_sum"] / metrics["opd/tokens"], divergence[MASK].mean(), rtol=1e-6
    )


def test_k3_is_an_unbiased_estimate_of_the_reverse_kl_and_never_negative():
    ours_, base = jax.nn.log_softmax(LOGITS), jax.nn.log_softmax(REFERENCE)
    each = np.asarray(k3_kl(base, ours_), np.float64)
    assert each.min() >= 0
    exact = (np.exp(ours_) * (ours_ - base)).sum(-1)
    np.testing.assert_allclose((np.exp(ours_) * each).sum(-1), exact, rtol=1e-4)


def test_confidence_is_a_weight_and_no_gradient():
    at = jnp.log(jnp.array([[0.25, 0.5, 1.0]]))
    weight, power = np.array([[2.0, 2.0, 0.0]], np.float32), np.array([[0.5, 1.0, 1.0]], np.float32)
    np.testing.assert_allclose(with_confidence(weight, at, power), [[1.0, 1.0, 0.0]])
    gradient = jax.grad(lambda at: with_confidence(weight, at, power).sum())(at)
    np.testing.assert_array_equal(gradient, 0)


def test_a_mixture_is_the_weighted_sum_of_its_arms():
    seen = Seen(
        mask_BxT=MASK, anchors=ANCHORS, count_BxM=COUNT, text_mask_BxMxNxC=TEXT_MASK, reward_B=REWARD, group_B=GROUP,
        prior_BxM=np.full((B, M), 0.5, np.float32), score_sum_BxM=0.6 * COUNT, agreement_BxM=np.zeros((B, M)),
    )  # fmt: skip
    mixed = registry.combined({"verify": 0.5, "grpo": 2.0, "imitate": 1.0}, seen, SETTINGS)
    alone = {name: registry.combined({name: 1.0}, seen, SETTINGS) for name in ("verify", "grpo", "imitate")}
    np.testing.assert_allclose(mixed.trunk_BxT, 0.5 * alone["verify"].trunk_BxT)
    np.testing.assert_allclose(mixed.ratio_BxT, 2.0 * alone["grpo"].ratio_BxT)
    np.testing.assert_array_equal(mixed.text_BxMxNxC, alone["imitate"].text_BxMxNxC)
    np.testing.assert_array_equal(mixed.target_BxM, alone["verify"].target_BxM)
    np.testing.assert_array_equal(mixed.is_audited_BxM, COUNT > 0)


def test_what_arms_need():
    assert registry.needs_of({"sft": 1.0}, "reverse_kl") == registry.Needs(responses=False, answers=True)
    assert registry.needs_of({"opd": 1.0}, "sampled") == registry.Needs(logprob=True)
    assert not registry.needs_of({"grpo": 1.0}, "sampled").teacher
    assert not registry.needs_of({"anchor": 1.0}, "sampled").teacher
    both = registry.needs_of({"branch": 1.0, "sft": 1.0}, "sampled")
    assert both == registry.Needs(chunks=True, branches=True, answers=True)


@pytest.fixture
def evidence():
    audited = ANCHORS.is_valid_BxM & (COUNT > 0)
    score = np.where(audited, np.arange(B * M).reshape(B, M) + 1.0, 0.0).astype(np.float32)
    seen = Seen(
        anchors=ANCHORS,
        count_BxM=COUNT,
        score_sum_BxM=score * COUNT,
        prior_BxM=score / 10,
        agreement_BxM=score / 20,
        branch_score_BxMxG=score[..., None] * np.array([1.0, 2.0], np.float32),
        branch_overlap_BxMxG=None,
    )
    return seen, audited, score


def test_shuffled_evidence_moves_as_a_whole_and_only_among_audited_chunks(evidence):
    seen, audited, score = evidence
    moved = set()
    for number in range(5):
        found = controlled(seen, "shuffled", jax.random.key(number))
        of = np.asarray(found.score_sum_BxM)[audited] / np.asarray(found.count_BxM)[audited]
        assert sorted(np.round(of)) == sorted(score[audited])
        np.testing.assert_allclose(np.asarray(found.prior_BxM)[audited], of / 10, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(found.branch_score_BxMxG)[audited][:, 1], 2 * of, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(found.count_BxM)[~audited], COUNT[~audited])
        np.testing.assert_array_equal(np.asarray(found.prior_BxM)[~audited], 0)
        moved.add(tuple(np.round(of)))
    assert len(moved) > 1


def test_constant_evidence_tells_no_chunk_from_another(evidence):
    seen, audited, score = evidence
    found = controlled(seen, "constant", jax.random.key(0))
    mean = score[audited].mean()
    np.testing.assert_allclose(np.asarray(found.score_sum_BxM)[audited], mean * COUNT[audited], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.prior_BxM)[audited], mean / 10, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.branch_score_BxMxG)[audited], 1.5 * mean, rtol=1e-6)
    assert controlled(seen, "none", jax.random.key(0)) is seen
