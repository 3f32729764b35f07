"""The teacher that answers by a rule."""

import dataclasses
import json

import pytest

from omniopd_jax.teacher.protocol import Continuation, ContinuationRequest
from omniopd_jax.teacher.scripted import NOISE, ScriptedTeacher, scripted_teacher
from omniopd_jax.types import InputError, Message

REQUEST = ContinuationRequest(
    messages=(Message("user", "2 + 2 ?"),), prefix="It is", n=3, max_tokens=8, temperature=1.0, top_p=1.0, seed=1
)


def test_a_rule_answers_in_order_and_its_gaps_are_missing():
    teacher = ScriptedTeacher(lambda request: [Continuation(f" {request.seed}", "stop"), None])
    first, second = teacher.continue_texts([REQUEST, dataclasses.replace(REQUEST, seed=2)])
    assert [c.text for c in first.continuations] == [" 1"]
    assert [c.text for c in second.continuations] == [" 2"]
    assert first.num_missing == 2
    assert first.usage.prompt_tokens == 6
    assert first.usage.calls == 1
    assert "rule" in teacher.probe()
    teacher.close()


def test_at_most_n_answers():
    (result,) = ScriptedTeacher(lambda request: [Continuation("x", "length")] * 9).continue_texts([REQUEST])
    assert len(result.continuations) == 3
    assert result.num_missing == 0


def test_named_rules():
    (noise,) = scripted_teacher("noise").continue_texts([REQUEST])
    assert noise.continuations == (Continuation(NOISE, "length"),) * 3
    (missing,) = scripted_teacher("missing").continue_texts([REQUEST])
    assert missing.continuations == ()
    assert missing.num_missing == 3


def test_a_file_of_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    texts = [" four", {"text": " 4.", "finish_reason": "stop"}]
    path.write_text(json.dumps({"prompt": "2 + 2 ?", "prefix": "It is", "texts": texts}) + "\n\n", encoding="utf-8")
    teacher = scripted_teacher(str(path))
    found, other = teacher.continue_texts([REQUEST, dataclasses.replace(REQUEST, prefix="")])
    assert found.continuations == (Continuation(" four", "length"), Continuation(" 4.", "stop"))
    assert (found.num_missing, other.num_missing) == (1, 3)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"prompt": "x", "texts": []}',
        '{"prompt": "", "prefix": "", "texts": [{"text": "a", "finish_reason": "x"}]}',
    ],
)
def test_bad_files_name_the_line(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"answers\.jsonl line 2 is not a row"):
        scripted_teacher(str(path))
    with pytest.raises(InputError, match="neither 'noise', 'missing' nor a jsonl file"):
        scripted_teacher("echo")
