"""avg@k and pass@k are what their definitions say; intervals hold what they promise."""

import itertools

import numpy as np
import pytest

from omniopd_jax.eval import statistics


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(n):
    for verdicts in itertools.product([False, True], repeat=n):
        for k in range(1, n + 1):
            chosen = [any(verdicts[i] for i in choice) for choice in itertools.combinations(range(n), k)]
            found = statistics.pass_at_k(np.array([verdicts]), k)
            assert found[0] == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_one_is_the_average_and_k_is_bounded():
    correct = np.random.default_rng(0).random((50, 8)) < 0.3
    np.testing.assert_allclose(statistics.pass_at_k(correct, 1), statistics.average(correct))
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            statistics.pass_at_k(correct, k)


def test_pass_at_k_is_unbiased_from_few_samples_and_does_not_overflow():
    rng = np.random.default_rng(0)
    correct = rng.random((20000, 6)) < 0.2
    assert statistics.pass_at_k(correct, 4).mean() == pytest.approx(1 - 0.8**4, abs=0.01)
    assert statistics.pass_at_k(np.zeros((1, 1000), bool), 500)[0] == 0
    assert statistics.pass_at_k(np.eye(1, 1000, dtype=bool), 500)[0] == pytest.approx(0.5)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        shares = rng.binomial(4, 0.3, 100) / 4
        low, high = statistics.bootstrap_interval(shares, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.9 <= hits / 200 <= 0.99


def test_the_interval_is_about_two_standard_errors_and_repeats():
    shares = np.random.default_rng(2).random(400)
    low, high = statistics.bootstrap_interval(shares)
    assert (high - low) / (2 * 1.96 * statistics.standard_error(shares)) == pytest.approx(1, abs=0.1)
    assert statistics.bootstrap_interval(shares) == (low, high)
    assert statistics.bootstrap_interval(np.array([1.0])) == (1.0, 1.0)
    assert statistics.standard_error(np.array([0.5])) == 0
