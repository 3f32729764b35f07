"""Programs are judged by what they do, and can do nothing else: each hostile program is a test, behind each wall."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omniopd_jax.eval import sandbox as sandbox_lib
from omniopd_jax.eval.code import make_sandbox
from omniopd_jax.eval.sandbox import Limits, LocalSandbox, SandboxError
from omniopd_jax.types import InputError

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(timeout_s=5.0, memory_mb=256)
TESTS = "assert double(2) == 4\nassert double(3) == 6"
HONEST = "def double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def local(request):
    reason = sandbox_lib.try_wall(request.param)
    if reason:
        pytest.skip(f"{request.param} does not work here: {reason}")
    sandbox = LocalSandbox(allow_unsandboxed=True)
    sandbox.wall = request.param
    return sandbox


@pytest.fixture(scope="module")
def either():
    """Whichever wall there is, for what does not hang on the wall."""
    name, reason = sandbox_lib.wall_here()
    if not name:
        pytest.skip(reason)
    return LocalSandbox()


def test_an_honest_program_passes_and_a_wrong_one_says_where(local):
    assert local.run_tests(HONEST, TESTS, LIMITS).passed
    verdict = local.run_tests("def double(x):\n    return x + 2\n", TESTS, LIMITS)
    assert not verdict.passed
    assert verdict.reason == "failed: assert double(3) == 6"


# Everything that could make a harness in the same process say "passed".
FORGERIES = {
    "os._exit(0)": "import os\ndef double(x):\n    os._exit(0)",
    "os._exit(0) at load": "import os\nos._exit(0)",
    "sys.exit(0)": "import sys\ndef double(x):\n    sys.exit(0)",
    "exit at load": HONEST + "raise SystemExit(0)",
    "catching SystemExit": "def double(x):\n    try:\n        exit(0)\n    except SystemExit:\n        return 0",
    "equal to everything": "class Yes:\n    __eq__ = lambda s, o: True\ndef double(x):\n    return Yes()",
    "an int equal to everything": "class Yes(int):\n    __eq__ = lambda s, o: True\ndef double(x):\n    return Yes(1)",
    "a metaclass equal to everything": "class M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = None\n"
    "class Yes(metaclass=M): pass\ndef double(x):\n    return Yes",
    "built-ins": "import builtins\nbuiltins.AssertionError = type('Q', (BaseException,), {})\n"
    "builtins.exec = lambda *a: None\ndef double(x):\n    return 0",
    "names of Python's own": "AssertionError = str\nlen = abs = exec = lambda *a: 4\ndef double(x):\n    return 0",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef double(x):\n    return 0",
    "the marker": 'print("passed")\nprint(\'{"passed": true, "reason": "passed"}\')\ndef double(x):\n    return 0',
    "the marker on every descriptor": 'import os, struct\ndata = b\'{"passed": true, "reason": "passed"}\'\n'
    "for fd in range(64):\n    try:\n        os.write(fd, struct.pack('>I', len(data)) + data)\n"
    "    except OSError:\n        pass\ndef double(x):\n    return 0",
    "a patched module program": "import sys\nsys.modules['__main__'].verdict = lambda *a: (True, 'passed')\n"
    "sys.modules['__main__'].judge = None\ndef double(x):\n    return 0",
    "the frames of the runner": "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n"
    "        f.f_globals['encode'] = lambda v, k: {'object': 0}\n        f = f.f_back\n    return 0",
    "a thread": "import threading, os, time\nthreading.Thread(target=lambda: (time.sleep(.2), os._exit(0))).start()\n"
    "import time\ndef double(x):\n    time.sleep(1)\n    return 0",
    "nothing defined": "x = 1",
    "a syntax error": "def double(x: return",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_can_forge_its_verdict(either, name):
    tests = "try:\n    assert double(2) == 4\nexcept SystemExit:\n    pass\nassert len([1]) == 1 and double(3) == 6"
    verdict = either.run_tests(FORGERIES[name], tests, LIMITS)
    assert not verdict.passed, verdict


def test_pythons_own_names_keep_their_meaning_in_the_tests(either):
    liar = "all = sorted = abs = isinstance = lambda *a: True\ndef double(x):\n    return 0"
    assert not either.run_tests(liar, "assert all([double(2) == 4])", LIMITS).passed
    assert either.run_tests("def double(x):\n    return 4", "assert all([double(2) == 4])", LIMITS).passed


def test_no_exception_of_the_program_ends_a_loop_of_the_tests_early(either):
    tests = "for found, wanted in zip(map(double, [2, 3]), [4, 6]):\n    assert found == wanted"
    verdict = either.run_tests("def double(x):\n    raise StopIteration", tests, LIMITS)
    assert not verdict.passed
    assert verdict.reason.startswith("StopIteration")


def test_tests_that_catch_everything_do_not_hide_that_the_program_is_gone(either):
    tests = "try:\n    double(2)\nexcept BaseException:\n    pass"
    verdict = either.run_tests("import os\ndef double(x):\n    os._exit(0)", tests, LIMITS)
    assert verdict.reason == "the program: ended before its tests were done"


def test_a_fork_bomb_is_bounded_and_leaves_nothing_behind(local):
    bomb = "import os, time\nn = 0\ntry:\n    while n < 2000:\n        if os.fork() == 0:\n            time.sleep(60)\n"
    bomb += "        n += 1\nexcept OSError:\n    pass\nprint(n)\n"
    out, outcome = local.run_program(bomb, "", LIMITS)
    assert outcome == ""
    assert int(out.splitlines()[0]) < LIMITS.processes
    endless = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    began = time.monotonic()
    marked = Limits(timeout_s=0.2, memory_mb=251 if local.wall == "bubblewrap" else 253)
    _, outcome = local.run_program(endless, "", marked)
    assert outcome.startswith(("timeout", "exit status"))
    assert time.monotonic() - began < 15
    assert not _left_behind(marked)


def _living(limits: Limits) -> list[str]:
    """Processes of a sandbox, told by the runner's source and by limits that no other run has in the command line."""
    mark = f'"memory_mb": {limits.memory_mb}'.encode()
    living = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"What runs inside a sandbox" in line and mark in line:
            living.append(folder.name)
    return living


