"""Is a worked answer right? Extraction of the final answer and mathematical equality.

The last ``\\boxed{...}`` wins; without one the last ``#### ...`` line (GSM8K), then the last ``Answer: ...``. Plain
numbers are compared here; everything else (fractions, sets, intervals, units, expressions) by the package math-verify
(extra ``eval``), in a worker process of its own because it can hang and because it works on a main thread only.

Without math-verify only sets whose reference answers are plain numbers (GSM8K) can be judged, which is checked before
anything is generated; a given answer that is no plain number ("18 dollars", an expression) then counts as wrong.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import re
import threading
from fractions import Fraction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

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
    given = extract_answer(response)
    if given is None or not given.strip():
        return False
    wanted = _reference(answer)
    if _plain(given) == _plain(wanted):
        return True
    given_number, wanted_number = _number(given), _number(wanted)
    if given_number is not None and wanted_number is not None:
        return given_number == wanted_number
    if len(given) > _LONGEST:
        return False
    if not has_math_verify():
        check_reference(answer, "A problem")
        return False
    return _WORKER.verify(given, wanted)


def _reference(answer: str) -> str:
    marked = extract_answer(answer)
    return answer if marked is None else marked


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
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


def _serve(connection: Connection) -> None:
    """The worker's main: verifies pairs until the pipe closes."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    connection.send("ready")
    while True:
        try:
            given, wanted = connection.recv()
        except EOFError:
            return
        try:
            connection.send(bool(verify(_parsed(parse, wanted), _parsed(parse, given))))
        except Exception:
            connection.send(False)  # what cannot be parsed is not a right answer


def _parsed(parse, text: str):
    return parse(text if text.startswith("$") else f"${text}$")


class _Worker:
    """One worker process, started on first use and replaced when it hangs or dies. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Any = None  # the type of a pipe's end differs between platforms

    def verify(self, given: str, wanted: str) -> bool:
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send((given, wanted))
                if connection.poll(TIMEOUT_S):
                    return connection.recv()
            except (EOFError, OSError):
                pass
            self.stop()
            return False

    def _start(self) -> Any:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._connection, self._process = ours, context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not ours.poll(120.0) or ours.recv() != "ready":
            self.stop()
            raise RuntimeError("The math-verify worker did not start within 120 seconds.")
        return ours

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


_WORKER = _Worker()
atexit.register(_WORKER.stop)
