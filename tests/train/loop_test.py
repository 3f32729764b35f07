"""Whole runs of a few steps: resumed ones, stopped ones, and those that may not start."""

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.config import ConfigError
from omniopd_jax.teacher.protocol import BudgetExhausted, Continuation
from omniopd_jax.teacher.scripted import ScriptedTeacher, scripted_teacher
from omniopd_jax.train import batching, loop, observation
from omniopd_jax.train.evaluation import EvaluationStopped
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.metrics import meaning
from omniopd_jax.train.stops import CheckpointError, Interrupted, Interrupts, NotFinite, WorkdirError
from tests.train.conftest import read_lines


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One cache of compiled programs for all runs of this file."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def distil(make_config, model, tokenizer, prompts, teacher, compiled):
    def run(workdir, *, progress=None, teacher=teacher, student=model, **overrides):
        config = make_config(**{"train.compilation_cache": compiled} | overrides)
        return loop.run(
            config, workdir, student=student, tokenizer=tokenizer, teacher=teacher, prompts=prompts, progress=progress
        )

    return run


def stopper(error, at):
    """A progress callback that raises, or sends a signal, after a step."""

    def progress(step, metrics):
        if step == at:
            if isinstance(error, signal.Signals):
                os.kill(os.getpid(), error)
            else:
                raise error

    return progress


TIMES = ("teacher/seconds", "teacher/latency_seconds", "audit/similarity_seconds")


def without_times(lines):
    return [
        {
            name: value
            for name, value in line.items()
            if not (name.startswith(("time/", "compile/")) or "seconds" in name)
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_config, model, tokenizer, prompts, compiled):
    """Six steps in one go."""

    def answer(request):
        texts = ("add 1 and 2 with 0 gives", "7 plus 5 makes 1 2")
        return [Continuation(texts[(request.seed + i) % 2], "length") for i in range(request.n)]

    workdir = tmp_path_factory.mktemp("whole")
    config = make_config(**{"train.compilation_cache": compiled})
    result = loop.run(
        config, workdir, student=model, tokenizer=tokenizer, teacher=ScriptedTeacher(answer), prompts=prompts
    )
    return workdir, result


def test_three_steps_and_a_resume_are_six_steps_bitwise(whole, distil, tmp_path):
    workdir, uninterrupted = whole
    distil(tmp_path, **{"train.steps": 3})
    resumed = distil(tmp_path)
    assert resumed.updates == 6
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, uninterrupted.model.params)
    for name in ("metrics.jsonl", "audits.jsonl", "rollouts.jsonl"):
        assert without_times(read_lines(tmp_path / name)) == without_times(read_lines(workdir / name)), name
    assert resumed.teacher == uninterrupted.teacher


def test_a_signal_inside_code_that_wraps_exceptions_is_still_a_signal():
    def template():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise ValueError("the template refuses") from error

    with Interrupts().installed() as interrupts, pytest.raises(Interrupted), interrupts.abandonable():
        template()


def test_a_signal_ends_the_run_with_a_checkpoint_and_the_run_goes_on_from_there(whole, distil, tmp_path):
    _, uninterrupted = whole
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
    with pytest.raises(Interrupted) as stopped:
        distil(tmp_path, progress=stopper(signal.SIGINT, 2))
    assert stopped.value.exit_code == 130
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    with pytest.raises(Interrupted) as stopped:
        distil(tmp_path, progress=stopper(signal.SIGTERM, 4))
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGINT) is before
    resumed = distil(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, uninterrupted.model.params)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_was_written_after_the_last_checkpoint_is_written_again_not_twice(whole, distil, tmp_path):
    """As after kill -9: step 4 and 5 stand in the files, the checkpoint is of step 3."""
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path, progress=stopper(KeyboardInterrupt(), 5))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    resumed = distil(tmp_path)
    for name in ("metrics.jsonl", "audits.jsonl", "rollouts.jsonl"):
        assert without_times(read_lines(tmp_path / name)) == without_times(read_lines(whole[0] / name)), name
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole[1].model.params)


def test_nothing_compiles_after_the_first_step(whole):
    steps = read_lines(whole[0] / "metrics.jsonl")
    assert steps[0]["compile/programs"] > 0
    second, third, fourth, *later = [step["compile/programs"] for step in steps[1:]]
    assert [second, third, *later] == [0, 0, 0, 0]
    assert fourth <= 1, (
        "the checkpoint of step 3 takes its fingerprint within step 4's count, in this process or before"
    )


def test_a_run_whose_updates_are_lists_learns_the_same(whole, distil, tmp_path, monkeypatch):
    packed, pack = [], batching.pack
    monkeypatch.setattr(batching, "pack", lambda *args, **options: packed.append(pack(*args, **options)) or packed[-1])
    result = distil(tmp_path, **{"train.list_tokens_from": 1})
    assert any(tree.read_UxJxW is not None for tree in packed)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), result.model.params, whole[1].model.params
    )


