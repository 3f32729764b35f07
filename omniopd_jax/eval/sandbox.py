"""Runs untrusted Python on this machine, walled off: bubblewrap where it is, else Linux namespaces.

Either way a program gets: no network, no file of this machine but Python and the system's libraries (read-only), an
empty folder in memory as the only place to write to, an empty environment, no privileges, a process tree that dies as
a whole, and bounds on time, memory, processes, file sizes, open files and output. What runs inside: `eval/inside.py`.

What remains: the wall is the kernel's. A hole in it is a hole here; programs share the processor and its caches with
the run; memory is bounded a process, so the worst case is `processes` times `memory_mb`, beside the folder. A service
on another machine (`eval/service.py`) is the stronger wall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import selectors
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from omniopd_jax.eval import inside
from omniopd_jax.eval.verdict import Verdict
from omniopd_jax.types import InputError

_HERE = Path(__file__).parent
SOURCE = (_HERE / "inside.py").read_text(encoding="utf-8")
_T = TypeVar("_T")
_ERRORS = 4096  # bytes of stderr kept
_START_S = 30.0  # until a program runs: the sandbox and Python's own start, before a program's time begins
_ATTEMPTS = 2
_PAUSE_S = 0.5  # between them


class SandboxError(RuntimeError):
    """Programs cannot be run, which says nothing about the programs: never counted as a wrong answer."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use."""

    timeout_s: float = 10.0  # wall time from its start on
    call_s: float = 0.0  # wall time of each thing that tests ask of it (to load, a call); 0: timeout_s alone
    memory_mb: int = 1024  # address space of a process
    processes: int = 8  # threads included
    file_mb: int = 16  # the largest file, and half of the folder's size
    files: int = 64  # open at once
    output_bytes: int = 4 << 20  # of stdout; more ends the program


@dataclasses.dataclass(frozen=True)
class Wall:
    """A way to shut a command in. `command` wraps it; what is inherited stays open."""

    name: str  # "bubblewrap" | "namespaces" | "none"
    uid: int  # user to become inside; 0: the caller's own
    becomes_inside: bool  # inside.confine changes the user; else the wall has done so

    def command(self, limits: Limits, root: str) -> list[str]:
        if self.name == "bubblewrap":
            return _bubblewrap(limits, self.uid)
        if self.name == "namespaces":
            bind, links = _system()
            spec = dict(
                owner=os.getpid(), root=root, bind=bind, links=links, tmp_bytes=_tmp_bytes(limits), uid=self.uid
            )
            return [sys.executable, "-I", "-S", str(_HERE / "namespaces.py"), json.dumps(spec)]
        return []

    def limits(self, limits: Limits) -> dict[str, Any]:
        """What inside.confine sets."""
        processes = limits.processes
        if self.name == "none" and not self.uid:
            processes += _tasks_of(os.getuid())  # without a user of its own the bound counts all of the user's
        return dict(
            uid=self.uid if self.becomes_inside else 0,
            # Above the wall time that it has: who loops without end is told so by the clock, not by a signal.
            cpu_s=int(limits.timeout_s) + 4,
            file_mb=limits.file_mb,
            files=limits.files,
            memory_mb=limits.memory_mb,
            processes=processes,
        )


