"""The result line."""

import json

import numpy as np
import pytest

from omniopd_jax.report.result import measures, wilson
from omniopd_jax.report.workdir import read_workdir


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # Wilson's score interval without continuity correction, from published tables and R's prop.test(correct=FALSE).
    [(0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 100, 0.4038, 0.5962), (0.9, 1000, 0.8799, 0.9171)],
)
def test_wilson_interval(share, n, low, high):
    assert wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_result_json_gives_before_and_after(tmp_path):
    result = {
        "problems": 100,
        "before": {"greedy": {"accuracy": 0.3, "standard_error": 0.04}},
        "after": {
            "greedy": {"accuracy": 0.8, "standard_error": 0.04},
            "temperature_1": {"accuracy": 1.0, "standard_error": 0},
        },
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    greedy, sampled = measures(read_workdir(tmp_path))
    assert (greedy.label, greedy.value, greedy.before) == ("greedy", 0.8, 0.3)
    assert greedy.interval == pytest.approx((0.7216, 0.8784), abs=1e-4)
    assert (sampled.label, sampled.before) == ("temperature 1", None)
    assert sampled.interval == pytest.approx(wilson(1.0, 100))


def test_a_bare_result_is_read_too(tmp_path):
    (tmp_path / "result.json").write_text('{"accuracy": 0.25, "standard_error": 0.1}')
    (only,) = measures(read_workdir(tmp_path))
    assert (only.label, only.value) == ("accuracy", 0.25)


def test_without_it_the_evaluations_during_training_count(tmp_path):
    rows = [
        {"step": 0, "eval/greedy_accuracy": 0.2, "eval/greedy_standard_error": 0.01},
        {"step": 5, "loss/total": 1.0},
        {"step": 10, "eval/greedy_accuracy": 0.6, "eval/greedy_standard_error": 0.02},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (only,) = measures(read_workdir(tmp_path))
    assert (only.label, only.value, only.before, only.step, only.standard_error) == ("greedy", 0.6, 0.2, 10, 0.02)


def test_the_number_of_problems_follows_from_the_standard_error(tmp_path):
    answers = np.array([1] * 35 + [0] * 165)
    rows = [
        {
            "step": 0,
            "eval/greedy_accuracy": answers.mean(),
            "eval/greedy_standard_error": answers.std(ddof=1) / 200**0.5,
        },
        {"step": 9, "eval/greedy_accuracy": 1.0, "eval/greedy_standard_error": 0.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (only,) = measures(read_workdir(tmp_path))
    assert only.problems == 200
    assert only.interval == pytest.approx(wilson(1.0, 200))


def test_nothing_is_made_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1}\n')
    (tmp_path / "result.json").write_text('{"accuracy": 7, "name": "accuracy"}')
    assert measures(read_workdir(tmp_path)) == []
