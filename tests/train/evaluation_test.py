"""The evaluator of the loop: what it reads, what it refuses before anything runs, what it reports."""

import json

import pytest

from omniopd_jax.config import ConfigError
from omniopd_jax.eval.evaluate import Judge
from omniopd_jax.eval.sandbox import SandboxError
from omniopd_jax.eval.verdict import Verdict
from omniopd_jax.train import distributed, evaluation
from omniopd_jax.train.evaluation import EvaluationStopped, held_out, judge_of, make_evaluator, rows_of, task_of
from omniopd_jax.types import InputError


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_are_read_in_the_layout_that_is_named(make_config, tmp_path):
    mbpp = {"task_id": 1, "text": "Write f.", "test_list": ["assert f() == 1"]}
    path = written(tmp_path, mbpp)
    config = make_config(**{"data.task": "mbpp", "data.eval": path, "eval.task": "mbpp", "eval.problems": 1})
    assert rows_of(path, config.data)[0].answer == held_out(config)[0].answer == '{"tests": "\\nassert f() == 1"}'
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    path = written(tmp_path, *rows)
    plain = make_config(**{"data.eval": path, "eval.problems": 2})
    assert [prompt.messages[0].content for prompt in held_out(plain)] == ["0?", "1?"]
    asked = make_config(**{"data.eval": path, "eval.task": "gsm8k", "eval.instruction": "Q: {problem}"})
    assert held_out(asked)[2].messages[0].content == "Q: 2?"
    told = make_config(**{"data.eval": path, "eval.task": "gsm8k", "data.system_prompt": "Use ####."})
    assert [message.content for message in held_out(told)[0].messages] == ["Use ####.", "0?"]


def test_what_auto_stands_for(make_config):
    assert task_of(make_config()) == "math"
    assert task_of(make_config(**{"world.kind": "arithmetic"})) == "world"
    assert task_of(make_config(**{"eval.task": "aime"})) == "aime"


def test_what_cannot_be_judged_is_refused_before_anything_is_generated(make_config, prompts):
    with pytest.raises(ConfigError, match=r"config\.data\.eval names no file"):
        held_out(make_config(**{"eval.every": 1}))
    with pytest.raises(InputError, match=r"set eval\.sandbox"):
        judge_of(make_config(**{"eval.task": "humaneval"}), prompts)
    with pytest.raises(ConfigError, match=r"config\.eval\.sandbox='docker' must be"):
        make_config(**{"eval.sandbox": "docker"})
    with pytest.raises(ConfigError, match=r"config\.eval\.instruction must be"):
        make_config(**{"eval.instruction": "Think."})


def test_the_evaluator_reports_both_modes_and_the_main_metric(make_config, model, tokenizer, prompts, monkeypatch):
    config = make_config(**{"eval.task": "world", "eval.problems": 4, "eval.samples": 2, "eval.batch_size": 8})
    found = make_evaluator(config, tokenizer, prompts)(model)
    assert evaluation.MAIN_METRIC in found
    names = {"accuracy", "standard_error", "truncated", "no_answer"}
    assert set(found) == {f"eval/{mode}_{name}" for mode in evaluation.MODES for name in names} | {
        "eval/temperature_1_pass_at_2"
    }
    assert found["eval/temperature_1_pass_at_2"] >= found["eval/temperature_1_accuracy"]

    def broken(response, answer) -> Verdict:
        raise SandboxError("The sandbox is down.")

    monkeypatch.setattr(evaluation, "get_judge", lambda *args, **kwargs: Judge(broken))
    with pytest.raises(EvaluationStopped, match="is down") as caught:
        make_evaluator(config, tokenizer, prompts)(model)
    assert caught.value.exit_code == 3
    with pytest.raises(EvaluationStopped, match="is down"):  # rewards too: the run saves its steps and ends
        judge_of(config, prompts).all(["18"], ["18"])


def test_answers_are_decoded_side_by_side_as_asked_or_as_in_training(make_config, monkeypatch):
    decoded = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, batch_size, **__: decoded.append(batch_size))
    for asked in (8, 0):
        config = make_config(**{"eval.batch_size": asked, "rollout.slots": 3})
        evaluation.measure(config, *[None] * 4)  # pyright: ignore[reportArgumentType]
    assert decoded == [8, 8, 3, 3]


def test_each_answer_is_judged_by_one_process_and_all_have_all_verdicts(make_config, prompts, monkeypatch):
    asked = ["nobody yet"]

    def verdict(response, answer) -> Verdict:
        asked.append(response)
        return Verdict(response == answer, response)

    def in_turn(part):
        found, asked[:] = [], []
        for own in (range(2), range(2, 5)):
            monkeypatch.setattr(distributed, "share", lambda count, own=own: own)
            found.append(part())
            assert asked == list("abcde")[: own.stop]
        return found

    monkeypatch.setattr(evaluation, "get_judge", lambda *args, **kwargs: Judge(verdict))
    monkeypatch.setattr(distributed, "collect", in_turn)
    found = judge_of(make_config(), prompts).all(list("abcde"), list("abxde"))
    assert len(asked) == 5
    assert [one.reason for one in found] == list("abcde")
    assert [one.passed for one in found] == [True, True, False, True, True]
