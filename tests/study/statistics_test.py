"""Statistics against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from omniopd_jax.study.statistics import difference, estimate


def test_a_mean_over_seeds():
    found = estimate([0.2, 0.5, 0.8])
    assert found.mean == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(stats.sem([0.2, 0.5, 0.8]))
    assert estimate([0.3]).standard_error is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def verdicts(rng, accuracies, problems=400):
    return np.stack([rng.random(problems) < accuracy for accuracy in accuracies])


def test_the_interval_over_seeds_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    better, worse = verdicts(rng, (0.9, 0.8, 0.7)), verdicts(rng, (0.5, 0.3, 0.1))
    found = difference(better, worse)
    each = better.mean(axis=1) - worse.mean(axis=1)
    low, high = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(each.mean())
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.verdict == "holds"
    assert difference(worse, better).verdict == "reversed"


def test_mcnemar_counts_the_problems_on_which_the_two_differ():
    better = np.array([[1, 1, 1, 1, 0, 1, 0, 0]], bool)
    worse = np.array([[0, 0, 0, 1, 1, 0, 0, 0]], bool)
    found = difference(better, worse)
    assert found.p_problems == pytest.approx(stats.binomtest(4, 5).pvalue)
    assert (found.low, found.high) == (pytest.approx(-0.625), 1.0)  # one seed says nothing about seeds
    assert found.verdict == "undecided"
    assert difference(better, better).p_problems == 1.0


def test_seeds_that_agree_by_luck_do_not_make_the_interval_vanish():
    rng = np.random.default_rng(1)
    row = verdicts(rng, (0.6,))[0]
    other = verdicts(rng, (0.55,))[0]
    found = difference(np.stack([row] * 3), np.stack([other] * 3))
    assert found.high - found.low > 0.05


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Seeds vary by 3 points, problems by their own chance: the 95 % interval covers the mean difference."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        shift = rng.normal(0, 0.03, (2, 3))
        found = difference(verdicts(rng, 0.6 + shift[0], 300), verdicts(rng, 0.5 + shift[1], 300))
        covered += found.low <= 0.1 <= found.high
    assert covered / 400 > 0.93


def test_verdicts_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        difference(np.zeros((2, 3), bool), np.zeros((2, 4), bool))
