"""Alignment: what the estimator of a cosine promises, and that the loop's first moment is the gradient."""

import jax
import numpy as np
import optax
import pytest

from omniopd_jax.config import to_dict
from omniopd_jax.study import alignment, alignment_table
from omniopd_jax.study.alignment import Alignment, Gradients
from omniopd_jax.study.alignment_table import Row
from omniopd_jax.teacher.protocol import Continuation
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.train import batching, loop, step
from omniopd_jax.train.experiment import prepare, step_options
from omniopd_jax.train.observation import observe
from omniopd_jax.train.optimizer import make_optimizer
from omniopd_jax.train.stops import Interrupts
from tests.train.conftest import model, prompts, tiny_config, tokenizer  # noqa: F401  (fixtures)

WIDTH = 4000


def noisy(rng, direction, batches, noise, tokens=100):
    gradient = direction + noise * rng.normal(size=(batches, WIDTH))
    return Gradients(gradient.astype(np.float32), np.full(batches, tokens))


@pytest.fixture(scope="module")
def directions():
    """Two unit vectors at a cosine of 0.6."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(WIDTH, 2)))
    return q[:, 0], 0.6 * q[:, 0] + 0.8 * q[:, 1]


def test_rounding_is_no_direction(directions):
    rng = np.random.default_rng(5)
    reference = noisy(rng, directions[0], 40, 0.05)
    rounding = Gradients((1e-8 * directions[0] * np.ones((8, 1))).astype(np.float32), np.zeros(8, np.int64))
    found = alignment.align(rounding, reference, budget=0)
    assert (found.cosine, found.corrected, found.halves) == (0.0, None, 0.0)
    small = Gradients(1e5 * rounding.gradient_KxD, rounding.tokens_K)
    assert alignment.align(small, reference, budget=0).corrected == pytest.approx(1.0, abs=0.05)


def test_noise_is_taken_out_of_the_corrected_cosine_and_not_of_the_plain_one(directions):
    first, second = directions
    rng = np.random.default_rng(1)
    estimator, reference = noisy(rng, 5 * first, 40, 0.1), noisy(rng, 3 * second, 40, 0.05)
    found = alignment.align(estimator, reference, budget=100)
    assert found.corrected == pytest.approx(0.6, abs=4 * found.corrected_error)
    assert found.corrected_error < 0.03
    # one batch: |g|² = 25 + WIDTH · 0.01, against the mean reference with |r|² = 9 + WIDTH · 0.0025 / 40
    plain = 0.6 * 5 * 3 / np.sqrt((25 + 40) * (9 + 0.25))
    assert found.cosine == pytest.approx(plain, abs=0.02)
    assert found.halves == pytest.approx(25 / (25 + WIDTH * 0.01 / 20), abs=0.02)


def test_a_larger_budget_buys_a_better_cosine(directions):
    first, second = directions
    rng = np.random.default_rng(2)
    estimator, reference = noisy(rng, first, 24, 0.1), noisy(rng, second, 24, 0.01)
    found = [alignment.align(estimator, reference, budget=budget) for budget in (100, 400, 10**9)]
    assert [one.tokens for one in found] == [100, 400, 2400]
    assert found[0].cosine < found[1].cosine < found[2].cosine < 0.6
    assert len({one.corrected for one in found}) == 1
    assert [tokens for tokens, _ in found[0].curve] == [100, 200, 400, 800, 1600]
    assert found[0].curve[0][1] == pytest.approx(found[0].cosine)
    assert list(found[0].curve) == sorted(found[0].curve, key=lambda point: point[1])


def test_noise_alone_has_no_direction(directions):
    rng = np.random.default_rng(3)
    found = alignment.align(noisy(rng, 0, 30, 1.0), noisy(rng, directions[0], 30, 0.001), budget=100)
    assert abs(found.cosine) < 0.05
    assert found.corrected is None or abs(found.corrected) < 4 * found.corrected_error
    assert abs(found.halves) < 0.1


def test_a_free_estimator_has_one_batch_a_cosine(directions):
    rng = np.random.default_rng(4)
    free = noisy(rng, directions[0], 8, 0.01, tokens=0)
    assert alignment.align(free, noisy(rng, directions[0], 8, 0.01), budget=100).tokens == 0


def test_a_signal_that_hangs_on_one_batch_is_none(directions):
    rng = np.random.default_rng(5)
    estimator = noisy(rng, 0, 12, 0.01)
    estimator.gradient_KxD[0] += 2 * directions[0]
    estimator.gradient_KxD[1] += 0.5 * directions[0]
    others = estimator.gradient_KxD[1:] - estimator.gradient_KxD[1:].mean(axis=0)
    estimator.gradient_KxD[1:] = others  # what is left without the first points nowhere
    found = alignment.align(estimator, noisy(rng, directions[0], 12, 0.01), budget=100)
    assert found.corrected is None
    assert found.corrected_error is None


def test_a_row_of_the_table():
    one, other = Alignment(0.5, 6000.0, 0.71, 0.02, 0.9), Alignment(0.25, 6000.0, None, None, 0.9)
    rows = [
        Row("A", {"reverse_kl": other, "forward_kl": one}),
        Row("B", {"reverse_kl": one, "forward_kl": other}),
    ]
    assert alignment_table.table(rows)[2:] == [
        "| B | 6,000 | 0.50 | 0.71 ± 0.02 | 0.25 | – | 0.90 |",
        "| A | 6,000 | 0.25 | – | 0.50 | 0.71 ± 0.02 | 0.90 |",
    ]


def test_the_document_has_its_table_and_its_figure(tmp_path):
    one = Alignment(0.5, 6000.0, 0.71, 0.02, 0.9, ((800.0, 0.3), (1600.0, 0.4)))
    free = Alignment(0.5, 0.0, 0.71, 0.02, 0.9, ((0.0, 0.3), (0.0, 0.4)))
    rows = [Row("A", {"reverse_kl": one, "forward_kl": one}), Row("B", {"reverse_kl": free, "forward_kl": free})]
    text = alignment_table.write(rows, tmp_path / "alignment.md").read_text(encoding="utf-8")
    assert "(figures/alignment.svg)" in text
    assert (tmp_path / "figures" / "alignment.svg").read_text(encoding="utf-8").count("<polyline") == 2


def teacher():
    def answer(request):
        texts = ("add 1 and 2 with 0 gives", "7 plus 5 makes 1 2")
        return [Continuation(texts[(request.seed + i) % 2], "length") for i in range(request.n)]

    return ScriptedTeacher(answer)


def test_under_its_settings_the_first_moment_is_the_gradient():
    config = alignment.configured(to_dict(tiny_config()), {}).optimizer
    optimizer = make_optimizer(config, 10**6)
    params = {"a": np.full((3, 4), 1e-3, np.float32)}
    state = optimizer.init(params)
    for seed in range(3):
        gradient = {"a": np.random.default_rng(seed).normal(0, 100, (3, 4)).astype(np.float32)}
        norm = optax.tree.norm(gradient)
        after, state, _ = optimizer.update(gradient, state, params, norm=norm, is_kept=np.True_)
        np.testing.assert_array_equal(optax.tree.get(state, "mu")["a"], gradient["a"])
        np.testing.assert_array_equal(after["a"], params["a"])


@pytest.mark.slow
def test_the_loop_gives_the_gradient_of_each_batch_and_the_student_stays(tmp_path, model, tokenizer, prompts):  # noqa: F811
    common = to_dict(tiny_config(**{"objective.anchor_weight": 0.0}))
    config = alignment.configured(common, {"objective.baseline": "leave_one_out"})
    experiment = prepare(config, tmp_path, student=model, tokenizer=tokenizer, teacher=teacher(), prompts=prompts)
    try:
        before = jax.device_get(experiment.state.params)
        found = alignment.gather(experiment, 2)
        assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(experiment.state.params)))
        with Interrupts().installed() as interrupts:
            tree = observe(experiment, 1, loop.Clock(), interrupts).credit.tree
        trees = batching.to_devices(batching.micro_batches(batching.pack(tree), 1), experiment.mesh, axis=1)
        options = step_options(config, experiment.mesh)
        expected, _ = step.gradients(experiment.frozen, experiment.state.params, None, trees, options)
    finally:
        experiment.close()
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(expected)])
    np.testing.assert_allclose(found.gradient_KxD[1], flat, rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(found.gradient_KxD[0] - found.gradient_KxD[1]) > 1e-3, "every batch is another one"
    assert found.tokens_K.shape == (2,)
