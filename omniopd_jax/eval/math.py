"""Is a worked answer right? Extraction of the final answer and mathematical equality.

The last ``\\boxed{...}`` wins; without one the last ``#### ...`` line (GSM8K), then the last ``Answer: ...``; emphasis
of markdown is left out. Plain numbers ("1,800", "1/2", "1 1/2") are compared here, a unit in words behind them left out
("18 dollars"), and so is what a sentence goes on with ("42, as 6 · 7 is 42"); everything else (sets, intervals, units
in TeX, expressions) by the package math-verify (extra ``eval``), in a worker process of its own because it can hang and
because it works on a main thread only.

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
    text = _without_emphasis(text)
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
    if wanted_number is not None:
        given_number = _number(_without_unit(given))
        if given_number is None:
            given_number = _leading_number(given)
        if given_number is not None:
            return given_number == wanted_number
        if _LIST.fullmatch(_bare(given)):
            return False
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


def _without_emphasis(text: str) -> str:
    """Markdown's asterisks, underscores and backticks around words; those within a formula (2**3, 2*3, a_1) stay."""
    text = re.sub(r"(?<!\w)(?:\*\*|__)|(?:\*\*|__)(?!\w)", "", text.replace("`", ""))
    return re.sub(r"(?<!\S)\*(?=\S)([^*\n]*)(?<=\S)\*(?!\w)", r"\1", text)


def _bare(text: str) -> str:
    """Without signs of currency and of percent."""
    return re.sub(r"\\?[$%]|\\[()]", " ", _plain(text)).strip()


# A comma is a separator of thousands only between groups of three digits; a space is none.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,100})"
_VALUE = rf"(?:\d{{1,100}}\s+)?\d{{1,100}}\s*/\s*\d{{1,100}}|{_WHOLE}(?:\.\d{{0,100}})?|\.\d{{1,100}}"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?:(?P<whole>\d{1,100})\s+)?(?P<above>\d{1,100})\s*/\s*(?P<below>\d{1,100})"
    rf"|(?P<decimal>{_WHOLE}(?:\.\d{{0,100}})?|\.\d{{1,100}}))"
)
_LIST = re.compile(rf"[+-]?\s*(?:{_VALUE})(?:\s*[,;]\s*[+-]?\s*(?:{_VALUE})|\s+(?:{_VALUE}))+")
# A number, perhaps its unit, and then the sign that a sentence goes on: punctuation or a bracket before a word.
_LEADING = re.compile(
    rf"(?P<number>[+-]?\s*(?:{_VALUE}))(?P<unit>(?:\s+[A-Za-z]{{2,}})*)"
    r"(?:\s*[,;:]\s+|\s*[(]\s*|\s+[-–—]+\s+|[.!]\s+)(?P<next>[A-Za-z]+)"
)
_NO_UNITS = {
    "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "dozen", "hundred", "thousand", "million", "billion",
    "trillion", "half", "or", "and",
}  # fmt: skip


def _without_unit(text: str) -> str:
    """ "18" for "18 dollars"; a text whose words may be more than a unit as it is."""
    if len(text) > _LONGEST:
        return text
    found = re.fullmatch(r"(.*\d\S*)((?:\s+[A-Za-z]{2,})+)", _plain(text))
    return found[1] if found and not _NO_UNITS & set(found[2].lower().split()) else text


def _leading_number(text: str) -> Fraction | None:
    """42 for "42, as 6 · 7 is 42", 18 for "18 eggs (a dozen and six)"; None where the number may be but a part of the
    value ("3 or 4", "3 million", "3 (x + 1)")."""
    found = _LEADING.match(_bare(text))
    if found is None or len(found["next"]) < 2:
        return None
    words = {*found["unit"].lower().split(), found["next"].lower()}
    return None if words & _NO_UNITS else _number(found["number"])


def _number(text: str) -> Fraction | None:
    """A decimal number, a simple fraction or a mixed number (1 1/2, a sum); currency and percent signs allowed."""
    found = _NUMBER.fullmatch(_bare(text))
    if found is None:
        return None
    sign = -1 if found["sign"] == "-" else 1
    if found["decimal"] is not None:
        return sign * Fraction(found["decimal"].replace(",", "").rstrip("."))
    if int(found["below"]) == 0:
        return None
    return sign * (int(found["whole"] or 0) + Fraction(int(found["above"]), int(found["below"])))


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
