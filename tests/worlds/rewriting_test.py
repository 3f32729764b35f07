"""Rewriting: every step follows the table, and mistakes come as described and as often as asked for."""

import itertools

import numpy as np
import pytest

from omniopd_jax.worlds import answers, rewriting


@pytest.fixture(scope="module")
def problems():
    return rewriting.problems(np.random.default_rng(1), 2000, 5)


def _steps(text):
    """(pair, result, what is left) of each step, letters alone, read off the text."""
    for step in text.split(" ; ")[:-1]:
        letters = [word for word in step.split() if word in rewriting.LETTERS]
        yield letters[:2], letters[2], letters[3:]


def test_each_step_rewrites_the_first_pair(problems):
    rng = np.random.default_rng(0)
    for problem in problems[:300]:
        word = problem.question.split()
        for pair, result, rest in _steps(rewriting.solution(problem, rng)):
            assert pair == word[:2]
            x, y = (rewriting.LETTERS.index(letter) for letter in pair)
            assert rewriting.LETTERS.index(result) == (2 * x + 3 * y + 1) % 7
            word = [result, *word[2:]]
            assert rest == word
        assert word == [problem.answer]


def test_a_wrong_letter_never_gives_the_right_result():
    for x, y, z in itertools.product(range(7), repeat=3):
        assert (rewriting.rule(x, y) == rewriting.rule(z, y)) == (x == z)
        assert (rewriting.rule(x, y) == rewriting.rule(x, z)) == (y == z)
        assert (rewriting.rule(x, y) == rewriting.rule(y, x)) == (x == y)


def test_the_misconception_sorts_falling_pairs_and_nothing_else(problems):
    rng = np.random.default_rng(0)
    falling = 0
    for problem in problems[:300]:
        for pair, result, _ in _steps(rewriting.solution(problem, rng, misconception=1.0)):
            x, y = sorted(rewriting.LETTERS.index(letter) for letter in pair)
            assert rewriting.LETTERS.index(result) == rewriting.rule(x, y)
            falling += pair != sorted(pair)
    assert 0.38 < falling / (4 * 300) < 0.48  # 3 of 7 pairs


def test_mistakes_come_at_the_rate_asked_for(problems):
    rng = np.random.default_rng(0)
    sound = 0
    for problem in problems:
        text = rewriting.solution(problem, rng, misconception=0.6, slip=0.05)
        sound += all(
            rewriting.LETTERS.index(result) == rewriting.rule(*map(rewriting.LETTERS.index, pair))
            for pair, result, _ in _steps(text)
        )
    # a pair is falling with probability 3/7 whatever came before: the rule is a Latin square
    expected = ((1 - 0.6 * 3 / 7) * 0.95) ** 4
    share = sound / len(problems)
    # a slip may undo a misconception or not: it moves a sound result, and a mistaken one to the sound one at times
    assert share == pytest.approx(expected, abs=0.04)
    assert np.mean([answers.is_correct(rewriting.solution(p, rng), p.answer) for p in problems]) == 1
