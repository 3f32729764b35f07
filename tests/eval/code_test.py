"""Programs are found in responses and judged by unit tests or by their output, at a service as on this machine."""

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from omniopd_jax.eval import code, sandbox, service
from omniopd_jax.eval.code import CodeReference, extract_program, judge_program, run_cases, run_tests, same_output
from omniopd_jax.eval.evaluate import get_judge
from omniopd_jax.eval.sandbox import SandboxError
from omniopd_jax.eval.tasks import read_task
from omniopd_jax.eval.verdict import NO_ANSWER, Verdict
from omniopd_jax.types import InputError

SHARED = Path(os.environ.get("OMNIOPD_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HUMAN_EVAL = SHARED / "human_eval" / "HumanEval.jsonl.gz"
needs_wall = pytest.mark.skipif(not sandbox.wall_here()[0], reason=f"no wall here: {sandbox.wall_here()[1]}")


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("First\n```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```\nDone.", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python3\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("  ```py\n  x = 1\n  ```", "  x = 1\n"),
        ("```python\nx = 1\n", None),  # cut in the middle
        ("```python\n\n```", None),
        ("I cannot.", None),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("    return 1\n\n    # end\n\ndef g(): pass", "    return 1\n\n    # end\n\n"),
        ("", None),
    ],
)
def test_the_last_whole_block_is_the_program(response, program):
    assert extract_program(response) == program


@pytest.mark.parametrize(
    ("blocks", "name", "chosen"),
    [
        ([("python", "def f(): pass"), ("", "Output: 3")], "", 0),  # an output has no language
        ([("python", "def f(): pass"), ("", "Output: 3")], "f", 0),
        ([("python", "def f(): pass"), ("python", "print(f())")], "f", 0),  # how to use it
        ([("python", "def f(): pass"), ("python", "print(f())")], "", 1),  # nobody knows what was asked for
        ([("python", "def f(): return 1"), ("python", "def f(): return 2"), ("py", "f()")], "f", 1),
        ([("python", "class Solution:\n    def f(self): pass"), ("python", "Solution().f()")], "Solution", 0),
        ([("python", "f = lambda: 1"), ("python", "assert f == f")], "f", 0),
        ([("", "def f(): pass"), ("python", "f()")], "f", 0),  # the one that defines it, whatever it is called
        ([("python", "def f2(): pass"), ("python", "def g(): pass")], "f", 1),
        ([("python", "def f(): pass"), ("python", "")], "", 0),
    ],
)
def test_of_several_blocks_that_which_was_asked_for_is_the_program(blocks, name, chosen):
    response = "\n".join(f"Text.\n```{language}\n{text}\n```" for language, text in blocks)
    assert extract_program(response, name) == blocks[chosen][1] + "\n"


def test_assertions_say_which_function_is_asked_for():
    assert code._asked_for("import math\nassert math.isclose(area(2), 4) and len(rest(1)) == 1") == "area"
    assert code._asked_for("def own(x): return x\nassert set(own(f((1, 2)))) == set(g())") in ("f", "g")
    assert code._asked_for("from program import f\ncheck(f)") == ""
    assert code._asked_for("assert (") == ""


class Recorder:
    """A sandbox that runs nothing and remembers what it was to run."""

    def run_tests(self, program, tests, limits):
        self.program, self.limits = program, limits
        return Verdict(True, "passed")

    def run_program(self, program, text, limits):
        self.program, self.limits = program, limits
        return text, ""


def test_programs_get_the_limits_that_were_asked_for(monkeypatch):
    place = Recorder()
    monkeypatch.setattr(code, "make_sandbox", lambda *args, **options: place)
    judge = get_judge("mbpp", [], sandbox="local", timeout_s=3.0, memory_mb=77)
    response = "```python\ndef f(): return 1\n```\nUsage:\n```python\nprint(f())\n```"
    assert judge(response, CodeReference(tests="assert f() == 1").dumps())
    assert (place.limits.timeout_s, place.limits.call_s, place.limits.memory_mb) == (3.0, 0.0, 77)
    assert "def f" in place.program, "MBPP names its function in its assertions alone"
    assert judge(response, CodeReference(cases=(("a", "a"),)).dumps())
    assert (place.limits.timeout_s, place.limits.memory_mb) == (3.0, 77)
    for calls, whole in ((1, 6.0), (40, 123.0), (1000, code._LONGEST_S)):
        judge(response, CodeReference(tests="assert f()", calls=calls).dumps())
        assert (place.limits.timeout_s, place.limits.call_s) == (whole, 3.0), "each call has the time for itself"


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1.0 2", "1 2.000", True),
        ("1\n2", "1 2", False),
        ("yes", "Yes", False),
        ("", "", True),
        ("", "1", False),
        ("1e400 x", "1e400 y", False),
        ("nan", "nan", True),
    ],
)
def test_output_is_compared_line_by_line_and_number_by_number(given, expected, same):
    assert same_output(given, expected) is same


