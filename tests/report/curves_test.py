"""Charts: every metric is on one, none is drawn without values."""

import numpy as np

from omniopd_jax.report.curves import CHARTS, accuracy_label, run_curves
from omniopd_jax.report.derived import with_derived
from omniopd_jax.report.workdir import read_workdir
from tests.report import synthetic


def test_every_metric_of_a_run_is_on_exactly_one_line(tmp_path):
    run = with_derived(read_workdir(synthetic.write_run(tmp_path, steps=20, responses=2)))
    drawn = sum(len(spec["lines"]) for spec in run_curves(run))
    bands = sum("low" in line for spec in run_curves(run) for line in spec["lines"])
    assert drawn + 2 * bands == len({name for row in run.metrics.values() for name in row})
    assert all(any(value is not None for value in line["values"]) for spec in run_curves(run) for line in spec["lines"])


def test_what_no_chart_knows_comes_last_without_a_group(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss/total": 1, "novel/thing": 2}\n{"step": 2, "loss/total": 3}\n'
    )
    *_, last = run_curves(read_workdir(tmp_path))
    assert (last["group"], last["title"], last["x"]) == ("", "novel/thing", [1, 2])
    assert last["lines"] == [{"label": "novel/thing", "values": [2.0, None]}]


def test_a_loss_term_that_is_always_0_is_not_drawn_with_the_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1, "loss/anchor": 0, "loss/trunk": 1}\n')
    first, last = run_curves(read_workdir(tmp_path))
    assert [line["label"] for line in first["lines"]] == ["total", "responses"]
    assert last["title"] == "loss/anchor"


def test_no_metric_is_on_two_charts():
    names = [name for chart in CHARTS for name, _ in chart.lines]
    assert len(names) == len(set(names))


def test_accuracies_are_told_from_other_evaluation_figures():
    assert accuracy_label("eval/greedy_accuracy") == "greedy"
    assert accuracy_label("eval/temperature_1_accuracy") == "temperature 1"
    assert accuracy_label("eval/accuracy") == "accuracy"
    assert accuracy_label("eval/greedy_standard_error") is None
    assert accuracy_label("loss/total") is None


def test_derived_figures_follow_from_the_lines(tmp_path):
    run = with_derived(read_workdir(synthetic.write_run(tmp_path, steps=2, responses=5)))
    for step, row in run.metrics.items():
        audits = [audit for key, each in run.responses.items() if key[0] == step for audit in each.audits.values()]
        similarity = [audit.similarity for audit in audits]
        np.testing.assert_allclose(row["audit/similarity"], np.mean(similarity))
        assert row["audit/similarity_low"] == np.sort(similarity)[int(0.1 * (len(similarity) - 1))]
        assert min(similarity) <= row["audit/similarity_low"] <= row["audit/similarity"] <= row["audit/similarity_high"]
        assert row["audit/identical_share"] == np.mean([audit.is_unanimous for audit in audits])
        assert row["rollout/truncated"] == 1 - row["rollout/finished"]


def test_a_logged_metric_is_never_replaced_by_a_derived_one(tmp_path):
    synthetic.write_run(tmp_path, steps=1, responses=2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "audit/similarity": 42}\n')
    assert with_derived(read_workdir(tmp_path)).metrics[1]["audit/similarity"] == 42