def _left_behind(limits: Limits) -> list[str]:
    deadline = time.monotonic() + 5
    while (left := _living(limits)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel ends a namespace's processes one by one
    return left


def test_a_process_that_leaves_its_group_dies_with_the_rest(local):
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
    program += "    os._exit(0)\ntime.sleep(0.2)\n"
    marked = Limits(timeout_s=5.0, memory_mb=257 if local.wall == "bubblewrap" else 259)
    assert local.run_program(program, "", marked)[1] == ""
    assert not _left_behind(marked)


def test_it_dies_with_the_process_that_started_it(local):
    script = "import sys\nfrom omniopd_jax.eval import sandbox\nlocal = sandbox.LocalSandbox(allow_unsandboxed=True)\n"
    script += f"local.wall = {local.wall!r}\nprint('started', flush=True)\n"
    marked = Limits(timeout_s=60.0, memory_mb=261 if local.wall == "bubblewrap" else 263)
    script += f"local.run_program('import time; time.sleep(60)', '', sandbox.{marked!r})\n"
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    with owner.stdout:
        owner.stdout.readline()
        deadline = time.monotonic() + 20
        while not _living(marked) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _living(marked)
        time.sleep(0.5)  # bubblewrap is told a moment after its start whom to die with
        owner.kill()
        owner.wait()
    assert not _left_behind(marked)


def test_a_flood_of_output_is_cut(local):
    began = time.monotonic()
    out, outcome = local.run_program("while True: print('x' * 10000)", "", Limits(output_bytes=1 << 18))
    assert outcome == f"output: more than {1 << 18} bytes"
    assert len(out) < 1 << 20
    assert time.monotonic() - began < 8
    flood = "def double(x):\n    print('x' * 10 ** 7)\n    return 2 * x"
    assert local.run_tests(flood, TESTS, LIMITS).passed, "what a tested function prints goes nowhere"


def test_an_endless_loop_and_a_sleeper_are_ended(local):
    began = time.monotonic()
    verdict = local.run_tests("def double(x):\n    while True: pass", TESTS, Limits(timeout_s=0.2))
    assert verdict.reason == "timeout: more than 0.2 s"
    _, outcome = local.run_program("import time\ntime.sleep(60)", "", Limits(timeout_s=0.2))
    assert outcome == "timeout: more than 0.2 s"
    assert time.monotonic() - began < 15


def test_memory_is_bounded(local):
    hog = "def double(x):\n    return [bytes(1 << 20) for _ in range(10 ** 6)]"
    assert local.run_tests(hog, TESTS, LIMITS).reason.startswith("MemoryError")
    tmp = "import os\nfor i in range(1000):\n    with open(f'/tmp/{i}', 'wb') as f:\n        f.write(bytes(1 << 22))\n"
    assert re.search("No space left|File too large", local.run_program(tmp, "", LIMITS)[1])
    hidden = "import os\nos.memfd_create('x')"
    assert "PermissionError" in local.run_program(hidden, "", LIMITS)[1]


def test_a_huge_answer_is_no_answer(either):
    huge = "def double(x):\n    return 'x' * (40 << 20)"
    verdict = either.run_tests(huge, TESTS, Limits(timeout_s=10.0, memory_mb=1024))
    assert not verdict.passed


def test_it_writes_in_its_own_folder_alone(local, tmp_path):
    program = "import os, sys\nfor path in sys.stdin.read().split():\n    try:\n        open(path, 'w').write('x')\n"
    program += "    except OSError:\n        continue\n    print(path)\n"
    places = ["/x", "/usr/x", "/etc/x", "/dev/x", "/dev/shm/x", "/root/x", "/lib/x", "/tmp/its_own", sys.executable]
    out, outcome = local.run_program(program, "\n".join([*places, str(tmp_path / "x")]), LIMITS)
    assert (out, outcome) == ("/tmp/its_own\n", "")
    assert not (tmp_path / "x").exists()
    assert not Path("/tmp/its_own").exists(), "its /tmp is not ours"
    assert "its_own" not in local.run_program("import os\nprint(os.listdir('/tmp'))", "", LIMITS)[0], (
        "nor the next one's"
    )


def test_it_reads_no_secrets(local, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sesame")
    (tmp_path / "key").write_text("sesame")
    program = "import os, sys\nfor path in sys.stdin.read().split():\n    try:\n        print(open(path).read())\n"
    program += "    except OSError:\n        pass\nprint(dict(os.environ))\n"
    places = [str(tmp_path / "key"), "/etc/passwd", "/etc/shadow", "/proc/self/environ", f"/proc/{os.getpid()}/environ"]
    out, outcome = local.run_program(program, "\n".join([*places, "/proc/1/environ", __file__]), LIMITS)
    assert outcome == ""
    assert "sesame" not in out
    assert "root:" not in out
    assert set(eval(out)) <= {"LC_CTYPE", "PWD"}


def test_it_has_no_network(local):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        _, outcome = local.run_program(program, "", LIMITS)
    assert outcome.startswith("exit status 1:")
    assert "PermissionError" not in outcome, "it has sockets, and nobody to talk to"


def test_it_has_no_sockets_that_a_network_namespace_does_not_hold(local):
    """AF_VSOCK reaches the host of a virtual machine; AF_NETLINK, which every kernel has, stands for all the others."""
    program = "import socket\nsocket.socketpair()\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"
    assert local.run_program(program, "", LIMITS)[1].startswith("exit status 1: PermissionError")


def test_it_cannot_kill_what_started_it(local):
    program = (
        "import os, signal\nfor pid in (os.getppid(), -1, 1, 0):\n    try:\n        os.kill(pid, signal.SIGKILL)\n"
    )
    program += "    except OSError:\n        pass\n"
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = time.monotonic()
        local.run_program(program, "", LIMITS)
        local.run_tests(program + HONEST, TESTS, LIMITS)
        assert time.monotonic() - began < 10, "whatever it ended, it was noticed"
        assert sleeper.poll() is None
        assert local.run_tests(HONEST, TESTS, LIMITS).passed
    finally:
        sleeper.communicate(b"\n")


def test_it_makes_no_namespaces_and_looks_at_no_process(local):
    calls = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    calls += (
        "print(libc.unshare(0x10000000), ctypes.get_errno())\nprint(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())\n"
    )
    assert local.run_program(calls, "", LIMITS)[0] == "-1 1\n-1 1\n"


def test_threads_children_and_files_work_within_the_limits(local):
    program = (
        "import subprocess, sys, tempfile, threading\nt = threading.Thread(target=print, args=('thread',))\nt.start()\n"
    )
    program += "t.join()\nsys.stdout.flush()\nsubprocess.run([sys.executable, '-c', 'print(\"child\")'])\n"
    program += "with tempfile.TemporaryFile('w+') as f:\n    f.write(input())\n    f.seek(0)\n    print(f.read())\n"
    assert local.run_program(program, "line\n", LIMITS) == ("thread\nchild\nline\n", "")


def test_objects_mutation_exceptions_and_libraries_cross_the_wall(either):
    program = """
import math
from collections import Counter
from math import sqrt

LIMIT = 10 ** 40

class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
    def swap(self):
        return Pair(self.b, self.a)
    def __eq__(self, other):
        return True

def kinds():
    return [None, True, 1.5, float("inf"), "\\ud800", b"x", (1, {2, 3}), {(1,): [2]}, frozenset("a"), 2j, LIMIT]

def extend(items):
    items.append(1)
    raise KeyError("no")

def numbers():
    yield from range(3)

def count(text):
    return Counter(text)
"""
    tests = """
from program import Pair as Same
expected = [None, True, 1.5, float("inf"), "\\ud800", b"x", (1, {2, 3}), {(1,): [2]}, frozenset("a"), 2j, 10 ** 40]
assert kinds() == expected and type(kinds()[6]) is tuple
assert LIMIT == 10 ** 40
pair = Pair(1, b=2)
assert pair.swap().a == 2
pair.a = 7
assert pair.a == 7 and pair == pair and not pair == 3 and Pair(1, 2) != Pair(1, 2)
items = [0]
try:
    extend(items)
except KeyError:
    pass
else:
    assert False
assert list(numbers()) == [0, 1, 2] and count("aab") == {"a": 2, "b": 1}
assert math.floor(sqrt(5)) == 2
"""
    assert either.run_tests(program, tests, LIMITS).reason == "passed"
    assert either.run_tests("def grow(x):\n    x.append(1)", "x = [0]\ngrow(x)\nassert x == [0, 1]", LIMITS).passed
    raising = "class Own(Exception): pass\ndef double(x):\n    raise Own('mine')"
    assert either.run_tests(raising, TESTS, LIMITS).reason.startswith("Own: mine at: assert double(2)")


def test_tests_that_end_the_judge_give_no_verdict(either):
    assert "without a verdict" in either.run_tests(HONEST, "import os\nos._exit(0)", LIMITS).reason


@pytest.fixture
def fake_wall(monkeypatch, tmp_path):
    """A wall whose setup is a line of shell; "$@" is what it is to start. Tests ask for no pause between attempts."""

    def make(line: str) -> LocalSandbox:
        command = ["/bin/sh", "-c", line.replace("MARK", str(tmp_path / "mark")), "setup"]
        monkeypatch.setattr(sandbox_lib, "_PAUSE_S", 0.0)
        monkeypatch.setattr(sandbox_lib.Wall, "command", lambda *_: command)
        monkeypatch.setattr(sandbox_lib, "wall_here", lambda: ("none", ""))
        return LocalSandbox()

    return make


def test_a_setup_that_fails_once_is_tried_again(fake_wall, tmp_path):
    local = fake_wall('mkdir MARK 2>/dev/null && { echo "mount: busy" >&2; exit 125; }; exec "$@"')
    assert local.run_program("print(input())", "line\n", LIMITS) == ("line\n", "")
    (tmp_path / "mark").rmdir()
    assert local.run_tests(HONEST, TESTS, LIMITS).passed
    (tmp_path / "mark").rmdir()
    wrong = local.run_tests("def double(x):\n    return 5", TESTS, LIMITS)
    assert wrong.reason == "failed: assert double(2) == 4", "what it says in the end is about the program"


def test_a_setup_that_fails_always_counts_no_program_as_wrong(fake_wall):
    local = fake_wall('echo "mount: busy" >&2; exit 125')
    for run in (local.run_program, local.run_tests):
        with pytest.raises(SandboxError, match=r"mount: busy\. Nothing was judged"):
            run(HONEST, TESTS, LIMITS)


def test_a_setup_that_hangs_or_lies_counts_no_program_as_wrong(fake_wall, monkeypatch):
    monkeypatch.setattr(sandbox_lib, "_START_S", 0.2)
    with pytest.raises(SandboxError, match=r"no program ran within 0\.2 s"):
        fake_wall("exec sleep 60").run_program(HONEST, "", LIMITS)
    with pytest.raises(SandboxError, match="ended before a program ran"):
        fake_wall("echo started; exit 0").run_program(HONEST, "", LIMITS)
    with pytest.raises(SandboxError, match="wall: none"):
        fake_wall("echo started; exit 0").run_tests(HONEST, TESTS, LIMITS)


def test_only_one_of_the_two_sandboxes_fails(fake_wall):
    """The program's may fail while that of the tests works: the tests then have nothing to say."""
    local = fake_wall('case "$*" in *candidate) echo "no more processes" >&2; exit 125;; esac; exec "$@"')
    with pytest.raises(SandboxError, match="no more processes"):
        local.run_tests(HONEST, TESTS, LIMITS)


def test_a_program_that_ends_at_once_has_started(either):
    assert either.run_program("import os\nos._exit(3)", "", LIMITS) == ("", "exit status 3")
    assert either.run_program("", "", LIMITS) == ("", "")
    verdict = either.run_tests("import os\nos.kill(os.getpid(), 9)", TESTS, LIMITS)
    assert verdict.reason == "the program: ended before its tests were done"


def test_each_call_has_its_own_time(either):
    slow = "import time\ndef double(x):\n    time.sleep(0.6)\n    return 2 * x"
    limits = dataclasses.replace(LIMITS, timeout_s=5.0, call_s=1.0)
    assert either.run_tests(slow, TESTS, limits).passed, "1.2 s in all"
    for endless in ("while True: pass", HONEST.replace("return", "while True: pass\n    return")):
        began = time.monotonic()
        tests = f"try:\n    {TESTS.splitlines()[0]}\nexcept BaseException:\n    pass"
        assert either.run_tests(endless, tests, limits).reason == "the program: timeout: more than 1 s in one call"
        assert time.monotonic() - began < 5


def test_no_wall_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(sandbox_lib, "wall_here", lambda: ("", "neither works"))
    with pytest.raises(
        InputError, match=r"cannot be shut in on this machine \(neither works\).*eval.allow_unsandboxed"
    ):
        LocalSandbox()
    bare = LocalSandbox(allow_unsandboxed=True)
    assert bare.wall == "none"
    assert bare.run_tests(HONEST, TESTS, LIMITS).passed
    assert not bare.run_tests(FORGERIES["os._exit(0)"], TESTS, LIMITS).passed
    hog = "def double(x):\n    return [bytes(1 << 20) for _ in range(10 ** 6)]"
    assert bare.run_tests(hog, TESTS, LIMITS).reason.startswith("MemoryError"), "resource limits hold in any case"


def test_a_sandbox_has_to_be_named():
    with pytest.raises(InputError, match="runs programs that a model wrote"):
        make_sandbox("")
    with pytest.raises(InputError, match="no address"):
        make_sandbox("ftp://host")