class LocalSandbox:
    """Programs on this machine.

    Args:
      allow_unsandboxed: where there is no wall, run programs with resource limits alone, as the user who asks.

    Raises:
      InputError: there is no wall here, and none was not allowed.
    """

    def __init__(self, *, allow_unsandboxed: bool = False):
        name, why = wall_here()
        if not name and not allow_unsandboxed:
            raise InputError(
                f"Programs cannot be shut in on this machine ({why}): install bubblewrap, allow user namespaces, name "
                "a service in eval.sandbox, or set eval.allow_unsandboxed to run them with resource limits alone."
            )
        self.wall = name or "none"

    def run_tests(self, program: str, tests: str, limits: Limits) -> Verdict:
        """The tests, in one sandbox, against the program, in another; see `eval/inside.py`.

        Raises:
          SandboxError: the sandboxes could not be set up, twice.
        """
        return insist(lambda: self._run_tests(program, tests, limits), f"(wall: {self.wall})")

    def run_program(self, program: str, text: str, limits: Limits) -> tuple[str, str]:
        """(stdout, "" or what went wrong) of the program, given `text` on stdin.

        Raises:
          SandboxError: the sandbox could not be set up, twice.
        """
        return insist(lambda: self._run_program(program, text, limits), f"(wall: {self.wall})")

    def _run_tests(self, program: str, tests: str, limits: Limits) -> Verdict:
        with contextlib.ExitStack() as stack:
            wall = _wall(self.wall)
            questions, to_program = os.pipe()
            from_program, answers = os.pipe()
            ends = [questions, to_program, from_program, answers]
            stack.callback(lambda: [os.close(end) for end in ends])
            job = dict(
                program=program, tests=tests, from_program=from_program, to_program=to_program,
                limits=wall.limits(dataclasses.replace(limits, memory_mb=max(limits.memory_mb, 512))),
                program_limits=wall.limits(limits), call_s=limits.call_s,
            )  # fmt: skip
            said = stack.enter_context(_file_of(b""))  # what both say until they have started
            stack.enter_context(_started(wall, ["candidate"], limits, stdin=questions, stdout=answers, stderr=said))
            given = stack.enter_context(_file_of(_framed(job)))
            ours = (from_program, to_program)
            judge = stack.enter_context(
                _started(wall, ["judge"], limits, passed=ours, stdin=given, stdout=subprocess.PIPE, stderr=said)
            )
            while ends:
                os.close(ends.pop())  # only the two processes hold them now: an end that dies is noticed
            try:
                told, _, outcome = _collect(judge, limits.timeout_s, limits.output_bytes)
            except NotStartedError as error:
                raise NotStartedError(_tail(os.pread(said.fileno(), _ERRORS, 0)) or str(error)) from error
        if outcome:
            return Verdict(False, outcome)
        try:
            found = json.loads(told[4 : 4 + struct.unpack(">I", told[:4])[0]])
            return Verdict(found["passed"] is True, str(found["reason"]))
        except (struct.error, ValueError, KeyError, TypeError):
            return Verdict(False, f"the tests ended without a verdict (exit status {judge.returncode})")

    def _run_program(self, program: str, text: str, limits: Limits) -> tuple[str, str]:
        wall = _wall(self.wall)
        with _file_of(program.encode()) as source, _file_of(text.encode()) as given:
            arguments = ["program", json.dumps(wall.limits(limits)), str(source.fileno())]
            with _started(
                wall, arguments, limits, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                passed=(source.fileno(),),
            ) as process:  # fmt: skip
                out, errors, outcome = _collect(process, limits.timeout_s, limits.output_bytes)
        if not outcome and process.returncode:
            said = _tail(errors)
            outcome = f"exit status {process.returncode}" + (f": {said}" if said else "")
        return out.decode(errors="replace"), outcome


class NotStartedError(Exception):
    """A program has not begun to run; the message is what the wall said."""


def insist(attempt: Callable[[], _T], where: str) -> _T:
    """attempt(), once more where the sandbox itself fails (a full process table, a busy mount): that may pass.

    Raises:
      SandboxError: it failed twice.
    """
    said = ""
    for number in range(_ATTEMPTS):
        if number:
            time.sleep(_PAUSE_S)
        try:
            return attempt()
        except (NotStartedError, OSError) as error:
            said = str(error)
    raise SandboxError(f"The sandbox {where} cannot run programs: {said}. Nothing was judged by that.")


