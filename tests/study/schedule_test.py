"""The scheduler does what is wanted, no more at a time than it may, and goes on from what is finished."""

import json
import os
import signal
import sys
import time

import pytest

from configs import compare_small
from omniopd_jax.config import from_mapping, to_dict
from omniopd_jax.study import design, job, results, schedule
from omniopd_jax.study.design import Run
from omniopd_jax.study.run import MEASURED
from omniopd_jax.train.checkpoint import WorkdirError
from omniopd_jax.train.stops import Interrupted
from tests.study.design_test import GRID, plain

# What a job would write, without the job: accuracy rises with the learning rate up to 4e-4 and falls behind it.
WORKER = """
import json, sys
from pathlib import Path
folder, job = Path(sys.argv[1]), sys.argv[2]
if job == FAIL:
    sys.exit("this one breaks")
kind, _, rest = job.partition("/")
def part(share):
    one = dict(accuracy=share, right="1" * round(10 * share) + "0" * (10 - round(10 * share)))
    modes = dict(greedy=one, temperature_1=one)
    return dict(validation=modes, eval=modes, variety=2.0, kl=None)
if kind == "world":
    path, found = folder / "worlds" / f"seed-{rest}", dict(student=part(0.1), teacher=part(1.0))
else:
    rate = float(job.split("/")[2])
    path = folder / job
    found = part(0.9 if rate == 4e-4 else 0.3) | dict(failed="", updates=100, teacher_tokens=800,
        teacher_tokens_read=900, seconds_an_update=0.1, cpu_seconds_an_update=0.2)
path.mkdir(parents=True, exist_ok=True)
(path / "part").write_text(json.dumps(found))
(path / "part").rename(path / "measured.json")
"""


def worker(tmp_path, fail=""):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("FAIL", repr(fail)), encoding="utf-8")
    return [sys.executable, "-S", str(script)]


@pytest.fixture
def study():
    return design.study_from(plain())


COMMON = dict(train=dict(steps=100, max_teacher_tokens=1000))


def run_all(study, tmp_path, *, workers=2, fail=""):
    said = []
    folder = tmp_path / study.name
    job.write_record(folder, study, COMMON)
    command = worker(tmp_path, fail)
    schedule.do_all(study, folder, workers=workers, report=said.append, command=command, poll_s=0.01)
    return folder, said


def test_everything_is_done_once_and_nothing_twice(study, tmp_path):
    folder, said = run_all(study, tmp_path)
    assert schedule.next_jobs(study, folder) == []
    started = [line for line in said if line.endswith("started")]
    assert len(started) == 2 + 6 + 2 + 2  # worlds, searches, the second seed of each, the control
    assert {line.split(":")[0] for line in started[:2]} == {"world/0", "world/1"}, "a run needs its world"
    _, again = run_all(study, tmp_path)
    assert again == []


