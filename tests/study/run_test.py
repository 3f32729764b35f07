"""A whole small comparison: a world is built, arms are trained and measured, the table says what came out."""

import json
from pathlib import Path

import pytest

from configs import compare_small
from omniopd_jax.config import from_mapping, to_dict
from omniopd_jax.study import design, job, results, schedule
from omniopd_jax.study.run import MEASURED

pytestmark = pytest.mark.slow
ARMS = ("verify", "sft", "verify_self")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(study, common, folder) of a finished comparison."""
    plain = compare_small.get_study("fast") | dict(name="s", seeds=(0,), claims=(), references=("before", "sft"))
    arms = tuple(arm for arm in compare_small.get_study("arithmetic")["arms"] if arm["name"] in ARMS)
    plain |= dict(arms=tuple(arm | dict(more_seeds=()) for arm in arms), curves=("verify", "sft"), extensions=0)
    study = design.study_from(plain)
    common = to_dict(from_mapping(compare_small.get_config("fast")))
    folder = tmp_path_factory.mktemp("compare") / study.name
    job.write_record(folder, study, common)
    while jobs := schedule.next_jobs(study, folder):
        job.do(folder, jobs[0])
    return study, common, folder


def _measured(folder: Path, arm: str) -> tuple[Path, dict]:
    (file,) = folder.glob(f"runs/{arm}/*/seed-0/{MEASURED}")
    return file, json.loads(file.read_text(encoding="utf-8"))


def test_what_was_measured_is_what_the_run_wrote_down(compared):
    _, common, folder = compared
    for arm in ARMS:
        file, measured = _measured(folder, arm)
        rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
        steps = [row["step"] for row in rows if "time/step_s" in row]
        assert measured["updates"] == max(steps) == common["train"]["steps"]
        assert measured["teacher_tokens"] == rows[-1].get("teacher/total_tokens", 0) > 0
        for mode in ("greedy", "temperature_1"):
            part = measured["eval"][mode]
            assert len(part["right"]) == common["world"]["eval_problems"]
            assert part["accuracy"] == pytest.approx(part["right"].count("1") / len(part["right"]))
        assert measured["cpu_seconds_an_update"] > 0
    verify, own = (_measured(folder, arm)[1] for arm in ("verify", "verify_self"))
    assert verify["kl"] != own["kl"], "another teacher teaches another student"


def test_a_run_that_is_done_again_gives_the_same_numbers(compared, tmp_path):
    _, _, folder = compared
    file, before = _measured(folder, "sft")
    again = tmp_path / "again"
    (again / "worlds").mkdir(parents=True)
    (again / "worlds" / "seed-0").symlink_to(folder / "worlds" / "seed-0")
    (again / job.RECORD).write_bytes((folder / job.RECORD).read_bytes())
    job.do(again, file.parent.relative_to(folder).as_posix())
    after = _measured(again, "sft")[1]
    same = ("eval", "validation", "kl", "variety", "updates", "teacher_tokens", "teacher_tokens_read")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


def test_the_table_names_every_arm_and_the_command_would_go_on(compared):
    study, common, folder = compared
    schedule.check_settings(study, common, folder)
    text = results.write_results(folder.parent, folder.parent / "results.md").read_text(encoding="utf-8")
    for arm in study.arms:
        accuracy = 100 * _measured(folder, arm.name)[1]["eval"]["greedy"]["accuracy"]
        assert f"| {arm.title} | 0.0002 | {accuracy:.1f} |" in text
    assert "Not complete" not in text
    assert "| − the same, the student its own teacher |" in text
