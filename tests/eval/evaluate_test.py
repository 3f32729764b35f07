"""Evaluation counts what it says, whatever the batches."""

import jax
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.data import load_tokenizer
from omniopd_jax.eval.evaluate import Judge, evaluate, get_judge
from omniopd_jax.eval.verdict import NO_ANSWER, Verdict
from omniopd_jax.train.small_world import model_config
from omniopd_jax.types import InputError, Message, Prompt
from omniopd_jax.worlds import arithmetic


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    arithmetic.save_tokenizer(str(folder))
    problems = arithmetic.problems(np.random.default_rng(0), 10, 1)
    prompts = [problem.prompt(str(i)) for i, problem in enumerate(problems)]
    tokenizer = load_tokenizer(folder)
    config = model_config(32, 1, vocab_size=tokenizer.vocab_size)
    return models.init_model(config, jax.random.key(0)), tokenizer, prompts


def measure(setting, judge, **options):
    model, tokenizer, prompts = setting
    options = dict(temperature=1.0, max_new_tokens=8, batch_size=4, seed=3) | options
    return evaluate(model, tokenizer, prompts, judge, **options)


def test_an_answer_does_not_depend_on_the_batches(setting):
    by_four = measure(setting, lambda *_: True)
    assert by_four.responses == measure(setting, lambda *_: True, batch_size=10).responses
    assert by_four.responses != measure(setting, lambda *_: True, seed=4).responses
    assert len(by_four.responses) == 10


def test_accuracy_and_its_error_are_those_of_the_verdicts(setting):
    verdicts = iter([True, False] * 10)
    result = measure(setting, lambda *_: next(verdicts), samples=2)
    # one right of two samples for every problem: no spread between problems
    assert (result.accuracy, result.standard_error, result.problems, result.samples) == (0.5, 0.0, 10, 2)
    verdicts = iter([True] * 3 + [False] * 7)
    result = measure(setting, lambda *_: next(verdicts))
    shares = np.array([1.0] * 3 + [0.0] * 7)
    assert result.accuracy == pytest.approx(shares.mean())
    assert result.standard_error == pytest.approx(shares.std(ddof=1) / np.sqrt(10))
    assert result.is_correct == (True,) * 3 + (False,) * 7


def test_the_judge_sees_each_response_with_its_own_reference(setting):
    seen = []
    result = measure(setting, lambda response, answer: bool(seen.append((response, answer))), samples=2)
    assert [response for response, _ in seen] == list(result.responses)
    assert [answer for _, answer in seen] == [prompt.answer for prompt in setting[2] for _ in range(2)]


def test_truncation_counts_responses_without_a_stop(setting):
    result = measure(setting, lambda *_: False, max_new_tokens=2)
    assert result.truncated == pytest.approx(1 - sum(len(text.split()) < 2 for text in result.responses) / 10)
    assert 0 < result.mean_tokens <= 2


def test_items_say_what_became_of_each_response(setting):
    seen = []
    judge = Judge(lambda response, answer: Verdict(False, NO_ANSWER if response < "m" else "wrong"))
    result = measure(setting, judge, samples=2, on_item=seen.append)
    assert tuple(seen) == result.items
    assert [(item.id, item.sample) for item in seen] == [(prompt.id, n) for prompt in setting[2] for n in range(2)]
    assert result.no_answer == pytest.approx(np.mean([item.response < "m" for item in seen]))
    assert result.mean_tokens == pytest.approx(np.mean([item.tokens for item in seen]))
    assert {item.tokens for item in seen if not item.is_finished} <= {8}
    table = result.table(k=2)
    assert "accuracy   0.0 ± 0.0 %   (10 problems, 2 samples each)" in table
    assert "pass@2" in table
    assert f"no answer {100 * result.no_answer:.1f} %" in table


def test_pass_at_k_comes_with_its_interval(setting):
    verdicts = iter([True, False] + [False] * 18)
    result = measure(setting, lambda *_: next(verdicts), samples=2)
    value, low, high = result.pass_at(2)
    assert value == pytest.approx(0.1)
    assert 0 <= low <= value <= high <= 0.4
    assert result.pass_at(1)[0] == pytest.approx(result.accuracy) == pytest.approx(0.05)
    with pytest.raises(InputError, match="pass@3 needs at least 3 samples"):
        result.pass_at(3)


def test_bad_input(setting):
    with pytest.raises(InputError, match="empty"):
        evaluate(*setting[:2], [], lambda *_: True, temperature=0.0, max_new_tokens=2, batch_size=2)
    unanswered = [Prompt("x7", (Message("user", "1 + 1"),))]
    with pytest.raises(InputError, match="'x7' has no reference answer"):
        evaluate(*setting[:2], unanswered, lambda *_: True, temperature=0.0, max_new_tokens=2, batch_size=2)
    with pytest.raises(InputError, match="'chess' is not known"):
        get_judge("chess")