def test_a_finished_run_of_other_settings_is_named_and_not_mixed_in(study, tmp_path):
    common = to_dict(from_mapping(compare_small.get_config("fast")))
    run, folder = Run("a", 4e-4, 0), tmp_path / study.name
    config = to_dict(design.run_config(common, study, run, tmp_path / "moved"))
    (folder / run.path).mkdir(parents=True)
    measured = dict(failed="", validation=dict(greedy=dict(accuracy=0.5), temperature_1=dict(accuracy=0.5)))
    (folder / run.path / MEASURED).write_text(json.dumps(measured), encoding="utf-8")
    (folder / run.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    schedule.check_settings(study, common, folder)
    common["train"]["steps"] += 1
    with pytest.raises(WorkdirError, match=r"runs/a/4.00e-04/seed-0 is finished with other .*train.steps was 4, now 5"):
        schedule.check_settings(study, common, folder)
    schedule.check_settings(design.only(study, ["b"]), common, folder)  # nobody's table


def test_no_more_than_so_many_at_a_time(study, tmp_path):
    _, said = run_all(study, tmp_path, workers=1)
    assert [line.rpartition(" ")[2] for line in said[::2]] == ["started"] * (len(said) // 2)


def test_a_job_that_breaks_is_named_with_its_last_words(study, tmp_path):
    broken = Run("b", GRID[0], 0)
    with pytest.raises(schedule.RunFailed, match=r"seed-0 failed .*this one breaks"):
        run_all(study, tmp_path, fail=broken.path, workers=1)
    assert (tmp_path / "s" / Run("a", 4e-4, 1).path / MEASURED).is_file(), "the other arms are not held up"
    folder, said = run_all(study, tmp_path)
    assert said[0] == f"{broken.path}: started", "what is finished is kept"
    assert schedule.next_jobs(study, folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_behind(study, tmp_path, number):
    script = tmp_path / "sleeper.py"
    script.write_text("import time; time.sleep(60)", encoding="utf-8")
    began, said = time.time(), []

    def stop(line):
        said.append(line)
        os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        schedule.do_all(study, tmp_path / "s", workers=1, report=stop, command=[sys.executable, str(script)])
    assert said == ["world/0: started"]
    assert time.time() - began < 30


def test_the_results_say_what_was_measured_and_what_is_missing(study, tmp_path):
    folder, _ = run_all(study, tmp_path)
    (folder / Run("c", 4e-4, 1).path / MEASURED).unlink()
    for run in (Run("a", 4e-4, 0), Run("a", 4e-4, 1)):
        rows = [{"step": 0, "eval/greedy_accuracy": 0.1, "eval/temperature_1_accuracy": 0.1}]
        rows += [
            {"step": 5, "teacher/total_tokens": 40.0, "eval/greedy_accuracy": 0.9, "eval/temperature_1_accuracy": 0.8}
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / run.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    text = results.write_results(tmp_path, tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| *the student before* | – | 10.0 ± 0.0 | 10.0 ± 0.0 | 2.00 ± 0.00 | – | – |" in text
    assert (
        "| A | 0.0004 | 90.0 ± 0.0 | 90.0 ± 0.0 | 2.00 ± 0.00 | – | – | 800 | 900 | 100 | updates | 0.20 | 2 |" in text
    )
    assert "Not complete: c." in text
    assert "5 of 6 runs at chosen rates are finished" in text
    assert "- A > B: greedy **undecided** (+0.0 [+0.0, +0.0], p = 1.000)" in text
    assert "| A | +80.0 [" in text
    assert "| A | 0.0001: 30.0 · 0.0004: 90.0 · 0.0016: 30.0 | 0.0004 |" in text
    assert (tmp_path / "out" / "figures" / "s.svg").read_text(encoding="utf-8").count("<polyline") == 6


def test_a_run_that_overflowed_is_named_beside_the_means_that_leave_it_out(study, tmp_path):
    folder, _ = run_all(study, tmp_path)
    failed = json.dumps(dict(failed="The loss is not finite."))
    (folder / Run("a", 4e-4, 1).path / MEASURED).write_text(failed, encoding="utf-8")
    text = results.write_results(tmp_path, tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| A | 0.0004 | 90.0 | 90.0 | 2.00 | – | – | 800 | 900 | 100 | updates | 0.20 | 1 (1 not finite) |" in text
    for seed in (0, 1):
        (folder / Run("c", 4e-4, seed).path / MEASURED).write_text(failed, encoding="utf-8")
    text = results.write_results(tmp_path, tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| C | 0.0004 |" + " – |" * 10 + " 0 (2 not finite) |" in text


def test_a_run_that_overflowed_loses_the_search(study, tmp_path):
    folder, _ = run_all(study, tmp_path)
    path = folder / Run("a", 4e-4, 0).path / MEASURED
    path.write_text(json.dumps(dict(failed="The loss is not finite.")), encoding="utf-8")
    assert schedule.finished(study, folder)[Run("a", 4e-4, 0)] == -1
    assert schedule.next_jobs(study, folder)[0] == Run("a", 2.5e-5, 0).path, "the best is now at the edge of the grid"