@needs_wall
def test_scripts_are_run_once_a_case_up_to_the_first_that_fails():
    script = "a, b = map(int, input().split())\nprint(a // b)\nimport sys\nsys.exit(0)"
    assert run_cases(script, [("4 2", "2\n"), ("9 3", "3")]).passed
    assert run_cases(script, [("4 2", "2"), ("4 0", "0"), ("x", "")]).reason.startswith(
        "test 2: exit status 1: ZeroDivisionError"
    )
    assert run_cases(script, [("4 2", "3")]).reason == "test 1: wrong output '2'"
    assert not run_cases(script, []).passed


@needs_wall
def test_a_judge_takes_whole_programs_and_bodies():
    reference = CodeReference(
        tests="from program import f\nassert f([1]) == 1", entry_point="f",
        stub="from typing import List\n\n\ndef f(x: List):\n    '''One.'''\n",
    ).dumps()  # fmt: skip
    place = code.make_sandbox("local")
    for response in ("```python\ndef f(x: List):\n    return x[0]\n```", "    return x[0]\n\ndef g():\n    return 2"):
        assert judge_program(response, reference, sandbox=place) == Verdict(True, "passed")
    assert judge_program("It is 1.", reference, sandbox=place) == Verdict(False, NO_ANSWER)
    scripts = CodeReference(cases=(("2", "4"),)).dumps()
    assert judge_program("```\nprint(2 * int(input()))\n```", scripts, sandbox=place).passed


def test_a_reference_without_tests_is_refused():
    for text in ("18", "{}", "[]", '{"tests": ""}', '{"test": "x"}'):
        with pytest.raises(InputError, match=r"^Prompt 'a' has no tests"):
            CodeReference.loads(text, "Prompt 'a'")