def test_the_files_of_a_run(whole):
    workdir, result = whole
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    for line in read_lines(workdir / "metrics.jsonl"):
        unknown = [name for name in line if name != "step" and meaning(name) is None]
        assert not unknown
    audits = read_lines(workdir / "audits.jsonl")
    rollouts = read_lines(workdir / "rollouts.jsonl")
    assert len(rollouts) == 6 * 8
    responses = {(line["step"], line["response"]): line for line in rollouts}
    for line in audits:
        response = responses[line["step"], line["response"]]
        chunk = slice(line["start"], line["start"] + 4)
        assert line["entropy"] == pytest.approx(response["entropy"][line["start"]], abs=2e-4)
        assert line["logprob"] == pytest.approx(sum(response["logprob"][chunk]), abs=1e-3)
        assert line["prior"] == pytest.approx(np.exp(line["logprob"] / 4), abs=1e-3)
        assert line["target"] == pytest.approx((line["score_sum"] + line["prior"]) / (line["count"] + 1), abs=1e-3)
        assert line["weight"] == line["target"]
    assert sorted(p.name for p in (workdir / "model").iterdir() if p.suffix == ".safetensors") == ["model.safetensors"]
    assert result.teacher_tokens == sum(
        line["teacher/completion_tokens"] for line in read_lines(workdir / "metrics.jsonl")
    )


def test_the_exported_student_is_the_trained_one(whole):
    loaded = models.load_model(whole[1].model_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole[1].model.params)


def test_the_branch_arm_runs_and_logs_its_branches(distil, tmp_path):
    result = distil(
        tmp_path,
        **{"objective.arm": "branch", "objective.num_branches": 4, "objective.anchor_weight": 0.0, "train.steps": 1,
           "audit.positions": "random"},
    )  # fmt: skip
    assert result.metrics["loss/trunk"] == result.metrics["loss/anchor"] == 0
    assert result.metrics["branch/kept"] > 0
    for line in read_lines(tmp_path / "audits.jsonl"):
        assert line["target"] is None
        weights = [branch["weight"] for branch in line["branches"]]
        assert len(weights) == 4
        assert sum(weights) == pytest.approx(0, abs=1e-3)
        scores = [branch["score"] for branch in line["branches"]]
        assert np.argmax(weights) == np.argmax(scores)


def test_a_teacher_that_agrees_raises_the_chunks_log_probability(distil, whole, model, tokenizer, tmp_path):
    """One that never agrees weights them with the prior's share alone."""
    first = [line for line in read_lines(whole[0] / "audits.jsonl") if line["step"] == 1]
    says = iter([Continuation(line["chunk"], "stop" if line["is_end"] else "length") for line in first])
    overrides = {"train.steps": 1, "audit.num_continuations": 1}
    agrees = distil(tmp_path / "agrees", teacher=ScriptedTeacher(lambda request: [next(says)]), **overrides)
    distil(tmp_path / "never", teacher=scripted_teacher("noise"), **overrides | {"audit.similarity": "exact"})
    for line in read_lines(tmp_path / "agrees" / "audits.jsonl"):
        assert line["target"] == pytest.approx((1 + line["prior"]) / 2, abs=1e-3)
    for line in read_lines(tmp_path / "never" / "audits.jsonl"):
        assert line["target"] == pytest.approx(line["prior"] / 2, abs=1e-3)

    rows = [line for line in read_lines(whole[0] / "rollouts.jsonl") if line["step"] == 1]
    width = max(len(line["tokens"]) for line in rows)
    ids = [tokenizer.encode(" ".join([*line["prompt"].split(), "=", *line["tokens"]])) for line in rows]
    length = np.array([len(row) for row in ids])
    tokens = np.zeros((len(rows), width + 4), np.int32)
    for row, found in enumerate(ids):
        tokens[row, : len(found)] = found
    score = jax.jit(
        lambda model: jax.nn.log_softmax(models.logits(model, tokens, np.arange(width + 4) < length[:, None]))
    )

    def chunk_logprob(of):
        logprob = np.asarray(score(of))
        total = 0.0
        for line in first:
            before = length[line["response"]] - len(rows[line["response"]]["tokens"])
            for column in range(before + line["start"], before + line["start"] + 4):
                total += logprob[line["response"], column - 1, tokens[line["response"], column]]
        return total

    np.testing.assert_allclose(chunk_logprob(model), sum(line["logprob"] for line in first), rtol=1e-4)
    assert chunk_logprob(agrees.model) > chunk_logprob(model) + 0.5


