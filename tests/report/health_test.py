"""Alarms: each fires on its illness, none on a healthy run."""

import json

import pytest

from omniopd_jax.report.health import findings
from omniopd_jax.report.workdir import read_workdir
from tests.report import synthetic

ILLNESSES = {
    "A number was not finite": {"loss/total": lambda t: float("nan") if t > 0.9 else 1.0},
    "Responses are getting longer and longer": {
        "rollout/tokens": lambda t: 100 + 300 * t,
        "rollout/truncated": lambda t: 0.8 * t,
    },
    "The student stops no more": {"rollout/finished": lambda t: 0.95 * (1 - t)},
    "The student repeats itself": {"rollout/repetition": lambda t: 0.05 + 0.6 * t},
    "Entropy has collapsed": {"rollout/entropy": lambda t: 0.5 * (1 - 0.85 * t)},
    "The teacher gives one answer only": {"audit/identical_share": lambda t: 0.99},
    "The teacher is dead": {"teacher/missing_share": lambda t: 0.0 if t < 0.5 else 1.0},
    "The teacher answers unreliably": {"teacher/missing_share": lambda t: 0.4},
    "The anchor is starving": {"anchor/fraction": lambda t: 0.03},
    "There is no signal left": {"audit/advantage": lambda t: 0.3 if t < 0.5 else 1e-4},
}


def write(path, columns, steps=60, **config):
    rows = [
        {"step": step} | {name: value(step / steps) for name, value in columns.items()} for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.json").write_text(json.dumps({"objective": {"anchor_weight": 0.1} | config}))
    return read_workdir(path)


def alarms(run):
    return [finding.title for finding in findings(run) if finding.level == "alarm"]


@pytest.mark.parametrize("title", ILLNESSES)
def test_an_illness_raises_its_alarm_alone_and_first(tmp_path, title):
    run = write(tmp_path, ILLNESSES[title])
    assert alarms(run) == [title]
    assert findings(run)[0].title == title


def test_a_healthy_run_raises_none(tmp_path):
    run = read_workdir(synthetic.write_run(tmp_path, steps=60, responses=2))
    assert alarms(run) == []


def test_what_was_not_measured_is_said_to_be_unknown(tmp_path):
    run = write(tmp_path, {"loss/total": lambda t: 1.0})
    levels = {finding.level for finding in findings(run)}
    assert levels == {"fine", "unknown"}


@pytest.mark.parametrize("arm", ["sft", "opd", "grpo", "anchor"])
def test_an_arm_is_not_asked_for_what_it_does_not_measure(tmp_path, arm):
    columns = {"loss/total": lambda t: 1.0, "anchor/fraction": lambda t: 1.0}
    if arm != "sft":
        columns |= {name: lambda t: 0.5 for name in ("rollout/tokens", "rollout/finished", "rollout/entropy")}
    if arm == "sft":
        columns["teacher/missing_share"] = lambda t: 0.0
    if arm == "grpo":
        columns["reward/informative"] = lambda t: 0.5
    run = write(tmp_path, columns)
    run.config["objective"]["arm"] = arm
    unknown = {finding.title for finding in findings(run) if finding.level == "unknown"}
    assert unknown <= {"Repetition"}  # of the responses' texts, which this log lacks


def test_rewards_that_are_all_one_are_no_signal(tmp_path):
    assert alarms(write(tmp_path, {"reward/informative": lambda t: 0.01})) == ["There is no signal left"]


def test_an_anchor_that_is_switched_off_does_not_starve(tmp_path):
    run = write(tmp_path, {"anchor/fraction": lambda t: 0.0}, anchor_weight=0.0)
    assert alarms(run) == []


def test_audited_share_stands_in_for_the_anchored_one(tmp_path):
    columns = {"audit/fraction": lambda t: 0.95}
    assert alarms(write(tmp_path, columns, anchor_tokens="unaudited")) == ["The anchor is starving"]
    assert alarms(write(tmp_path, columns, anchor_tokens="all")) == []


def test_few_steps_raise_no_alarm_of_change(tmp_path):
    assert alarms(write(tmp_path, ILLNESSES["Entropy has collapsed"], steps=4)) == []
