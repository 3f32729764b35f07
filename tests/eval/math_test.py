"""Extraction and equality of final answers."""

import subprocess
import sys
import threading

import pytest

from omniopd_jax.eval import math
from omniopd_jax.eval.evaluate import get_judge
from omniopd_jax.eval.verdict import NO_ANSWER, Verdict
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
        (r"\boxed 5", "5", True),
        (r"\boxed{4} or \boxed 5.", "5", True),
        ("#### 18 dollars", "18", True),
        ("**Answer:** 42", "42", True),
        ("The answer is: $42$.", "42", True),
        ("Answer: 42 kilometers per hour", "42", True),
        ("Answer: 3 million", "3", False),
        ("Answer: 3 or 4", "3", False),
        ("Answer: 3 pi", "3", False),
        (r"\boxed{073}", "73", True),
        (r"\boxed{50\%}", "50", True),
        ("Answer: 1 1/2", "11/2", False),  # a mixed number is a sum
        ("Answer: 1 1/2", "3/2", True),
        ("Answer: -1 1/2 cups", "-1.5", True),
        ("Answer: 1 / 2", "0.5", True),
        ("Answer: 2 3", "23", False),
        ("Answer: 2 3", "2", False),
        ("Answer: 2 3", "5", False),  # nor a sum
        (r"\boxed{3, 100}", "3100", False),  # a list
        (r"\boxed{3,100}", "3100", True),
        (r"\boxed{12,34}", "1234", False),
        (r"\boxed{2 - 3}", "-1", True),  # no list
        ("The answer is **42**.", "42", True),
        ("**The answer is 42.**", "42", True),
        ("**Final answer**: *42*", "42", True),
        ("#### **18**", "18", True),
        ("Answer: `18`", "18", True),
        ("Answer: __18__ (eggs)", "18", True),
        ("The answer is 42, as 6 times 7 is 42", "42", True),
        ("The answer is 42, as 6 times 7 is 42", "6", False),
        ("The answer is $42$, since $x = 7$.", "42", True),
        ("The answer is 42. This is 6 times 7.", "42", True),
        ("The answer is 42.5 - half of 85", "42.5", False),  # may be a difference
        ("The answer is 42.5 – what was asked", "42.5", True),
        ("#### 18 (eggs)", "18", True),
        ("#### 1,800 eggs (in all)", "1800", True),
        ("#### 18 (or 19)", "18", False),
        ("Answer: 3 (x + 1)", "3", False),
        ("Answer: 3, and 4", "3", False),
        ("Answer: 3 million, as he said", "3", False),
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
        (r"\boxed{18\text{ cm}}", "18", True),
        (r"\boxed{18 \text{cm}^2}", r"18\text{ cm}^2", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty,2)\cup(3,\infty)", True),
        (r"\boxed{x \in (1,2]}", "(1,2]", True),
        (r"\boxed{(1,2)}", "(2,1)", False),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{-2, 2}", r"\pm 2", True),
        (r"\boxed{C}", r"\text{(C)}", True),
        (r"\boxed{10{,}000}", "10,000", True),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
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
    assert first.poll() is not None
    monkeypatch.undo()
    assert math.is_correct(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")


def test_without_math_verify_plain_references_are_judged_and_others_refused_beforehand(monkeypatch, caplog):
    monkeypatch.setattr(math, "has_math_verify", lambda: False)
    plain = [Prompt("a", (Message("user", "?"),), answer="6 + 12 = 18\n#### 18"), Prompt("b", (), answer="1/2")]
    judge = get_judge("math", plain)
    assert "counts as wrong" in caplog.text
    assert judge("#### 18", plain[0].answer)
    assert judge("#### 18 dollars", plain[0].answer)
    assert not judge("#### 18 x", plain[0].answer)
    assert not judge(r"\boxed{\sqrt{324}}", plain[0].answer)
    with pytest.raises(InputError, match=r"'c' has the reference answer 'x\^2'.*pip install 'omniopd_jax\[eval\]'"):
        get_judge("math", [*plain, Prompt("c", (), answer=r"so \boxed{x^2}")])
    with pytest.raises(InputError, match="no plain number"):
        math.is_correct(r"\boxed{x}", r"\boxed{x^2}")


def test_with_math_verify_any_reference_is_judged():
    pytest.importorskip("math_verify")
    assert math.has_math_verify()
    assert get_judge("math", [Prompt("c", (), answer="x^2")])(r"\boxed{x^2}", "x^2")


def test_a_script_without_a_main_guard_may_ask():
    """The worker is no copy of the caller: a grader's script is not run once more in it."""
    pytest.importorskip("math_verify")
    script = "from omniopd_jax.eval.math import is_correct\nprint(is_correct('Answer: 2x + x', '3x'))"
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_reasons():
    assert math.judge("no idea", "18") == Verdict(False, NO_ANSWER)
    assert math.judge(r"\boxed{17}", "18") == Verdict(False, "answered '17'")
    assert math.judge("#### 18", "18") == Verdict(True, "passed")
