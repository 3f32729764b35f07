"""Whole answers of the teacher: what is asked, and what they are in the student's tokens."""

import numpy as np
import pytest

from omniopd_jax.data import load_tokenizer
from omniopd_jax.teacher.absent import AbsentTeacher
from omniopd_jax.teacher.answers import ask_answers
from omniopd_jax.teacher.protocol import Continuation, TeacherStopped
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.teacher.verify import VerifySettings
from omniopd_jax.types import Message, Prompt, PromptBatch
from omniopd_jax.worlds import arithmetic

T = 6
ANSWERS = {
    "p0": Continuation("answer 7", "stop"),
    "p1": Continuation("7 plus 5 plus 1 makes 1 3", "stop"),  # longer than T
    "p2": None,
    "p3": Continuation("7 plus", "length"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    arithmetic.save_tokenizer(str(folder))
    return load_tokenizer(folder)


def ask(tokenizer, teacher, rows=range(4), **changes):
    prompts = tuple(Prompt(name, (Message("user", name),)) for name in ANSWERS)
    none = np.zeros((4, 1), np.int32)
    settings = VerifySettings(chunk_tokens=2, num_continuations=5, temperature=0.7, token_slack=1.5, **changes)
    return ask_answers(
        PromptBatch(prompts, none, none > 0, np.arange(4, dtype=np.int32)), rows, tokenizer=tokenizer, teacher=teacher,
        settings=settings, max_new_tokens=T, seed=3, step=1,
    )  # fmt: skip


def test_one_answer_a_prompt_in_the_students_tokens(tokenizer):
    seen = []

    def script(request):
        seen.append(request)
        return [ANSWERS[request.messages[0].content]]

    answers, metrics = ask(tokenizer, ScriptedTeacher(script))
    assert all((r.prefix, r.n, r.max_tokens, r.temperature) == ("", 1, 9, 0.7) for r in seen)
    assert len({request.seed for request in seen}) == 4
    found = [tokens[mask].tolist() for tokens, mask in zip(answers.tokens_BxT, answers.mask_BxT, strict=True)]
    words = [tokenizer.encode(answer.text) if answer else [] for answer in ANSWERS.values()]
    assert found == [[*words[0], tokenizer.end_token], words[1][:T], [], words[3]]
    assert metrics["teacher/requested"] == 4
    assert metrics["teacher/received"] == 3
    assert metrics["teacher/completion_tokens"] == sum(len(a.text.split()) for a in ANSWERS.values() if a)
    again = list(seen)
    seen.clear()
    some, _ = ask(tokenizer, ScriptedTeacher(script), rows=[1, 3])
    assert seen == [again[1], again[3]], "a share of the rows asks what it asks among all"
    np.testing.assert_array_equal(some.mask_BxT, answers.mask_BxT & np.array([[False], [True], [False], [True]]))


def test_silence_stops_the_run(tokenizer):
    silent = ScriptedTeacher(lambda request: [])
    with pytest.raises(TeacherStopped, match="4 of 4 samples of scripted are missing in step 1"):
        ask(tokenizer, silent)
    with pytest.raises(TeacherStopped, match="this run has no teacher"):
        ask(tokenizer, AbsentTeacher())
