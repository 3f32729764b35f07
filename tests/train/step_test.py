"""The step: what is summed, what gets a gradient, and what it never does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from omniopd_jax import models
from omniopd_jax.config import MeshConfig
from omniopd_jax.train import batching, sharding
from omniopd_jax.train.optimizer import make_optimizer
from omniopd_jax.train.step import (
    StepOptions,
    gradients,
    init_state,
    make_step,
    state_shardings,
    tree_terms,
    without_trainable,
)
from omniopd_jax.train.stops import NotFinite
from omniopd_jax.types import TokenTree

B, P, T, R, C = 4, 4, 9, 3, 3
OPTIONS = StepOptions(block_tokens=16)
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


def make_tree(seed: int = 0) -> TokenTree:
    """Ragged prompts, responses and branches; rows 0 to 3 all differ. Tokens 1 to 4 of a response are audited, the rest
    carry the anchor."""
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(P) >= np.array([0, 2, 1, 3])[:, None]
    mask = np.arange(T) < np.array([9, 6, 7, 5])[:, None]
    is_audited = (np.arange(T) >= 1) & (np.arange(T) < 5)
    branch_mask = np.arange(C) < rng.integers(1, C + 1, (B, R, 1))
    tokens = mask.sum()
    return TokenTree(
        prompt_tokens_BxP=rng.integers(3, 26, (B, P)).astype(np.int32),
        prompt_mask_BxP=prompt_mask,
        tokens_BxT=rng.integers(3, 26, (B, T)).astype(np.int32),
        mask_BxT=mask,
        weight_BxT=(rng.random((B, 1)) * (mask & is_audited) / tokens).astype(np.float32),
        anchor_weight_BxT=(0.1 * (mask & ~is_audited) / tokens).astype(np.float32),
        branch_tokens_BxRxC=rng.integers(3, 26, (B, R, C)).astype(np.int32),
        branch_mask_BxRxC=branch_mask,
        branch_weight_BxRxC=(rng.normal(size=(B, R, 1)) * branch_mask / tokens).astype(np.float32),
        branch_start_BxR=rng.integers(0, 5, (B, R)).astype(np.int32),
    )


def sharp(model: models.Model, seed: int) -> models.Model:
    rng = np.random.default_rng(seed)
    return model.replace(
        params=jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), model.params)
    )


@pytest.fixture(scope="module")
def reference(model):
    return sharp(model, 5)


@pytest.fixture(scope="module")
def grads_of(model, reference):
    """(gradients, terms) of micro-batched trees; compiled once a shape."""
    frozen = without_trainable(model)
    compiled = jax.jit(
        lambda params, reference, trees: gradients(frozen, params, reference, trees, OPTIONS),
        compiler_options=QUICK_TO_COMPILE,
    )

    def run(tree, count=1, params=model.params, reference=reference):
        return compiled(params, reference, batching.micro_batches(tree, count))

    return run


def assert_close(a, b, rtol):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale), a, b)


def naive_terms(model: models.Model, reference: models.Model, tree: TokenTree) -> tuple[float, float, float]:
    """(trunk, branch, anchor): every branch a sequence of its own, float64 log-softmax over dense logits."""
    sequences, prompts = [], []
    for b in range(B):
        prompts.append(tree.prompt_tokens_BxP[b][tree.prompt_mask_BxP[b]])
        sequences.append(np.concatenate([prompts[b], tree.tokens_BxT[b][tree.mask_BxT[b]]]))
    for b in range(B):
        for r in range(R):
            own = tree.branch_tokens_BxRxC[b, r][tree.branch_mask_BxRxC[b, r]]
            sequences.append(np.concatenate([sequences[b][: len(prompts[b]) + tree.branch_start_BxR[b, r]], own]))
    mask = np.arange(max(map(len, sequences))) < np.array([len(sequence) for sequence in sequences])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(sequences)
    dense = jax.jit(models.logits)
    ours, theirs = (
        scipy.special.log_softmax(np.asarray(dense(of, tokens, mask), np.float64), axis=-1) for of in (model, reference)
    )
    trunk = branch = anchor = 0.0
    for b in range(B):
        for t, token in enumerate(tree.tokens_BxT[b][tree.mask_BxT[b]]):
            at = len(prompts[b]) + t - 1
            trunk -= tree.weight_BxT[b, t] * ours[b, at, token]
            anchor += tree.anchor_weight_BxT[b, t] * (np.exp(theirs[b, at]) * (theirs[b, at] - ours[b, at])).sum()
        for r in range(R):
            row, start = B + b * R + r, len(prompts[b]) + tree.branch_start_BxR[b, r]
            for c in range(tree.branch_mask_BxRxC[b, r].sum()):
                token = tree.branch_tokens_BxRxC[b, r, c]
                branch -= tree.branch_weight_BxRxC[b, r, c] * ours[row, start + c - 1, token]
    return trunk, branch, anchor


def test_terms_equal_separate_sequences_and_dense_softmax(model, reference, grads_of):
    tree = make_tree()
    _, terms = grads_of(tree)
    trunk, branch, anchor = naive_terms(model, reference, tree)
    np.testing.assert_allclose(terms["loss/trunk"], trunk, rtol=1e-5)
    np.testing.assert_allclose(terms["loss/branch"], branch, rtol=1e-5)
    np.testing.assert_allclose(terms["loss/anchor"], anchor, rtol=1e-5)
    np.testing.assert_allclose(terms["loss/total"], trunk + branch + anchor, rtol=1e-5)


def test_micro_batches_do_not_change_loss_or_gradient(grads_of):
    tree = make_tree()
    whole, whole_terms = grads_of(tree)
    split, split_terms = grads_of(tree, 4)
    assert_close(split, whole, 1e-6)
    for name in whole_terms:
        # A KL is a difference of large terms; in another order of float32 sums jax 0.12 gives 1.5e-6, 0.10 under 1e-6.
        np.testing.assert_allclose(split_terms[name], whole_terms[name], rtol=4e-6)
    assert split_terms["anchor/tokens"] == whole_terms["anchor/tokens"]


def test_a_permuted_batch_gives_the_same_gradient(grads_of):
    tree = make_tree()
    shuffled = jax.tree.map(lambda array: array[np.array([2, 0, 3, 1])], tree)
    assert_close(grads_of(shuffled)[0], grads_of(tree)[0], 1e-6)


def test_merged_and_packed_branches_give_the_same_gradient(grads_of):
    tree = make_tree()
    twice = dataclasses.replace(
        tree,
        branch_tokens_BxRxC=np.repeat(tree.branch_tokens_BxRxC[:, :1], R, axis=1),
        branch_mask_BxRxC=np.repeat(tree.branch_mask_BxRxC[:, :1], R, axis=1),
        branch_start_BxR=np.repeat(tree.branch_start_BxR[:, :1], R, axis=1),
        branch_weight_BxRxC=tree.branch_weight_BxRxC * tree.branch_mask_BxRxC[:, :1],
    )
    packed = batching.pack(twice, smallest_branches=1)
    assert packed.branch_start_BxR.shape[1] == 1
    empty = jax.tree.map(np.zeros_like, twice)

    def widened(name):  # slots of weight 0, so that no other shape is compiled
        return np.concatenate([getattr(packed, name), getattr(empty, name)[:, 1:]], axis=1)

    names = [field.name for field in dataclasses.fields(TokenTree) if field.name.startswith("branch_")]
    names = [name for name in names if getattr(packed, name) is not None]
    packed = packed.replace(**{name: widened(name) for name in names})
    assert_close(grads_of(packed)[0], grads_of(twice)[0], 1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_listed_tree_has_the_same_terms_and_gradient(model, reference, grads_of, groups):
    """As the rows have it, and as every branch and response by itself has it; two micro-batches, each with its list."""
    tree = make_tree()
    packed = batching.pack(tree, groups=groups, smallest_branches=1, list_from=1)
    assert packed.read_UxJxW.shape[:2] == packed.scored_UxJxW.shape[:2] == (groups, B // groups)
    grads, terms = grads_of(packed, groups)
    trunk, branch, anchor = naive_terms(model, reference, tree)
    np.testing.assert_allclose(terms["loss/trunk"], trunk, rtol=1e-5)
    np.testing.assert_allclose(terms["loss/branch"], branch, rtol=1e-5)
    np.testing.assert_allclose(terms["loss/anchor"], anchor, rtol=1e-5)
    assert_close(grads, grads_of(tree)[0], 1e-5)


@pytest.mark.parametrize("width", [C, 1])
def test_a_listed_tree_of_branches_alone_has_the_same_gradient(grads_of, width):
    """Nothing on the trunk, tokens without weight in the branches, rows without branches; of one token a power of π."""
    tree = make_tree()
    rng = np.random.default_rng(2)
    weight = tree.branch_weight_BxRxC * (rng.random((B, R, C)) < 0.7)
    weight[1] = 0
    tree = tree.replace(
        weight_BxT=0 * tree.weight_BxT,
        anchor_weight_BxT=0 * tree.anchor_weight_BxT,
        branch_tokens_BxRxC=tree.branch_tokens_BxRxC[:, :, :width],
        branch_mask_BxRxC=tree.branch_mask_BxRxC[:, :, :width],
        branch_weight_BxRxC=weight[:, :, :width],
        branch_power_BxR=rng.random((B, R)).astype(np.float32) if width == 1 else None,
    )
    packed = batching.pack(tree, smallest_branches=1, list_from=1)
    assert packed.read_UxJxW is not None
    (grads, terms), (want, want_terms) = grads_of(packed), grads_of(tree)
    np.testing.assert_allclose(terms["loss/branch"], want_terms["loss/branch"], rtol=1e-5)
    assert_close(grads, want, 1e-5)


def test_listed_responses_without_branches_have_the_same_gradient(grads_of):
    tree = make_tree()
    tree = tree.replace(branch_weight_BxRxC=0 * tree.branch_weight_BxRxC)
    packed = batching.pack(tree, list_from=1)
    assert packed.read_UxJxW is not None
    assert packed.branch_start_BxR.shape == (B, 0)
    assert_close(grads_of(packed)[0], grads_of(tree)[0], 1e-5)


def test_unaudited_tokens_get_their_gradient_from_the_anchor_alone(grads_of):
    """Nothing reads a response's last token, so its name matters only where a weight lies on it."""
    tree = make_tree()
    end_B = tree.mask_BxT.sum(axis=1) - 1
    is_audited_B = np.take_along_axis(tree.weight_BxT, end_B[:, None], axis=1)[:, 0] != 0
    assert is_audited_B.tolist() == [False, False, False, True]

    def renamed(rows):
        tokens = tree.tokens_BxT.copy()
        tokens[rows, end_B[rows]] = (tokens[rows, end_B[rows]] - 2) % 20 + 3
        return grads_of(tree.replace(tokens_BxT=tokens))[0]

    before = grads_of(tree)[0]
    jax.tree.map(np.testing.assert_array_equal, renamed(np.flatnonzero(~is_audited_B)), before)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), renamed(np.flatnonzero(is_audited_B)), before)
    assert changed["embedding"]


