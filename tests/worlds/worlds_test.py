"""What every world promises: wording, splits, answers and tokenizers."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from omniopd_jax.data import load_tokenizer
from omniopd_jax.types import InputError
from omniopd_jax.worlds import WORLDS, answers, get_world, tokenizers, wording

SIZE = 4


@pytest.fixture(scope="module", params=sorted(WORLDS))
def world(request):
    return get_world(request.param)


@pytest.fixture(scope="module")
def problems(world):
    return world.problems(np.random.default_rng(1), 600, SIZE)


@pytest.fixture(scope="module")
def texts(world, problems):
    rng = np.random.default_rng(0)
    return [world.solution(problem, rng, phrasings=3) for problem in problems]


def test_problems_are_distinct_and_avoid_the_excluded(world, problems):
    others = world.problems(np.random.default_rng(1), 600, SIZE, exclude=problems)
    assert len(set(problems)) == 600
    assert not set(problems) & set(others)
    with pytest.raises(ValueError, match="are not to be had"):
        world.problems(np.random.default_rng(1), world.num_problems(1) + 1, 1)


def test_faultless_solutions_are_right_and_spoilt_ones_often_wrong(world, problems, texts):
    assert all(answers.is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True))
    rng = np.random.default_rng(0)
    for spoilt in (dict(misconception=0.9), dict(slip=0.9)):
        right = [answers.is_correct(world.solution(p, rng, phrasings=3, **spoilt), p.answer) for p in problems]
        assert np.mean(right) < 0.4, spoilt


def test_the_same_seed_gives_the_same_text(world, problems):
    first, second = (
        [world.solution(p, np.random.default_rng(3), phrasings=3, misconception=0.5, slip=0.1) for p in problems[:20]]
        for _ in range(2)
    )
    assert first == second


def test_the_dial_of_wording(world, problems, texts):
    """Each step holds exactly one mark, and the number in use is what was asked for."""
    steps = [step for text in texts for step in text.split(" ; ")[:-1]]
    assert all(sum(word in world.MARKS for word in step.split()) == 1 for step in steps)
    assert wording.phrasing_counts(texts, world.MARKS).sum() == len(steps)
    assert wording.phrasing_variety(texts, world.MARKS) == pytest.approx(3, abs=0.01)
    rng = np.random.default_rng(0)
    for count in (1, 2):
        fewer = [world.solution(problem, rng, phrasings=count) for problem in problems]
        assert wording.phrasing_variety(fewer, world.MARKS) == pytest.approx(count, abs=0.01)
    assert wording.phrasing_variety([], world.MARKS) == 0


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_tokenizers_give_the_text_back_and_know_every_word(world, kind, texts, tmp_path):
    world.save_tokenizer(str(tmp_path), kind)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert len(hf) == len(tokenizers.tokens(world.vocabulary(), kind))
    ours = load_tokenizer(tmp_path)
    for text in texts[:50]:
        ids = hf(text, add_special_tokens=False)["input_ids"]
        assert hf.unk_token_id not in ids
        assert hf.decode(ids) == text
        assert len(ids) == len(text.split() if kind == "words" else text)
        cut = len(ids) // 2
        assert ours.decode(ids[:cut]) + ours.decode_after(ids[:cut], ids[cut:]) == text
    chat = [{"role": "user", "content": "1 + 2"}]
    assert hf.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == "1 + 2 = "


def test_an_unknown_world_is_named():
    with pytest.raises(InputError, match="no world 'chess'; there are 'arithmetic', 'rewriting'"):
        get_world("chess")
