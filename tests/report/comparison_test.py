"""Runs side by side."""

import json
import re

import numpy as np
import pytest

from omniopd_jax import report
from omniopd_jax.report.comparison import comparison_curves, group
from omniopd_jax.report.workdir import read_workdir
from tests.report import synthetic


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        synthetic.write_run(root / f"{arm}{seed}", steps=12, seed=seed, arm=arm, responses=1, quality=quality)
        for arm, quality in (("verify", 0.6), ("branch", 0.95))
        for seed in range(3)
    ]


def read_head(path):
    return json.loads(re.search(r'id="head">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def test_seeds_make_one_arm_named_by_what_differs(folders):
    arms = group([read_workdir(folder) for folder in folders])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("verify", 3), ("branch", 3)]


def test_arms_that_differ_in_a_knob_are_named_by_it(tmp_path):
    runs = [
        read_workdir(synthetic.write_run(tmp_path / str(weight), steps=1, responses=1, objective__anchor_weight=weight))
        for weight in (0.0, 0.1)
    ]
    assert [arm.label for arm in group(runs)] == ["anchor_weight 0", "anchor_weight 0.1"]


def test_runs_without_a_config_are_arms_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1}\n')
    assert [arm.label for arm in group([read_workdir(tmp_path / name) for name in ("a", "b")])] == ["a", "b"]


def test_bands_are_mean_and_range_over_the_seeds(folders):
    arms = group([read_workdir(folder) for folder in folders])
    (spec,) = [each for each in comparison_curves(arms) if each["title"] == "Loss: total"]
    for arm, line in zip(arms, spec["lines"], strict=True):
        values = np.array([run.series("loss/total")[1] for run in arm.runs])
        np.testing.assert_allclose(line["values"], values.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(line["low"], values.min(axis=0), rtol=1e-5)
        np.testing.assert_allclose(line["high"], values.max(axis=0), rtol=1e-5)


def test_a_seed_that_ends_early_ends_the_band(tmp_path):
    for seed, steps in enumerate((3, 5)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"train": {"seed": seed}}))
        rows = [{"step": step, "loss/total": step + seed} for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (spec,) = comparison_curves(group([read_workdir(tmp_path / name) for name in "01"]))
    assert spec["x"] == [1, 2, 3, 4, 5]
    assert spec["lines"][0]["values"] == [1.5, 2.5, 3.5, None, None]


def test_the_page_holds_the_final_table(folders, tmp_path):
    path = report.write_comparison(folders, tmp_path / "comparison.html")
    head = read_head(path)
    table = head["tables"][0]
    assert table["columns"][:3] == ["Arm", "Seeds", "Greedy %"]
    for row, first in zip(table["rows"], (0, 3), strict=True):
        values = [
            100 * json.loads((folder / "result.json").read_text())["after"]["greedy"]["accuracy"]
            for folder in folders[first : first + 3]
        ]
        assert row[1:3] == ["3", [f"{np.mean(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"]]
    assert head["tables"][1]["rows"] == [["objective.arm", "verify", "branch"]]
    assert head["headline"].startswith("Greedy accuracy: branch")
