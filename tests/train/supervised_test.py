"""A model learns the texts it is given, the same ones for the same seed."""

import numpy as np
import pytest

from omniopd_jax.train.supervised import adamw, train_on_texts
from omniopd_jax.types import InputError, Message, Prompt
from omniopd_jax.worlds import arithmetic


def test_texts_are_learned_and_the_start_is_left_as_it_is(model, tokenizer, prompts):
    answers = [arithmetic.solution(problem, np.random.default_rng(0), phrasings=1) for problem in
               arithmetic.problems(np.random.default_rng(0), len(prompts), 1)]  # fmt: skip
    seen = []
    before = np.asarray(model.params["embedding"]).copy()
    trained = train_on_texts(
        model,
        tokenizer,
        prompts,
        answers,
        steps=120,
        batch_size=10,
        optimizer=adamw(1e-2, warmup_steps=10),
        seed=0,
        progress=lambda step, loss: seen.append((step, loss)),
    )
    assert [step for step, _ in seen] == [50, 100, 120]
    assert seen[-1][1] < 0.3 < np.log(tokenizer.vocab_size)
    np.testing.assert_array_equal(model.params["embedding"], before)
    assert (np.asarray(trained.params["embedding"]) != before).any()


def test_too_few_texts(model, tokenizer):
    prompt = Prompt("a", (Message("user", "1 + 1"),))
    with pytest.raises(InputError, match=r"1 prompts and 1 answers do not fill batches of 2"):
        train_on_texts(model, tokenizer, [prompt], ["2"], steps=1, batch_size=2, optimizer=adamw(1e-3), seed=0)
