"""Strings and numbers on their way into a page."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd_jax.report import text
from tests.report.synthetic import HOSTILE

ANY_TEXT = st.text(st.characters(codec=None), max_size=200)


@given(ANY_TEXT)
def test_clean_text_can_be_stored_and_keeps_everything_but_lone_surrogates(value):
    cleaned = text.clean(value)
    cleaned.encode("utf-8")
    assert len(cleaned) == len(value)
    assert all(a == b for a, b in zip(value, cleaned, strict=True) if not "\ud800" <= a <= "\udfff")


@given(st.recursive(ANY_TEXT | st.integers() | st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=4)))
def test_embedded_data_cannot_end_its_script_element_and_reads_back(value):
    embedded = text.embed(value)
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == value


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_texts_are_embedded_without_markup(value):
    assert "<" not in text.embed({"text": text.clean(value)})


def test_long_texts_are_clipped_with_their_remainder_counted():
    assert text.clipped("abc", 3) == "abc"
    assert text.clipped("abcde", 3) == {"text": "abc", "more": 2}
    assert text.clipped(None, 3) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (0.123456789, 0.123457),
        (True, 1),
        (math.nan, None),
        (math.inf, None),
        ("3", None),
        (None, None),
        ([1], None),
        (10**400, None),
        (2**60, 1.15292e18),
    ],
)
def test_numbers_are_finite_or_nothing(value, expected):
    assert text.number(value) == expected


def test_embedding_refuses_what_json_does_not_know():
    with pytest.raises(ValueError, match="JSON"):
        text.embed(math.nan)
