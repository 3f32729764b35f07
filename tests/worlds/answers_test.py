"""One rule of right and wrong for every world."""

import pytest

from omniopd_jax.worlds import answers


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("answer 0 7 3", "73", True),
        ("answer 1 2 ; answer 7 3", "73", True),
        ("7 3", "73", False),
        ("answer", "0", False),
        ("answer 7 3 ;", "73", False),
        ("answer 7 makes 3", "73", False),
        ("answer 73", "73", False),  # a word of two digits is no word of the worlds
        ("answer a", "a", True),
        ("answer b", "a", False),
        ("answer a b", "a", False),
        ("answer a ;", "a", False),
        ("answer a", "73", False),
        ("answer ² 3", "23", False),
    ],
)
def test_answers(response, answer, expected):
    assert answers.is_correct(response, answer) is expected
