"""The benchmarks: where a row of their published files holds what, how it is asked, how it is judged. One table.

A new task is one entry of TASKS.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from omniopd_jax.data.prompts import read_prompts
from omniopd_jax.eval.code import CodeReference
from omniopd_jax.types import InputError, Prompt

Row = Mapping[str, Any]

_BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_FENCED = "Answer with the whole program in one ```python block."
_LONGEST_TESTS = 512 << 20  # bytes of one problem's tests, unpacked

# What solutions take for granted on LiveCodeBench, whose own runner gives it to them (lcb_runner/evaluation/
# testing_util.py), in its order: modules come last, so that `datetime`, `copy` and `bisect` are modules, and the
# recursion is as deep as there.
_PRELUDE = """\
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random, re
import statistics, string, sys
sys.setrecursionlimit(50000)
"""


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
      judge: "math", "code", or "world" (the small worlds' own form).
      problem, answer: columns, the first that a row has counts.
      instruction: what is asked; {problem} stands for the problem.
      convert: (row, where) → (problem, reference), for what is more than two columns.
      published: the layout, in words.
    """

    judge: Literal["math", "code", "world"]
    problem: tuple[str, ...]
    answer: tuple[str, ...]
    published: str
    instruction: str = "{problem}"
    convert: Callable[[Row, str], tuple[str, str]] | None = None


def _humaneval(row: Row, where: str) -> tuple[str, str]:
    stub, test, name = (_text(row, column, where) for column in ("prompt", "test", "entry_point"))
    # The tests call helpers of the stub: those are its own, and only the function that was asked for is the program's.
    tests = f"{stub}\n\nfrom program import {name}\n{test}\n\ncheck({name})\n"
    return stub, CodeReference(tests=tests, stub=stub, entry_point=name).dumps()


def _mbpp(row: Row, where: str) -> tuple[str, str]:
    asserts = row.get("test_list")
    if not isinstance(asserts, list) or not asserts:
        raise InputError(f"{where} has no list test_list.")
    problem = row.get("text") or _text(row, "prompt", where)
    imports = row.get("test_imports") or []
    tests = "\n".join([*imports, row.get("test_setup_code") or "", *asserts])
    shown = "\n".join(map(str, asserts))
    return f"{problem}\nYour code should pass these tests:\n\n{shown}", CodeReference(tests=tests).dumps()


def _livecodebench(row: Row, where: str) -> tuple[str, str]:
    problem = _text(row, "question_content", where)
    cases = _cases(row.get("public_test_cases"), where) + _cases(row.get("private_test_cases"), where)
    starter = row.get("starter_code") or ""
    if starter:
        problem += f"\n\nYour program starts like this:\n\n```python\n{starter}\n```"
        try:
            name = json.loads(row.get("metadata") or "{}")["func_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} has a starter_code but no func_name in its metadata.") from error
        return problem, CodeReference(
            tests=_call_tests(name, cases), stub=_PRELUDE, entry_point="Solution", calls=len(cases)
        ).dumps()
    problem += "\n\nYour program reads the input from stdin and writes the output to stdout."
    given = tuple((case["input"], case["output"]) for case in cases)
    return problem, CodeReference(cases=given, stub=_PRELUDE).dumps()


def _call_tests(name: str, cases: list[dict[str, str]]) -> str:
    """Calls of a method: arguments a line, JSON, and the result as JSON."""
    pairs = [(case["input"], case["output"]) for case in cases]
    return (
        "import json, program\n"
        "def plain(value):\n"
        "    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value\n"
        f"for given, expected in json.loads({json.dumps(pairs)!r}):\n"
        f"    function = getattr(program.Solution() if hasattr(program, 'Solution') else program, {name!r})\n"
        "    result = function(*[json.loads(line) for line in given.split('\\n') if line.strip()])\n"
        "    assert plain(result) == json.loads(expected), given[:200]\n"
    )


def _cases(value: Any, where: str) -> list[dict[str, str]]:
    """LiveCodeBench's tests: a list, JSON, or JSON that was pickled, compressed and written in base64.

    The pickle is read without anything that a pickle could call: it may hold plain data and nothing else.
    """
    if not value:
        return []
    try:
        if isinstance(value, str):
            value = _unpacked(value) if not value.lstrip().startswith(("[", "{")) else value
            value = json.loads(value) if isinstance(value, str | bytes) else value
        return [{"input": str(case["input"]), "output": str(case["output"])} for case in value]
    except (ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError, binascii.Error, zlib.error) as error:
        raise InputError(f"{where} has tests that cannot be read as LiveCodeBench's: {error}.") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle wants to call {module}.{name}, and nothing in tests needs that")