def test_audited_tokens_get_their_gradient_from_the_chunk_alone(model, reference, grads_of):
    """Where every token is audited, what the reference thinks of them does not matter."""
    tree = make_tree()
    audited = tree.replace(
        weight_BxT=np.where(tree.mask_BxT, np.float32(0.01), np.float32(0)),
        anchor_weight_BxT=0 * tree.anchor_weight_BxT,
    )
    ours, theirs = grads_of(audited, reference=reference), grads_of(audited, reference=model)
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    anchored = grads_of(tree, reference=reference)[0], grads_of(tree, reference=model)[0]
    assert (np.asarray(anchored[0]["embedding"]) != np.asarray(anchored[1]["embedding"])).any()


def test_padding_has_exactly_no_influence(grads_of):
    tree = make_tree()
    rng = np.random.default_rng(9)

    def scribbled(tokens, mask):
        return np.where(mask, tokens, rng.integers(3, 26, tokens.shape)).astype(np.int32)

    other = tree.replace(
        prompt_tokens_BxP=scribbled(tree.prompt_tokens_BxP, tree.prompt_mask_BxP),
        tokens_BxT=scribbled(tree.tokens_BxT, tree.mask_BxT),
        branch_tokens_BxRxC=scribbled(tree.branch_tokens_BxRxC, tree.branch_mask_BxRxC),
    )
    jax.tree.map(np.testing.assert_array_equal, grads_of(other), grads_of(tree))


