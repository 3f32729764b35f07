"""Is a worked answer right? Extraction of the final answer and mathematical equality.

The last ``\\boxed{...}`` wins; without one the last ``#### ...`` line (GSM8K), then the last ``Answer: ...``. Plain
numbers are compared here, a unit in words behind them left out ("18 dollars"); everything else (sets, intervals,
units in TeX, expressions) by the package math-verify (extra ``eval``), in a worker process of its own because it can
hang and because it works on a main thread only.

Without math-verify only sets whose reference answers are plain numbers (GSM8K) can be judged, which is checked before
anything is generated; a given answer that is no plain number (an expression) then counts as wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import re
import selectors
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any

from omniopd_jax.eval.verdict import NO_ANSWER, PASSED, Verdict
from omniopd_jax.types import InputError

TIMEOUT_S = 10.0
_LONGEST = 2000  # characters; a longer "answer" is a run-away text, and parsing it takes minutes


def has_math_verify() -> bool:
    """Whether answers that are no plain numbers can be judged here."""
    return importlib.util.find_spec("math_verify") is not None


def check_reference(answer: str, where: str) -> None:
    """Raises InputError where `answer` needs math-verify and it is not installed; `where` says whose answer it is."""
    if _number(_reference(answer)) is None and not has_math_verify():
        raise InputError(
            f"{where} has the reference answer {_reference(answer)[:80]!r}, which is no plain number: to judge it, "
            "pip install 'omniopd_jax[eval]' (math-verify)."
        )


def extract_answer(text: str) -> str | None:
    """The final answer in a worked solution, or None where no marked answer stands."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    hashes = re.findall(r"####[ \t]*([^\n]+)", text)
    if hashes:
        return hashes[-1].strip()
    marked = re.findall(r"(?:final\s+)?answer\s*(?:is\b\s*:?|:)\s*([^\n]+)", text, flags=re.IGNORECASE)
    return marked[-1].strip().rstrip(".") if marked else None


def is_correct(response: str, answer: str) -> bool:
    """Whether the final answer of `response` equals `answer`.

    Args:
      response: what a model wrote.
      answer: the reference: a bare answer, or a worked solution that marks its answer.

    Raises:
      InputError: the reference is no plain number and math-verify is not installed.
    """
    return judge(response, answer).passed


def judge(response: str, answer: str) -> Verdict:
    """`is_correct`, with the answer that was found."""
    given = extract_answer(response)
    if given is None or not given.strip():
        return Verdict(False, NO_ANSWER)
    if _is_same(given, _reference(answer)):
        return Verdict(True, PASSED)
    return Verdict(False, f"answered {given[:100]!r}")


def _is_same(given: str, wanted: str) -> bool:
    if _plain(given) == _plain(wanted):
        return True
    wanted_number = _number(wanted)
    given_number = _number(given if wanted_number is None else _without_unit(given))
    if given_number is not None and wanted_number is not None:
        return given_number == wanted_number
    if len(given) > _LONGEST:
        return False
    if not has_math_verify():
        check_reference(wanted, "A problem")
        return False
    return _WORKER.verify(given, wanted)


def _reference(answer: str) -> str:
    marked = extract_answer(answer)
    return answer if marked is None else marked


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    bare = [*re.finditer(r"\\boxed\s+([^\s{}$]+)", text)]  # \boxed 5
    if bare and bare[-1].start() > start:
        return bare[-1][1].rstrip(".")
    if start < 0:
        return None
    depth, begin = 0, text.index("{", start) + 1
    for position in range(begin - 1, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[begin:position].strip()
    return None  # never closed: the response was cut


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip("$").strip().rstrip(".")


_NO_UNITS = {"pi", "sqrt", "dozen", "hundred", "thousand", "million", "billion", "trillion", "half", "or", "and"}


def _without_unit(text: str) -> str:
    """ "18" for "18 dollars"; a text whose words may be more than a unit as it is."""
    found = re.fullmatch(r"(\S*\d\S*)((?:\s+[A-Za-z]{2,})+)", _plain(text))
    return found[1] if found and not _NO_UNITS & set(found[2].lower().split()) else text


def _number(text: str) -> Fraction | None:
    """A plain decimal number or simple fraction, thousands separators, currency and percent signs allowed."""
    bare = _plain(text).replace(r"\$", "").replace("$", "").replace(r"\%", "").replace("%", "").replace(" ", "")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", bare):
        bare = bare.replace(",", "")
    if not re.fullmatch(r"[+-]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100}|\d{1,100}/\d{1,100})", bare):
        return None
    try:
        return Fraction(bare.rstrip("."))
    except ZeroDivisionError:
        return None


# The worker's whole program, so that it neither imports the package nor the caller's script once more.
_SERVE = """
import json, logging, sys
from math_verify import parse, verify
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
answers, sys.stdout = sys.stdout, sys.stderr
def parsed(text):
    return parse(text if text.startswith("$") else f"${text}$")
print('"ready"', file=answers, flush=True)
for line in sys.stdin:
    try:
        given, wanted = json.loads(line)
        is_same = bool(verify(parsed(wanted), parsed(given)))
    except Exception:
        is_same = False  # what cannot be parsed is not a right answer
    print(json.dumps(is_same), file=answers, flush=True)
"""


class _Worker:
    """One worker process, started on first use and replaced when it hangs or dies. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def verify(self, given: str, wanted: str) -> bool:
        with self._lock:
            process = self._process or self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps([given, wanted]) + "\n")
                process.stdin.flush()
                answer = _line(process, TIMEOUT_S)
            except OSError:
                answer = None
            if answer is None:
                self.stop()
            return answer is True

    def _start(self) -> subprocess.Popen[str]:
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        if _line(process, 120.0) != "ready":
            self.stop()
            raise RuntimeError("The math-verify worker did not start within 120 seconds.")
        return process

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = None


def _line(process: subprocess.Popen[str], timeout_s: float) -> Any:
    """What the worker says next; None where it says nothing in time, or never will. One answer is ever under way."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            return None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None


_WORKER = _Worker()
atexit.register(_WORKER.stop)