def _unpacked(text: str) -> Any:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), _LONGEST_TESTS)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {_LONGEST_TESTS >> 20} MiB")
    return _PlainUnpickler(io.BytesIO(data)).load()


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} has no text in the column {column!r}; it has {', '.join(map(str, row)) or 'none'}.")
    return value


_PROBLEM = ("problem", "question", "Problem", "prompt", "messages")
_ANSWER = ("answer", "Answer", "final_answer", "solution", "ground_truth", "reward_model.ground_truth")

TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "math", ("question",), ("answer",), "openai/gsm8k: question, answer (its last line `#### number`)", _BOXED
    ),
    "math": Task("math", _PROBLEM, _ANSWER, "HuggingFaceH4/MATH-500: problem, solution, answer, unique_id", _BOXED),
    "aime": Task("math", _PROBLEM, _ANSWER, "HuggingFaceH4/aime_2024, opencompass/AIME2025: problem, answer", _BOXED),
    "amc": Task("math", _PROBLEM, _ANSWER, "math-ai/amc23, AI-MO/aimo-validation-amc: question, answer", _BOXED),
    "olympiad": Task(
        "math", ("question", "problem"), ("final_answer", "answer"),
        "Hothan/OlympiadBench, maths in English without pictures: question, final_answer (a list)", _BOXED,
    ),
    "humaneval": Task(
        "code", (), (), "openai/openai_humaneval: prompt, test, entry_point",
        "Complete this Python function. " + _FENCED + "\n\n```python\n{problem}```", _humaneval,
    ),
    "mbpp": Task(
        "code", (), (), "google-research-datasets/mbpp, full or sanitized: text or prompt, test_list",
        "{problem}\n\n" + _FENCED, _mbpp,
    ),
    "livecodebench": Task(
        "code", (), (), "livecodebench/code_generation_lite: question_content, public_ and private_test_cases, "
        "starter_code, metadata", "{problem}\n\n" + _FENCED, _livecodebench,
    ),
    "world": Task("world", _PROBLEM, _ANSWER, "the small worlds' rows: prompt, answer"),
}  # fmt: skip


def get_task(name: str) -> Task:
    """Raises InputError for a name that is not in the table."""
    if name not in TASKS:
        raise InputError(f"Task {name!r} is not known; there are {', '.join(map(repr, TASKS))}.")
    return TASKS[name]


def read_task(
    name: str,
    path: str | Path,
    *,
    prompt_field: str = "auto",
    answer_field: str = "auto",
    instruction: str = "auto",
    system_prompt: str = "",
    is_raw: bool = False,
) -> list[Prompt]:
    """Reads a benchmark's file (jsonl, jsonl.gz or parquet) in its published layout; equal rows are one problem, for
    answers to one problem are no independent evidence (verl's AIME files hold each 32 times).

    Args:
      name: of the task.
      path: the file.
      prompt_field, answer_field: columns that go before the task's own in rows that have them, for math and worlds; a
        run's columns say nothing of a benchmark in another layout.
      instruction: text with {problem} in it; "auto": the task's own, unless a system prompt says how to answer, the
        prompt is raw, or the row holds a whole conversation.
      system_prompt, is_raw: as for data.prompts.read_prompts.

    Raises:
      InputError: a file, a row or an instruction that does not fit.
    """
    task = get_task(name)
    if instruction == "auto":
        instruction = "{problem}" if is_raw or (system_prompt and task.judge != "code") else task.instruction
    if "{problem}" not in instruction:
        raise InputError(f"The instruction {instruction[:60]!r} does not say where the problem goes: {{problem}}.")

    def convert(row: Row, where: str) -> Row:
        if task.convert is not None:
            problem, answer = task.convert(row, where)
        else:
            columns = _columns(prompt_field, task.problem)
            problem = _first(row, columns)
            if problem is None:
                found = ", ".join(map(str, row)) or "no column"
                raise InputError(f"{where} has no prompt: expected {' or '.join(columns)}, found {found}.")
            answer = _first(row, _columns(answer_field, task.answer))
            answer = ", ".join(map(str, answer)) if isinstance(answer, list) else answer
        if isinstance(problem, str) and problem:
            problem = instruction.replace("{problem}", problem)
        own_id = next((row[name] for name in _IDS if row.get(name) not in (None, "")), "")
        return {"id": own_id, "prompt": problem, "answer": "" if answer is None else answer}

    return read_prompts(path, "prompt", "answer", system_prompt=system_prompt, is_raw=is_raw, convert=convert)


_IDS = ("id", "task_id", "unique_id", "question_id", "ID")


def _columns(asked: str, own: tuple[str, ...]) -> tuple[str, ...]:
    return own if asked in ("auto", "") else (asked, *(name for name in own if name != asked))


def _first(row: Row, columns: tuple[str, ...]) -> Any:
    for column in columns:
        value: Any = row
        for part in [column] if column in row else column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, "", []):
            return value
    return None