def test_the_anchor_of_equal_models_is_zero_with_zero_gradient(model, grads_of, reference):
    tree = make_tree()
    tree = tree.replace(weight_BxT=0 * tree.weight_BxT, branch_weight_BxRxC=0 * tree.branch_weight_BxRxC)
    grads, terms = grads_of(tree, params=reference.params)
    assert terms["loss/anchor"] == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.fixture(scope="module")
def stepper(model, reference, make_config):
    """(fresh state, step) at the golden settings."""
    config = make_config(**{"optimizer.warmup_steps": 0})
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 10)
    shardings = state_shardings(mesh, model, optimizer)
    step = make_step(
        without_trainable(model),
        sharding.placed(reference, mesh),
        optimizer,
        mesh,
        shardings,
        OPTIONS,
    )

    def fresh():
        return init_state(model, optimizer, shardings)

    def run(state, *trees):
        """One step on a batch, or on its parts."""
        whole, *others = [batching.to_devices(batching.micro_batches(tree, 1), mesh, axis=1) for tree in trees]
        if not others:
            return step.whole(state, whole)
        sums = None
        for part in (whole, *others):
            sums = step.add(sums, state.params, part)
        return step.apply(state, sums)

    return fresh, run


def test_golden_step(stepper, model):
    fresh, run = stepper
    state, metrics = run(fresh(), make_tree())
    delta = optax.global_norm(jax.tree.map(jnp.subtract, state.params, model.params))
    found = {name: float(value) for name, value in metrics.items()} | {"delta": float(delta)}
    assert found.keys() >= GOLDEN.keys()
    for name, value in GOLDEN.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def halves(tree):
    """Of different widths, as packing makes them: the second half's branches are one fewer."""
    first, second = (jax.tree.map(lambda array, rows=rows: array[rows], tree) for rows in (slice(2), slice(2, None)))
    names = [name for name in vars(second) if name.startswith("branch_") and getattr(second, name) is not None]
    return first, second.replace(**{name: getattr(second, name)[:, :-1] for name in names})


