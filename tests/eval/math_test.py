"""Extraction and equality of final answers."""

import threading

import pytest

from omniopd_jax.eval import math
from omniopd_jax.eval.evaluate import get_judge
from omniopd_jax.types import InputError, Message, Prompt


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"so \boxed{18}", "18", True),
        (r"first \boxed{17}, no: \boxed{18}", "18", True),  # the last box wins
        (r"\boxed{18}, or was it \boxed{17}", "18", False),
        ("6 + 12 = 18\n#### 18", "He makes 2 * 9 = <<2*9=18>>18.\n#### 18", True),
        ("#### 1,800", "1800", True),
        ("#### $18.00", "18", True),
        ("The final answer is 0.5.", "1/2", True),
        ("Answer: -3", "3", False),
        ("Answer: 1,2", "12", False),  # a list, not a number with a thousands separator
        ("I believe it is 18", "18", False),  # no marked answer
        (r"\boxed{18", "18", False),  # cut in the middle
        ("", "18", False),
        (r"\boxed{}", "0", False),
        ("#### 1/0", "0", False),
    ],
)
def test_plain_answers(response, answer, expected):
    assert math.is_correct(response, answer) is expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"\boxed{[0, 1)}", r"[0, 1]", False),
        (r"\boxed{(x+1)^2}", r"x^2+2x+1", True),
        (r"\boxed{\text{no idea}}", r"\frac{1}{2}", False),
    ],
)
def test_expressions_go_through_math_verify(response, answer, expected):
    pytest.importorskip("math_verify")
    assert math.is_correct(response, answer) is expected


def test_a_hanging_grader_is_killed_and_replaced_off_the_main_thread(monkeypatch):
    pytest.importorskip("math_verify")
    assert math.is_correct(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")
    first = math._WORKER._process
    monkeypatch.setattr(math, "TIMEOUT_S", 0.0)
    results = []
    thread = threading.Thread(target=lambda: results.append(math.is_correct(r"\boxed{x^2}", "x")))
    thread.start()
    thread.join()
    assert results == [False]
    assert not first.is_alive()
    monkeypatch.undo()
    assert math.is_correct(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")


def test_without_math_verify_plain_references_are_judged_and_others_refused_beforehand(monkeypatch, caplog):
    monkeypatch.setattr(math, "has_math_verify", lambda: False)
    plain = [Prompt("a", (Message("user", "?"),), answer="6 + 12 = 18\n#### 18"), Prompt("b", (), answer="1/2")]
    judge = get_judge("math", plain)
    assert "counts as wrong" in caplog.text
    assert judge("#### 18", plain[0].answer)
    assert not judge("#### 18 dollars", plain[0].answer)
    assert not judge(r"\boxed{\sqrt{324}}", plain[0].answer)
    with pytest.raises(InputError, match=r"'c' has the reference answer 'x\^2'.*pip install 'omniopd_jax\[eval\]'"):
        get_judge("math", [*plain, Prompt("c", (), answer=r"so \boxed{x^2}")])
    with pytest.raises(InputError, match="no plain number"):
        math.is_correct(r"\boxed{x}", r"\boxed{x^2}")


def test_with_math_verify_any_reference_is_judged():
    pytest.importorskip("math_verify")
    assert math.has_math_verify()
    assert get_judge("math", [Prompt("c", (), answer="x^2")]) is math.is_correct
