"""Is a program right? Extraction from a response, unit tests, tests by stdin and stdout, all of it in a sandbox.

No program runs in this process. `sandbox` says where: "local" (`eval/sandbox.py`) or the address of a service
(`eval/service.py`); "" refuses.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from omniopd_jax.eval.sandbox import Limits, LocalSandbox
from omniopd_jax.eval.service import ServiceSandbox
from omniopd_jax.eval.verdict import NO_ANSWER, PASSED, Verdict
from omniopd_jax.types import InputError

_LONGEST_S = 300.0  # of all calls of one program together, each within its own limit


class Sandbox(Protocol):
    """Where programs run. An implementation bounds what `limits` says and may be called from several threads."""

    def run_tests(self, program: str, tests: str, limits: Limits) -> Verdict: ...

    def run_program(self, program: str, text: str, limits: Limits) -> tuple[str, str]: ...


@functools.cache
def make_sandbox(place: str, *, allow_unsandboxed: bool = False) -> Sandbox:
    """The sandbox that `eval.sandbox` names.

    Raises:
      InputError: none is named, or the one named cannot work here.
    """
    if not place:
        raise InputError(
            "Judging this task runs programs that a model wrote: set eval.sandbox (--sandbox) to 'local' or to the "
            "address of a service, http://HOST:PORT."
        )
    if place == "local":
        return LocalSandbox(allow_unsandboxed=allow_unsandboxed)
    return ServiceSandbox(place)


def run_tests(
    program: str,
    tests: str,
    *,
    timeout_s: float = 10.0,
    call_s: float = 0.0,
    memory_mb: int = 1024,
    sandbox: Sandbox | str = "local",
) -> Verdict:
    """Runs Python tests against a program.

    Args:
      program: untrusted text.
      tests: trusted text that fails by raising. It may use what the program defines by name, or import it from the
        module `program`; it meets plain data as such, and everything else as in `eval/inside.py`.
      timeout_s: wall time of program and tests together.
      call_s: wall time of each thing that the tests ask of the program; 0: timeout_s alone.
      memory_mb: address space of each process.
      sandbox: where.

    Raises:
      InputError: there is no such sandbox.
      SandboxError: the sandbox failed, which says nothing about the program.
    """
    place = make_sandbox(sandbox) if isinstance(sandbox, str) else sandbox
    return place.run_tests(program, tests, Limits(timeout_s=timeout_s, call_s=call_s, memory_mb=memory_mb))


def run_cases(
    program: str,
    cases: Sequence[tuple[str, str]],
    *,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    sandbox: Sandbox | str = "local",
) -> Verdict:
    """Runs a script once for each (stdin, expected stdout), up to the first that fails; timeout_s is for each run."""
    place = make_sandbox(sandbox) if isinstance(sandbox, str) else sandbox
    if not cases:
        return Verdict(False, "there are no tests")
    limits = Limits(timeout_s=timeout_s, memory_mb=memory_mb)
    for number, (text, expected) in enumerate(cases, start=1):
        out, outcome = place.run_program(program, text, limits)
        if outcome:
            return Verdict(False, f"test {number}: {outcome}")
        if not same_output(out, expected):
            return Verdict(False, f"test {number}: wrong output {out.strip()[:100]!r}")
    return Verdict(True, PASSED)


def same_output(given: str, expected: str) -> bool:
    """Line by line without white space at the ends, or, within a line, number by number (LiveCodeBench's rule)."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (given, expected)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(a == b or _same_numbers(a, b) for a, b in zip(*lines, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    left, right = a.split(), b.split()
    if len(left) != len(right) or not left:
        return False
    try:
        return all(Decimal(x) == Decimal(y) for x, y in zip(left, right, strict=True))
    except InvalidOperation:
        return False


def extract_program(response: str, name: str = "") -> str | None:
    """The program in a response, or None where there is none.

    Of the fenced blocks that end: the last that defines `name`, else the last; blocks of Python go before those of no
    named language, which may as well hold an output. Without any fence a response that begins like Python, or the
    indented lines that it begins with (the body of a function, as a base model continues a stub).
    """
    if "```" in response:
        blocks = re.findall(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", response, flags=re.DOTALL | re.MULTILINE)
        blocks = [(language.lower(), text) for language, text in blocks if text.strip()]
        found = [text for language, text in blocks if language == ""]
        found += [text for language, text in blocks if language in ("python", "python3", "py")]
        defining = [text for text in found if name and _defines(text, name)]
        return (defining or found or [None])[-1]
    text = response.strip("\n")
    if re.match(r"(def|class|import|from|async|@\w)", text):
        return text
    body = re.match(r"([ \t]+\S[^\n]*(\n|\Z)|[ \t]*\n)+", text)
    return body[0] if body and body[0].strip() else None


def _defines(program: str, name: str) -> bool:
    found = rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=[^=]"
    return re.search(found, program, re.MULTILINE) is not None


def _asked_for(tests: str) -> str:
    """The first name that assertions call without that Python or the tests define it; "" where there is none."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError):
        return ""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own |= {alias.asname or alias.name for node in imports for alias in node.names}
    asserted = [node for test in tree.body if isinstance(test, ast.Assert) for node in ast.walk(test)]
    called = [node.func.id for node in asserted if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return next((name for name in called if name not in own and not hasattr(builtins, name)), "")


@dataclasses.dataclass(frozen=True)
class CodeReference:
    """What a program is judged by; travels as the `answer` of a prompt."""

    tests: str = ""  # Python, for run_tests
    cases: tuple[tuple[str, str], ...] = ()  # (stdin, stdout), for run_cases
    stub: str = ""  # what the problem gave: imports and helpers that a response may leave out
    entry_point: str = ""  # name that the program has to define, where the tests call one
    calls: int = 0  # so many of the tests are calls with a time limit of their own; 0: one limit for all tests

    def dumps(self) -> str:
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if value})

    @classmethod
    def loads(cls, text: str, where: str = "A problem") -> CodeReference:
        """Raises InputError where `text` is none."""
        try:
            values: Any = json.loads(text)
            values["cases"] = tuple((str(a), str(b)) for a, b in values.get("cases", ()))
            reference = cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{where} has no tests that a program could be judged by: {text[:80]!r}.") from error
        if not reference.tests and not reference.cases:
            raise InputError(f"{where} has no tests that a program could be judged by.")
        return reference


def judge_program(
    response: str, answer: str, *, sandbox: Sandbox, timeout_s: float = 10.0, memory_mb: int = 1024
) -> Verdict:
    """Judges the program in a response by the tests in `answer` (CodeReference.dumps)."""
    reference = CodeReference.loads(answer)
    name = reference.entry_point or _asked_for(reference.tests)
    program = extract_program(response, name)
    if program is None:
        return Verdict(False, NO_ANSWER)
    if reference.cases:
        program = reference.stub + program
        return run_cases(program, reference.cases, timeout_s=timeout_s, memory_mb=memory_mb, sandbox=sandbox)
    if reference.entry_point and not _defines(program, reference.entry_point):
        program = reference.stub + program  # the body alone, as a base model continues a stub
    else:
        program = reference.stub + "\n" + program  # its imports and helpers; what the response defines comes later
    whole, call_s = timeout_s, 0.0
    if reference.calls:
        call_s = timeout_s
        whole = max(timeout_s, min(timeout_s * (reference.calls + 1), _LONGEST_S))  # one more: the program's own start
    return run_tests(program, reference.tests, timeout_s=whole, call_s=call_s, memory_mb=memory_mb, sandbox=sandbox)