def test_a_step_in_parts_is_the_step_on_the_whole(stepper):
    fresh, run = stepper
    tree = make_tree()
    tree.branch_weight_BxRxC[2:, -1] = 0  # what the second half leaves out
    (whole, metrics), (parts, of_parts) = run(fresh(), tree), run(fresh(), *halves(tree))
    assert metrics.keys() == of_parts.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert int(parts.step) == 1
    for ours, theirs in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_finite_changes_nothing(stepper):
    fresh, run = stepper
    first, second = halves(make_tree())
    second.weight_BxT[0, 1] = np.inf
    state, metrics = run(fresh(), first, second)
    assert not metrics["is_finite"]
    jax.tree.map(np.testing.assert_array_equal, state, fresh())


def test_the_state_is_donated_and_the_model_that_came_in_is_not(stepper, model):
    fresh, run = stepper
    before = fresh()
    after, _ = run(before, make_tree())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, model)))
    assert int(after.step) == 1


def test_a_step_that_is_not_finite_changes_nothing(stepper):
    fresh, run = stepper
    tree = make_tree()
    weight = tree.weight_BxT.copy()
    weight[0, 1] = np.inf
    state, metrics = run(fresh(), tree.replace(weight_BxT=weight))
    assert not metrics["is_finite"]
    assert not np.isfinite(metrics["loss/trunk"])
    assert np.isfinite(metrics["loss/anchor"])
    jax.tree.map(np.testing.assert_array_equal, state, fresh())
    assert NotFinite(3, "loss/trunk").exit_code == 5


def test_what_nothing_is_weighted_with_is_not_computed(model, grads_of):
    """Without trunk and anchor the branch term is the same, and no reference is read."""
    tree = make_tree()
    branch_only = dataclasses.replace(OPTIONS, has_trunk=False, has_anchor=False)
    terms = jax.jit(lambda params: tree_terms(model.replace(params=params), None, tree, branch_only)[1])(model.params)
    np.testing.assert_allclose(terms["loss/branch"], grads_of(tree)[1]["loss/branch"], rtol=1e-5)
    assert terms["loss/trunk"] == terms["loss/anchor"] == 0


# CPU, float32. A change here is a change of the method, and says so in the commit.
GOLDEN: dict[str, float] = {
    "loss/total": 0.2747551500797272,
    "loss/trunk": 0.8171539306640625,
    "loss/branch": -0.5434083938598633,
    "loss/anchor": 0.0010096271289512515,
    "anchor/kl_sum": 0.27259933948516846,
    "anchor/tokens": 11.0,
    "optimizer/grad_norm": 0.40795305371284485,
    "optimizer/update_norm": 0.4174744784832001,
    "optimizer/learning_rate": 0.003,
    "delta": 0.4174745976924896,
}