def _tail(said: bytes) -> str:
    """The last line."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


@functools.cache
def wall_here() -> tuple[str, str]:
    """(bubblewrap | namespaces | "", why none): what works here, tried on a program that prints one word."""
    if sys.platform != "linux":
        return "", "it needs Linux"
    reasons = []
    for name in ("bubblewrap", "namespaces"):
        reason = try_wall(name)
        if not reason:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return "", "; ".join(reasons)


@functools.cache
def try_wall(name: str) -> str:
    """ "" if this wall works here, else why not."""
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    sandbox = LocalSandbox.__new__(LocalSandbox)
    sandbox.wall = name
    try:
        out, outcome = sandbox._run_program("print('within')", "", Limits(timeout_s=20.0))
    except (NotStartedError, OSError) as error:
        return str(error)
    return "" if (out, outcome) == ("within\n", "") else outcome or "it does not answer"


_USERS = itertools.count()


def _wall(name: str) -> Wall:
    """Root gives every run a user of its own, for the kernel bounds no processes of root."""
    if os.geteuid() != 0:
        return Wall(name, 0, False)
    uid = 64000 + next(_USERS) % 1500
    if name == "none" and not _is_public(_python()):
        uid = 0  # another user could not even start Python from there
    return Wall(name, uid, becomes_inside=name != "namespaces")


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _is_public(path: str) -> bool:
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in [path, *map(str, Path(path).parents)])


@functools.cache
def _system() -> tuple[list[str], list[tuple[str, str]]]:
    """(paths to show read-only, symbolic links to make): Python and the libraries that it is linked to."""
    bind = ["/usr"]
    links = []
    for path in ("/lib", "/lib32", "/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.exists(path):
            bind.append(path)
    prefix = os.path.realpath(sys.base_prefix)
    for path in (prefix, os.path.dirname(os.path.dirname(_python()))):
        if not any(path == known or path.startswith(known + "/") for known in bind):
            bind.append(path)
    return bind, links


def _tmp_bytes(limits: Limits) -> int:
    return 2 * limits.file_mb << 20


def _bubblewrap(limits: Limits, uid: int) -> list[str]:
    bind, links = _system()
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    if uid:
        # Root, who can do without a user namespace, so that the user that inside.confine becomes is a real one.
        command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-all"]
    # Before the rest, for Python may lie in /tmp.
    command += ["--perms", "1777", "--size", str(_tmp_bytes(limits)), "--tmpfs", "/tmp"]
    for path in bind:
        for folder in [*map(str, Path(path).parents)][-2::-1]:
            if folder != "/tmp":
                command += ["--perms", "0755", "--dir", folder]  # else root's alone
        command += ["--ro-bind", path, path]
    for path, target in links:
        command += ["--symlink", target, path]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


def _tasks_of(uid: int) -> int:
    """Threads of a user, which the kernel's bound on processes counts."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == uid:
                count += len(list((folder / "task").iterdir()))
    return count


@contextlib.contextmanager
def _started(
    wall: Wall,
    arguments: Sequence[str],
    limits: Limits,
    *,
    stdin: int | IO[bytes],
    stdout: int,
    stderr: int | IO[bytes],
    passed: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of inside.py behind the wall; on leaving it is dead, with all that it started."""
    with tempfile.TemporaryDirectory(prefix="sandbox") as folder:
        if wall.uid:
            os.chmod(folder, 0o777)
        process = subprocess.Popen(
            [*wall.command(limits, folder), _python(), "-I", "-S", "-B", "-c", SOURCE, *arguments],
            cwd=folder,
            env={},
            pass_fds=tuple(passed),
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@contextlib.contextmanager
def _file_of(data: bytes) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


def _framed(message: Any) -> bytes:
    data = json.dumps(message).encode()
    if len(data) > inside.LONGEST_MESSAGE:
        raise InputError("A program with its tests is larger than 32 MiB.")
    return struct.pack(">I", len(data)) + data


def _collect(process: subprocess.Popen, timeout_s: float, most: int) -> tuple[bytes, bytes, str]:
    """(stdout after inside.STARTED, stderr's beginning, "" or why the process was not waited for to the end).

    Its time begins with STARTED, which a program that has not run cannot write.

    Raises:
      NotStartedError: the process ended, or _START_S passed, without it.
    """
    deadline = time.monotonic() + _START_S
    started = False
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    outcome = ""
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and not outcome:
            left = deadline - time.monotonic()
            if left <= 0:
                outcome = f"timeout: more than {timeout_s:g} s"
                break
            for key, _ in selector.select(min(left, 1.0)):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    kept[process.stdout] += chunk
                elif len(kept[process.stderr]) < _ERRORS:
                    kept[process.stderr] += chunk
            if not started and kept[process.stdout].startswith(inside.STARTED):
                started = True
                deadline = time.monotonic() + timeout_s
            if started and len(kept[process.stdout]) > len(inside.STARTED) + most:
                outcome = f"output: more than {most} bytes"
    if not started:
        late = f"no program ran within {_START_S:g} s" if outcome else "it ended before a program ran"
        raise NotStartedError(_tail(bytes(kept[process.stderr])) or late)
    if not outcome:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            outcome = f"timeout: more than {timeout_s:g} s"
    return bytes(kept[process.stdout][len(inside.STARTED) :]), bytes(kept[process.stderr][:_ERRORS]), outcome
