"""A teacher that answers by a rule: for tests, rehearsals and examples without a model.

The protocol gives a teacher no way to know what the student wrote after the prefix, and this one knows no more than
any other. A test that wants a teacher who always agrees builds its rule from the student's text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from omniopd_jax.teacher.protocol import Continuation, ContinuationRequest, ContinuationResult, Usage
from omniopd_jax.types import InputError

Script = Callable[[ContinuationRequest], Sequence[Continuation | None]]

NOISE = "Rain fell on the harbour all night, and nobody came to collect the boats."


class ScriptedTeacher:
    """Answers each request by `script`: at most n continuations, None for a sample that is lost."""

    def __init__(self, script: Script, name: str = "scripted"):
        self.name = name
        self._script = script

    def probe(self) -> str:
        return f"{self.name}: answers by a rule; nothing is sent."

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        """Nothing to free."""

    def _answer(self, request: ContinuationRequest) -> ContinuationResult:
        answers = list(self._script(request))[: request.n]
        found = tuple(answer for answer in answers if answer is not None)
        return ContinuationResult(
            continuations=found,
            num_missing=request.n - len(found),
            model=self.name,
            # A rule has no tokenizer; words stand in for tokens.
            usage=Usage(
                prompt_tokens=sum(len(message.content.split()) for message in request.messages)
                + len(request.prefix.split()),
                completion_tokens=sum(len(answer.text.split()) for answer in found),
                calls=1,
            ),
        )


def scripted_teacher(script: str) -> ScriptedTeacher:
    """The teacher of `teacher.script`.

    Args:
      script: "noise": the same unrelated sentence always; "missing": never an answer; else a jsonl file of answers, a
        row {"prompt": last user message, "prefix": beginning of the answer, "texts": [continuation, …]}. A text that
        ends the answer is written {"text": …, "finish_reason": "stop"}. What the file does not hold is missing.

    Raises:
      InputError: no such rule or file, or a row of another form.
    """
    if script == "noise":
        return ScriptedTeacher(lambda request: [Continuation(NOISE, "length")] * request.n, "scripted:noise")
    if script == "missing":
        return ScriptedTeacher(lambda request: [], "scripted:missing")
    path = Path(script)
    if not path.is_file():
        raise InputError(f"teacher.script={script!r} is neither 'noise', 'missing' nor a jsonl file of answers.")
    answers: dict[tuple[str, str], list[Continuation]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers[row["prompt"], row["prefix"]] = [_continuation(text) for text in row["texts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path} line {number} is not a row {{"prompt": …, "prefix": …, "texts": […]}}: {error!r}.'
            ) from error

    def look_up(request: ContinuationRequest) -> Sequence[Continuation | None]:
        return answers.get((request.messages[-1].content, request.prefix), [])

    return ScriptedTeacher(look_up, f"scripted:{path.name}")


def _continuation(value: str | dict[str, str]) -> Continuation:
    if isinstance(value, str):
        return Continuation(value, "length")
    if value["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"finish_reason {value['finish_reason']!r} is neither 'stop' nor 'length'")
    return Continuation(value["text"], "stop" if value["finish_reason"] == "stop" else "length")
