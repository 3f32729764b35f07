"""How a prefix is put to a chat model, and how what comes back is aligned with it. Pure text functions."""

from __future__ import annotations

import dataclasses
import re

from omniopd_jax.teacher.dialect import Mode
from omniopd_jax.teacher.protocol import ContinuationRequest

_MIN_ECHO = 12  # characters; a shorter overlap may be the teacher's own words
_RAW = "Continue the text, from exactly where it breaks off. Write the continuation alone."
_INSTRUCTION = (
    "An answer to this has been begun; it stands between the tags below. Go on with it from exactly where it breaks "
    "off, in its own style and in the same language. If it breaks off inside a word, begin with the rest of that word; "
    "otherwise begin with the space or line break that comes next. Write the continuation alone: repeat nothing of "
    "what is there, add no remark, no tag and no quotation mark."
)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A request as chat turns."""

    system: str  # "" for none
    turns: tuple[tuple[str, str], ...]  # (role, content), role user or assistant
    prefill: str  # the unfinished assistant turn, no white space at its end; "" for none


def begun_text(request: ContinuationRequest) -> str:
    """What the teacher must go on from: the prefix, with the raw text before it where there is no chat."""
    return request.messages[-1].content + request.prefix if request.is_raw else request.prefix


def as_chat(request: ContinuationRequest, mode: Mode) -> Chat:
    """The turns that ask for a continuation in a chat mode ("prefill" or "instruct")."""
    begun = begun_text(request)
    if request.is_raw:
        system, turns = "", [("user", _RAW)]
    else:
        system = "\n\n".join(message.content for message in request.messages if message.role == "system")
        turns = [(message.role, message.content) for message in request.messages if message.role != "system"]
    if mode == "prefill":
        return Chat(system, tuple(turns), begun.rstrip())
    if begun.strip():
        role, content = turns.pop() if turns and turns[-1][0] == "user" else ("user", "")
        content = f"{content}\n\n{_INSTRUCTION}" if not request.is_raw else content
        turns.append((role, f"{content.lstrip()}\n\n<begun>\n{begun}</begun>"))
    return Chat(system, tuple(turns), "")


def align(begun: str, text: str, mode: Mode) -> str:
    """The part of `text` that follows `begun`, white space included.

    `completions` returns what follows already. The chat modes lose the white space at the end of the prefix (it is
    taken off before a prefill, models drop it, templates strip it) and may repeat the prefix; both are put right.
    """
    if mode == "completions" or not begun:
        return text
    text = _without_echo(begun, text, whole_only=mode == "prefill")
    white = begun[len(begun.rstrip()) :]
    if white:
        return text[len(white) :] if text.startswith(white) else text.lstrip()
    if mode == "instruct" and _needs_space(begun, text):
        return " " + text
    return text


def _without_echo(begun: str, text: str, *, whole_only: bool) -> str:
    """Cuts a repeated prefix, or (in instruct mode) the repeated end of it, from the head of the text."""
    core, body = begun.strip(), text.lstrip()
    if len(core) >= _MIN_ECHO and body.startswith(core):
        return body[len(core) :]
    if whole_only:
        return text
    for length in range(min(len(core), len(body)), _MIN_ECHO - 1, -1):
        if core.endswith(body[:length]) and _is_boundary(core, len(core) - length):
            return body[length:]
    return text


def _is_boundary(text: str, index: int) -> bool:
    return index == 0 or not (text[index - 1].isalnum() and text[index].isalnum())


def _needs_space(begun: str, text: str) -> bool:
    """Whether the model has dropped the space between two words. Never between digits or inside a number."""
    if not text or re.match(r"[\s.,;:!?)\]}%'\"’]", text):
        return False
    last, first = begun[-1], text[0]
    if not (last.isascii() and first.isascii()):
        return False  # many scripts write no spaces
    if first.isdigit() and (last.isdigit() or (last in ".," and begun[-2:-1].isdigit())):
        return False
    return last.isalnum() or last in ".,;:!?)]"