def dense_logprobs(model: models.Model, tree: TokenTree) -> np.ndarray:
    """log π at every response position, [B, T, V], float64."""
    tokens = np.concatenate([tree.prompt_tokens_BxP, tree.tokens_BxT], axis=1)
    mask = np.concatenate([tree.prompt_mask_BxP, tree.mask_BxT], axis=1)
    logits = np.asarray(jax.jit(models.logits)(model, tokens, mask), np.float64)[:, P - 1 : -1]
    return scipy.special.log_softmax(logits, axis=-1)


def test_the_sampled_anchor_compares_the_base_model_with_the_student_and_not_the_other_way_round(model, reference):
    tree = make_tree()
    options = dataclasses.replace(OPTIONS, anchor_estimator="k3")

    def terms(params, reference):
        return tree_terms(model.replace(params=params), reference, tree, options)[1]

    found = jax.jit(terms)(model.params, reference)
    ours, theirs = (
        np.take_along_axis(dense_logprobs(of, tree), tree.tokens_BxT[..., None], -1)[..., 0]
        for of in (model, reference)
    )
    k3 = np.exp(theirs - ours) - (theirs - ours) - 1
    np.testing.assert_allclose(found["loss/anchor"], (tree.anchor_weight_BxT * k3).sum(), rtol=1e-4)


def test_a_white_box_teacher_is_read_in_the_step(model, reference):
    """The divergence term against dense softmaxes in float64."""
    tree, taught = make_tree(), sharp(model, 8)
    each = np.where(tree.mask_BxT, np.float32(1 / tree.mask_BxT.sum()), np.float32(0))
    tree = tree.replace(divergence_weight_BxT=each)
    options = dataclasses.replace(OPTIONS, has_trunk=False, has_anchor=False, divergence="forward_kl")

    def terms(params, teacher):
        return tree_terms(model.replace(params=params), None, tree, options, teacher)

    found = jax.jit(terms)(model.params, taught)[1]
    ours, theirs = dense_logprobs(model, tree), dense_logprobs(taught, tree)
    expected = (np.exp(theirs) * (theirs - ours)).sum(-1)[tree.mask_BxT].mean()
    np.testing.assert_allclose(found["loss/divergence"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["opd/divergence_sum"] / found["opd/tokens"], expected, rtol=1e-5)


def test_several_updates_on_a_batch_are_as_many_steps_on_it(model, reference, make_config):
    """μ = 2 is two plain updates, and only the second one's ratio is not 1."""
    config = make_config(**{"optimizer.warmup_steps": 0})
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, 10)
    shardings = state_shardings(mesh, model, optimizer)
    tree = make_tree()
    logprob = scipy.special.log_softmax(
        np.asarray(
            jax.jit(models.logits)(
                model,
                np.concatenate([tree.prompt_tokens_BxP, tree.tokens_BxT], axis=1),
                np.concatenate([tree.prompt_mask_BxP, tree.mask_BxT], axis=1),
            ),
            np.float64,
        )[:, P - 1 : -1],
        axis=-1,
    )
    old = np.take_along_axis(logprob, tree.tokens_BxT[..., None], axis=-1)[..., 0].astype(np.float32)
    none = np.zeros((B, 0, 1))
    tree = tree.replace(
        weight_BxT=0 * tree.weight_BxT,
        ratio_weight_BxT=np.where(tree.mask_BxT, np.float32(0.5 / tree.mask_BxT.sum()), np.float32(0)),
        old_logprob_BxT=old,
        branch_tokens_BxRxC=none.astype(np.int32),
        branch_mask_BxRxC=none.astype(bool),
        branch_weight_BxRxC=none.astype(np.float32),
        branch_start_BxR=np.zeros((B, 0), np.int32),
    )

    def run(steps, updates):
        options = dataclasses.replace(OPTIONS, has_trunk=False, has_anchor=False, updates=updates)
        step = make_step(without_trainable(model), None, optimizer, mesh, shardings, options).whole
        state, metrics = init_state(model, optimizer, shardings), []
        for _ in range(steps):
            state, found = step(state, batching.to_devices(batching.micro_batches(tree, 1), mesh, axis=1))
            metrics.append(jax.device_get(found))
        return state, metrics

    one_by_one, (first, second) = run(2, 1)
    together, (last,) = run(1, 2)
    np.testing.assert_allclose(first["loss/ratio"], -0.5, rtol=1e-5)
    assert first["update/clipped"] == 0
    np.testing.assert_allclose(last["loss/ratio"], second["loss/ratio"], rtol=1e-5)
    assert int(together.step) == 1
    assert_close(together.params, one_by_one.params, 1e-5)
