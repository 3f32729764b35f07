"""The world's texts are what they claim to be."""

import numpy as np
import pytest

from omniopd_jax.worlds import answers, arithmetic


@pytest.fixture(scope="module")
def problems():
    return arithmetic.problems(np.random.default_rng(1), 2000, 3)


def test_problems_are_distinct_and_avoid_the_excluded(problems):
    others = arithmetic.problems(np.random.default_rng(1), 2000, 3, exclude=problems)
    assert len(set(problems)) == 2000
    assert not set(problems) & set(others)
    with pytest.raises(ValueError, match="101 problems of 1 digits"):
        arithmetic.problems(np.random.default_rng(1), 101, 1)


def test_faultless_solutions_are_right_and_each_step_adds_up(problems):
    rng = np.random.default_rng(0)
    for problem in problems:
        text = arithmetic.solution(problem, rng)
        assert answers.is_correct(text, problem.answer)
        for step in text.split(" ; ")[:-1]:
            a, b, c, tens, ones = (int(word) for word in step.split() if word.isdigit())
            assert a + b + c == 10 * tens + ones


def test_a_forgotten_carry_is_the_only_mistake_without_slips(problems):
    rng = np.random.default_rng(0)
    for problem in problems[:500]:
        text = arithmetic.solution(problem, rng, misconception=1.0)
        column_sums = [
            sum(int(number) // 10**i % 10 for number in (problem.left, problem.right)) for i in range(problem.digits)
        ]
        expected = "".join(str(total % 10) for total in reversed(column_sums))
        assert text.rpartition("answer ")[2].replace(" ", "") == expected


def test_mistakes_come_at_the_rate_asked_for(problems):
    rng = np.random.default_rng(0)
    right = np.mean(
        [answers.is_correct(arithmetic.solution(p, rng, misconception=0.6, slip=0.05), p.answer) for p in problems]
    )
    # by enumeration over the carry chain in float64: P(no slip)^3 · Σ P(carries) 0.4^carries
    probability = {0: 1.0}
    for _ in range(3):
        following = {0: 0.0, 1: 0.0}
        for carry, weight in probability.items():
            to_carry = (45 + 10 * carry) / 100
            following[1] += weight * to_carry * 0.4
            following[0] += weight * (1 - to_carry)
        probability = following
    expected = 0.95**3 * sum(probability.values())
    assert abs(right - expected) < 4 * np.sqrt(expected * (1 - expected) / len(problems))
