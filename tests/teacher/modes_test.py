"""How prefixes are put to chat models, and how white space and echoes are put right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniopd_jax.teacher.modes import align, as_chat
from omniopd_jax.teacher.protocol import ContinuationRequest
from omniopd_jax.types import Message

LONG = "We add the ones first: 7 + 8 = 15, write 5 and carry 1."


TASK = (Message("system", "Be brief."), Message("user", "What is 17 + 28?"))


def request(prefix, *, is_raw=False, messages=TASK):
    return ContinuationRequest(messages, prefix, 1, 8, 1.0, 1.0, 0, is_raw)


@given(body=st.text(min_size=1), white=st.sampled_from(["", " ", "\n", "\n\n", " \n\t"]))
def test_prefill_never_ends_in_white_space_and_what_was_taken_off_is_put_right(body, white):
    chat = as_chat(request(body + white), "prefill")
    assert chat.prefill == body.rstrip()
    # A model that goes on from the stripped prefix writes the white space itself; after alignment the texts agree.
    begun = body + white
    missing = begun[len(begun.rstrip()) :]
    assert align(begun, missing + "next", "prefill") == "next"


@pytest.mark.parametrize(
    ("begun", "text", "aligned"),
    [
        ("the sum is ", " 45", "45"),
        ("the sum is ", "45", "45"),
        ("the sum is\n\n", "\nSo", "So"),
        ("the sum is\n", " So", "So"),
        ("the sum is", " 45", " 45"),
        ("the sum is", "45", "45"),  # prefill: the model saw the end of the prefix and chose to write no space
        ("", " 45", " 45"),
    ],
)
def test_prefill_alignment(begun, text, aligned):
    assert align(begun, text, "prefill") == aligned


@pytest.mark.parametrize("prefix", ["", " ", "\n\n"])
@pytest.mark.parametrize("mode", ["prefill", "instruct"])
def test_white_space_alone_is_no_prefix(prefix, mode):
    chat = as_chat(request(prefix), mode)
    assert chat.prefill == ""
    assert chat.turns == (("user", "What is 17 + 28?"),)


def test_instruct_shows_prompt_and_prefix_exactly():
    chat = as_chat(request(LONG + " "), "instruct")
    assert chat.system == "Be brief."
    ((role, content),) = chat.turns
    assert role == "user"
    assert content.startswith("What is 17 + 28?")
    assert content.endswith(f"<begun>\n{LONG} </begun>")


def test_raw_text_is_continued_whole():
    raw = request(" is 45", is_raw=True, messages=(Message("user", "17 + 28"),))
    assert as_chat(raw, "prefill").prefill == "17 + 28 is 45"
    assert "<begun>\n17 + 28 is 45</begun>" in as_chat(raw, "instruct").turns[-1][1]


@pytest.mark.parametrize(
    ("text", "aligned"),
    [
        (LONG + " Then the tens.", " Then the tens."),
        ("\n" + LONG + " Then the tens.", " Then the tens."),
        ("write 5 and carry 1. Then the tens.", " Then the tens."),
        ("Then the tens.", " Then the tens."),
        (" Then the tens.", " Then the tens."),
        ("\n\nThen the tens.", "\n\nThen the tens."),
        ("carry 1. again", " carry 1. again"),  # too short an overlap to be called an echo
    ],
)
def test_instruct_echoes_are_cut_and_spaces_put_back(text, aligned):
    assert align(LONG, text, "instruct") == aligned


@pytest.mark.parametrize(
    ("begun", "text", "aligned"),
    [
        ("the sum is 4", "5", "5"),  # digits may belong together
        ("pi is 3.", "14", "14"),
        ("the sum", ", then", ", then"),
        ("答案是", "四十五", "四十五"),  # no spaces in this script
        ("the sum is:", "45", " 45"),
    ],
)
def test_spaces_are_not_put_where_none_belongs(begun, text, aligned):
    assert align(begun, text, "instruct") == aligned


@given(st.text(), st.text())
def test_completions_are_taken_as_they_are(begun, text):
    assert align(begun, text, "completions") == text