@needs_wall
@pytest.mark.skipif(not HUMAN_EVAL.is_file(), reason=f"no HumanEval at {HUMAN_EVAL}; OMNIOPD_DATA names the folder")
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_humanevals_own_solutions_pass_and_empty_ones_fail(every):
    prompts = read_task("humaneval", HUMAN_EVAL)
    with gzip.open(HUMAN_EVAL, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(prompts) == 164
    prompts, rows = prompts[8 % every :: every], rows[8 % every :: every]  # 32, where the tests call a helper, is in
    judge = get_judge("humaneval", prompts, sandbox="local")
    answers = [prompt.answer for prompt in prompts]
    solutions = [f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows]
    wrong = {
        prompt.id: verdict.reason
        for prompt, verdict in zip(prompts, judge.all(solutions, answers), strict=True)
        if not verdict
    }
    assert not wrong
    empty = [f"```python\n{row['prompt']}    return None\n```" for row in rows[::16]]
    assert not any(judge.all(empty, answers[::16]))


class FakeService(BaseHTTPRequestHandler):
    """Speaks like SandboxFusion and really runs what it gets; `faults` are answered first."""

    faults: list = []  # noqa: RUF012
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, request))
        if self.faults:
            status, body = type(self).faults.pop(0)
        else:
            status, body = 200, json.dumps(self._run(request))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def _run(self, request):
        path = Path(self.server.folder) / "main.py"
        path.write_text(request["code"])
        try:
            done = subprocess.run(
                [sys.executable, str(path)], input=request["stdin"], capture_output=True, text=True,
                timeout=request["run_timeout"], check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {
                "status": "Failed",
                "message": "",
                "run_result": {"status": "TimeLimitExceeded", "return_code": None},
            }
        result = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": result}

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "_PAUSE_S", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeService)
    server.folder = tmp_path
    FakeService.faults, FakeService.seen = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_gives_the_same_verdicts(address, tmp_path):
    tests = "print('passed')\nassert f(2) == 4"
    assert run_tests("def f(x):\n    return 2 * x", tests, sandbox=address) == Verdict(True, "passed")
    assert not (tmp_path / "main.py").exists(), "the file with the tests and the token is gone before the program runs"
    path, request = FakeService.seen[0]
    assert path == "/run_code"
    assert (request["language"], request["memory_limit_MB"], request["run_timeout"]) == ("python", 1024, 10.0)
    assert run_tests("def f(x):\n    return x", tests, sandbox=address).reason == "failed: assert f(2) == 4"
    forged = (
        "import os, sys\nprint('passed')\nfor fd in range(9):\n    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\ndef f(x):\n    os._exit(0)"
    )
    assert not run_tests(forged, tests, sandbox=address).passed
    assert run_tests("def f(x):\n    while True: pass", tests, timeout_s=1.0, sandbox=address).reason.startswith(
        "timeout"
    )
    slow = "import time\ndef f(x):\n    time.sleep(60)"
    limits = sandbox.Limits(timeout_s=20.0, call_s=0.2)
    assert "more than 0.2 s in one call" in service.ServiceSandbox(address).run_tests(slow, tests, limits).reason
    assert run_cases("print(int(input()) + 1)", [("1", "2")], sandbox=address).passed
    assert run_cases("print(1 / 0)", [("1", "2")], sandbox=address).reason.startswith("test 1: exit status 1: Zero")


def test_a_service_in_trouble_is_asked_again_and_never_counts_as_a_wrong_answer(address):
    FakeService.faults = [(503, ""), (200, '{"status": "SandboxError", "message": "no pod"}')]
    assert run_cases("print(1)", [("", "1")], sandbox=address).passed
    assert len(FakeService.seen) == 3
    for fault in ((500, ""), (200, "[]"), (200, "<html>"), (200, '{"status": "SandboxError", "message": "no pod"}')):
        FakeService.faults = [fault] * service.ATTEMPTS
        with pytest.raises(SandboxError, match="Nothing was judged"):
            run_cases("print(1)", [("", "1")], sandbox=address)
    FakeService.faults, FakeService.seen = [(404, "")], []
    with pytest.raises(SandboxError, match="HTTP 404"):
        run_tests("x = 1", "assert x", sandbox=address)
    assert len(FakeService.seen) == 1
    FakeService.faults = [(302, "")]
    with pytest.raises(SandboxError, match="HTTP 302"):
        run_tests("x = 1", "assert x", sandbox=address)


def test_a_service_whose_program_never_starts_counts_nothing_as_wrong(address, monkeypatch):
    broken = sandbox.SOURCE.replace("def confine(limits: dict[str, Any]) -> None:", "def confine(limits):\n    1 / 0")
    assert broken != sandbox.SOURCE
    monkeypatch.setattr(service, "SOURCE", broken)
    with pytest.raises(SandboxError, match=r"ended before it was confined\. Nothing was judged"):
        run_tests("x = 1", "assert x", sandbox=address)
    assert len(FakeService.seen) == 2


def test_no_service_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(service, "_PAUSE_S", 0.0)
    with pytest.raises(SandboxError, match="cannot run programs"):
        run_cases("print(1)", [("", "1")], sandbox="http://127.0.0.1:9")