def test_a_stopped_teacher_leaves_a_checkpoint(distil, tmp_path):
    calls = []

    def answer(request):
        calls.append(request)
        if len(calls) > 30:
            raise BudgetExhausted("The cap is reached.")
        return [Continuation("1 2", "stop")] * request.n

    with pytest.raises(BudgetExhausted):
        distil(tmp_path, teacher=ScriptedTeacher(answer))
    finished = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert os.listdir(tmp_path / "checkpoints") == [str(max(finished))]


def test_an_evaluation_that_stops_the_run_loses_no_line_of_the_finished_step(
    make_config, model, tokenizer, prompts, teacher, compiled, tmp_path
):
    def evaluator(student):
        calls.append(student)
        if len(calls) == 2:  # the first is of the untrained student
            raise EvaluationStopped("Nobody judges any more.")
        return {"eval/greedy_accuracy": 0.5}

    calls = []
    config = make_config(**{"train.compilation_cache": compiled, "train.steps": 2, "eval.every": 1})
    with pytest.raises(EvaluationStopped):
        loop.run(
            config, tmp_path, student=model, tokenizer=tokenizer, teacher=teacher, prompts=prompts, evaluator=evaluator
        )
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert {line["step"] for line in read_lines(tmp_path / "audits.jsonl")} == {1}


def test_everything_is_closed_where_one_part_cannot_be():
    def broken():
        raise OSError("disk")

    closed = []
    parts = {name: SimpleNamespace(close=lambda name=name: closed.append(name)) for name in ("teacher", "checkpoints")}
    with pytest.raises(OSError, match="disk"):
        Experiment.close(SimpleNamespace(log=SimpleNamespace(close=broken), **parts))
    assert closed == ["teacher", "checkpoints"]


def test_a_run_is_done_when_the_teacher_has_written_enough(distil, tmp_path):
    result = distil(tmp_path, **{"train.max_teacher_tokens": 150, "train.steps": 1000})
    assert result.teacher_tokens >= 150
    assert result.updates == 2


def test_numbers_that_are_not_finite_stop_the_run_at_the_step_before(distil, model, tmp_path):
    broken = jax.tree.map(jnp.array, model.params)
    broken["final_norm"]["scale"] = broken["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(NotFinite, match=r"Step 1: rollout/(entropy|logprob) is not finite") as stopped:
        distil(tmp_path, student=model.replace(params=broken))
    assert stopped.value.exit_code == 5


def test_a_step_that_is_not_finite_is_withheld(distil, whole, monkeypatch, tmp_path):
    """The third step's weights overflow: the run stops there, and goes on from the second when they no longer do."""
    give_credit, calls = observation.give_credit, []

    def overflowing(*args):
        credit = give_credit(*args)
        calls.append(credit)
        factor = np.float32(np.inf if len(calls) == 3 else 1)
        return credit._replace(tree=credit.tree.replace(weight_BxT=credit.tree.weight_BxT * factor))

    monkeypatch.setattr(observation, "give_credit", overflowing)
    with np.errstate(invalid="ignore"), pytest.raises(NotFinite) as stopped:
        distil(tmp_path)
    assert (stopped.value.step, stopped.value.term) == (3, "loss/trunk")
    assert os.listdir(tmp_path / "checkpoints") == ["2"]
    resumed = distil(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole[1].model.params)


def test_another_config_may_not_use_the_work_directory(distil, whole):
    with pytest.raises(WorkdirError, match=r"audit\.num_chunks was 2, now 1.*another work directory"):
        distil(whole[0], **{"audit.num_chunks": 1})
    assert WorkdirError.exit_code == 2


def test_a_work_directory_that_cannot_be_written_is_told_before_anything(distil, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot be written"):
        distil(tmp_path / "file" / "workdir")


def test_a_full_disk_names_the_last_intact_checkpoint(distil, tmp_path):
    """metrics.jsonl lies on a device that is always full."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device.*no checkpoint was written yet"):
        distil(tmp_path)


def test_missing_paths_are_one_sentence_each(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.student\.path is empty"):
        loop.run(make_config(), tmp_path / "a")
    with pytest.raises(ValueError, match="No folder") as absent:
        loop.run(make_config(**{"student.path": str(tmp_path / "none")}), tmp_path / "b")
    assert absent.value.exit_code == 2


def test_micro_batches_do_not_change_the_run(whole, distil, tmp_path):
    result = distil(tmp_path, **{"train.micro_batch_size": 2, "train.steps": 1})
    first = read_lines(whole[0] / "metrics.jsonl")[0]
    for name in ("loss/total", "loss/trunk", "optimizer/grad_norm", "anchor/fraction"):
        np.testing.assert_allclose(result.metrics[name], first[name], rtol=2e-6)


def test_the_result_prints(whole):
    text = str(dataclasses.replace(whole[1], seconds={"sample": 1.25}))
    assert text.splitlines()[0] == "updates  6"
    assert "sample 1.2 s" in text
