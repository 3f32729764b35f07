"""What runs inside a sandbox. Read as text and given to `python -I -S -c`, so it imports the standard library alone.

A program and its tests never share a process. The *candidate* process holds the program; the *judge* process holds the
tests, and the two sit in sandboxes of their own with nothing between them but two pipes. In the tests, what the program
defines is a `Remote`: calling it sends the arguments over as plain data and gets plain data back. So the program never
sees an expected value, cannot touch the tests, Python's built-ins that they use or the verdict, and whatever it prints,
overloads or exits with is, to the judge, a wrong answer or a pipe that closed.

Objects without a plain form (instances of the program's classes) stay where they are; the tests hold a `Remote` to
them, whose attributes and items can be read and set and which equals itself alone: an `__eq__` of the program's is
never asked. Arguments are copies, so lists, dicts and sets that the program changed are changed back in the tests.

Before untrusted text is so much as read as Python, each process writes STARTED, confined already. Where that is missing
the program has not run, and what went wrong says nothing about it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import struct
import sys
import types

# What not every process needs is imported where it is used: a fifth of a second for a benchmark's every answer.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Any

LONGEST_MESSAGE = 32 << 20  # bytes
STARTED = b"\0started\n"
_PLAIN = (type(None), bool, float, str)


class Lost(Exception):
    """The program's process is gone, or says nothing that could be read."""


def confine(limits: dict[str, Any]) -> None:
    """Takes the privileges and the resources away from this process, for good."""
    import resource

    if limits.get("uid"):
        os.setgroups([])
        os.setresgid(limits["uid"], limits["uid"], limits["uid"])
        os.setresuid(limits["uid"], limits["uid"], limits["uid"])
    bounds = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_FSIZE": limits["file_mb"] << 20,
        "RLIMIT_NOFILE": limits["files"],
        "RLIMIT_AS": limits["memory_mb"] << 20,
        "RLIMIT_NPROC": limits.get("processes"),
    }
    for name, value in bounds.items():
        kind = getattr(resource, name, None)  # not every system has all of them
        if kind is not None and value is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    _hide()
    _forbid_calls()


# System calls without use to a program of a benchmark, with which it could get round the limits above (memory that no
# limit counts, namespaces of its own) or look at other processes: numbers on x86_64 and on aarch64.
_FORBIDDEN = {
    "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51), "fsopen": (430, 430), "io_uring_setup": (425, 425),
    "keyctl": (250, 219), "memfd_create": (319, 279), "mount": (165, 40), "mount_setattr": (442, 442),
    "move_mount": (429, 429), "open_tree": (428, 428), "perf_event_open": (298, 241), "pivot_root": (155, 41),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "request_key": (249, 218),
    "setns": (308, 268), "shmget": (29, 194), "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282),
}  # fmt: skip


def _forbid_calls() -> None:
    """A seccomp filter: the calls above fail with EPERM, as do clone with a new user namespace and sockets of families
    that a network namespace does not hold or that nobody needs (AF_VSOCK reaches the host of a virtual machine); clone3
    is not there."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if column is None or sys.platform != "linux":
        return
    import ctypes

    architecture, clone, socket = ((0xC000003E, 56, 41), (0xC00000B7, 220, 198))[column]
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    numbers = sorted(pair[column] for pair in _FORBIDDEN.values())
    # Each line: operation, jump if so, jump if not, operand. Offsets 4, 0 and 16 of the call's data are its
    # architecture, its number and the low half of its first argument.
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # the other numbering of x86_64
    lines += [(equal, 0, 1, 435), (answer, 0, 0, absent)]  # clone3 hides its flags; libraries then take clone
    for number in numbers:
        lines += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    lines += [(equal, 0, 6, socket), (load, 0, 0, 16), (equal, 3, 0, 1), (equal, 2, 0, 2), (equal, 1, 0, 10)]
    lines += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]  # AF_UNIX, AF_INET and AF_INET6 jump to the last
    lines += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, 0x10000000), (answer, 0, 0, refuse)]
    lines += [(answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = Program(len(lines), ctypes.addressof(code))
    call = ctypes.CDLL(None, use_errno=True).prctl
    call(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which an ordinary user may set no filter
    call(22, 2, ctypes.byref(program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER; kernels without it go on without


def _hide() -> None:
    """No process of the same user may read this one's memory or attach to it."""
    try:
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    except (ImportError, AttributeError, OSError):
        pass


# Plain data over a pipe. JSON with tags: nothing that is read can run code.


def encode(value: Any, keep: Any) -> Any:
    """The JSON form of `value`; keep(object) names an object without one."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < 1 << 53 else {"int": hex(number)}
    if isinstance(value, (str, float)):
        return (str if isinstance(value, str) else float)(value)
    if kind is list:
        return [encode(item, keep) for item in value]
    for tag, plain in (("tuple", tuple), ("set", set), ("frozenset", frozenset), ("list", list)):
        if isinstance(value, plain):
            return {tag: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    return {"object": keep(value)}


def decode(value: Any, find: Any) -> Any:
    """What `encode` was given; find(name) is the object of that name.

    Raises:
      Lost: no such form.
    """
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise Lost("a value that nobody knows")
    ((tag, content),) = value.items()
    if tag == "object":
        return find(content)
    if tag == "int":
        return int(content, 16)
    if tag in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(content)
    if tag == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if tag == "complex":
        return complex(*map(float, content))
    if tag == "range":
        return range(*map(int, content))
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset, "list": list}
    if tag not in kinds:
        raise Lost("a value that nobody knows")
    return kinds[tag](decode(item, find) for item in content)


def send(pipe: IO[bytes], message: Any) -> None:
    data = json.dumps(message).encode()
    if len(data) > LONGEST_MESSAGE:
        raise Lost("a value that is too large")
    pipe.write(struct.pack(">I", len(data)) + data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Raises Lost where the pipe ends or holds no message."""
    head = pipe.read(4)
    if len(head) < 4:
        raise Lost("ended before its tests were done")
    (length,) = struct.unpack(">I", head)
    if length > LONGEST_MESSAGE:
        raise Lost("a value that is too large")
    data = pipe.read(length)
    if len(data) < length:
        raise Lost("ended before its tests were done")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Lost("a message that is none") from error


def private_stdio() -> tuple[IO[bytes], IO[bytes]]:
    """(reader, writer) of what stdin and stdout were; both lead nowhere from now on."""
    reader, writer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return reader, writer


def _confined(limits: dict[str, Any]) -> None:
    """`confine`; stderr, where it would say why it fails, leads nowhere afterwards."""
    nowhere = os.open(os.devnull, os.O_RDWR)  # which the user that it becomes may not open
    confine(limits)
    os.dup2(nowhere, 2)
    os.close(nowhere)


# The candidate's side.


def candidate() -> None:
    """Loads the program and does what the judge asks until the pipe closes."""
    reader, writer = private_stdio()
    job = receive(reader)
    _confined(job["limits"])
    writer.write(STARTED)
    writer.flush()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = [module]

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def perform(operation: str, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        if operation == "load":
            exec(compile(arguments[0], "<program>", "exec"), module.__dict__)
            return {name: _kind(value) for name, value in module.__dict__.items() if not name.startswith("_")}
        if operation == "call":
            return target(*arguments, **named)
        if operation == "get":
            return getattr(target, *arguments)
        if operation == "set":
            return setattr(target, *arguments)
        if operation == "item":
            return target[arguments[0]]
        if operation == "put":
            target[arguments[0]] = arguments[1]
            return None
        return {"len": len, "iter": list, "bool": bool, "str": str}[operation](target)

    while True:
        try:
            operation, number, sent, sent_named = receive(reader)
        except Lost:
            return
        try:
            arguments = decode(sent, objects.__getitem__)
            named = {name: decode(value, objects.__getitem__) for name, value in sent_named.items()}
            result = perform(operation, objects[number], arguments, named)
            answer: dict[str, Any] = {"result": encode(result, keep)}
            for place, value in enumerate(arguments if operation == "call" else ()):
                if isinstance(value, (list, dict, set)) and (now := encode(value, keep)) != sent[place]:
                    answer.setdefault("changed", {})[place] = now
            send(writer, answer)
        except BaseException as error:  # whatever it is, SystemExit too, the judge has to hear of it
            send(writer, {"error": type(error).__name__, "message": _message(error)})


def _kind(value: Any) -> str:
    """Where the judge finds its own copy of `value`, or "": in the program alone."""
    name, home = getattr(value, "__name__", None), getattr(value, "__module__", None)
    if isinstance(value, types.ModuleType):
        return str(name)
    is_library = isinstance(name, str) and isinstance(home, str) and home.split(".")[0] in sys.stdlib_module_names
    return f"{home}:{name}" if is_library else ""


def _message(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except Exception:
        return ""


# The judge's side.


class Remote:
    """Something of the program's, in its own process."""

    def __init__(self, peer: Peer, number: int, name: str):
        object.__setattr__(self, "_remote", (peer, number, name))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # Python's own protocols stay on this side
        return _ask(self, "get", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", (name, value))

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "put", (key, value))

    def __len__(self) -> int:
        return int(_ask(self, "len"))

    def __iter__(self) -> Any:
        return iter(_ask(self, "iter"))

    def __bool__(self) -> bool:
        return _ask(self, "bool") is True

    def __str__(self) -> str:
        return str(_ask(self, "str"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and _place(self) == _place(other)

    def __hash__(self) -> int:
        return hash(_place(self)[1])

    def __repr__(self) -> str:
        return f"<{_place(self)[2]} of the program>"


def _place(remote: Remote) -> tuple[Peer, int, str]:
    return object.__getattribute__(remote, "_remote")


def _ask(remote: Remote, operation: str, arguments: tuple = (), named: dict | None = None) -> Any:
    peer, number, _ = _place(remote)
    return peer.ask(operation, number, arguments, named or {})


class NotStarted(Exception):
    """The program's process did not come to the program."""


class Failed(Exception):
    """The program raised what is no built-in exception."""

    of_program = ""


# Of the program's exceptions: two end a loop of the tests in silence, one cannot be made from a message alone.
_NOT_RAISED = (StopIteration, StopAsyncIteration, UnicodeDecodeError)


class Peer:
    """The program as the judge sees it."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes], call_s: float = 0.0):
        """call_s: wall time of each question, seconds; 0: without a limit of its own."""
        self._reader, self._writer, self._call_s = reader, writer, call_s
        self.lost: Lost | None = None  # kept, for tests may catch every exception

    def start(self, limits: dict[str, Any]) -> None:
        """Has the program's process confine itself.

        Raises:
          NotStarted: it ended before.
        """
        try:
            send(self._writer, {"limits": limits})
            said = self._reader.read(len(STARTED))
        except OSError as error:
            raise NotStarted(str(error)) from error
        if said != STARTED:
            raise NotStarted("the program's process ended before it was confined")

    def load(self, program: str) -> types.ModuleType:
        """Loads the program; what it defines are the attributes of the module `program`."""
        import importlib

        names = self.ask("load", 0, (program,), {})
        if not isinstance(names, dict):
            raise Lost("a list of names that is none")
        module, whole = types.ModuleType("program"), Remote(self, 0, "program")
        for name, kind in names.items():
            # A name of Python's own keeps its meaning in the tests, whatever the program made of it.
            if not isinstance(name, str) or not isinstance(kind, str) or hasattr(builtins, name):
                continue
            home, _, item = kind.partition(":")
            if not kind:
                setattr(module, name, _ask(whole, "get", (name,)))
            elif (item or home) == name and home.split(".")[0] in sys.stdlib_module_names - {"antigravity", "this"}:
                own = importlib.import_module(home)
                setattr(module, name, getattr(own, item) if item else own)
        return module

    def ask(self, operation: str, number: int, arguments: tuple, named: dict[str, Any]) -> Any:
        """What the program's process answers, or the exception that it raised."""
        try:
            with _limited(self._call_s):
                return self._ask(operation, number, arguments, named)
        except Lost as error:
            self.lost = self.lost or error
            raise

    def _ask(self, operation: str, number: int, arguments: tuple, named: dict[str, Any]) -> Any:
        sent = [encode(value, self._own) for value in arguments]
        sent_named = {name: encode(value, self._own) for name, value in named.items()}
        try:
            send(self._writer, [operation, number, sent, sent_named])
        except OSError as error:
            raise Lost("ended before its tests were done") from error
        answer = receive(self._reader)
        if not isinstance(answer, dict):
            raise Lost("an answer that is none")
        if "error" in answer:
            name, message = str(answer["error"])[:100], str(answer.get("message", ""))[:300]
            kind = getattr(builtins, name, None)
            is_plain = isinstance(kind, type) and issubclass(kind, Exception) and kind not in _NOT_RAISED
            raise _raised(kind if is_plain else Failed, name, message)
        try:
            for place, value in answer.get("changed", {}).items():
                _replace(arguments[int(place)], decode(value, self._find))
            return decode(answer.get("result"), self._find)
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise Lost("a value that cannot be read") from error

    def _own(self, value: Any) -> int:
        if isinstance(value, Remote):
            return _place(value)[1]
        raise TypeError(f"the tests hand over a {type(value).__name__}, which is no plain data")

    def _find(self, number: Any) -> Remote:
        if not isinstance(number, int):
            raise Lost("an object without a number")
        return Remote(self, number, "an object")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises Lost in what takes longer than `seconds` of wall time; 0: no limit. On the main thread only."""
    if not seconds:
        yield
        return
    import signal

    def late(*_: Any) -> None:
        raise Lost(f"timeout: more than {seconds:g} s in one call")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _raised(kind: Any, name: str, message: str) -> Exception:
    try:
        error = kind(message)
    except TypeError:  # UnicodeEncodeError wants five arguments
        error = Failed(message)
    vars(error)["of_program"] = name
    return error


def _replace(mine: Any, theirs: Any) -> None:
    if isinstance(mine, list) and isinstance(theirs, list):
        mine[:] = theirs
    elif isinstance(mine, (dict, set)) and type(mine) is type(theirs):
        mine.clear()
        mine.update(theirs)


def verdict(program: str, tests: str, peer: Peer) -> tuple[bool, str]:
    """Runs the tests against the program, whose process has started: (passed, reason)."""
    try:
        code = compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        return False, f"the tests are no Python: {error}"
    try:
        module = peer.load(program)
    except Lost as error:
        return False, f"the program: {error}"
    except BaseException as error:
        return False, f"the program does not load: {_named(error)}"
    sys.modules["program"] = module
    names = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    try:
        exec(code, names | {"__name__": "tests"})
    except Lost as error:
        return False, f"the program: {error}"
    except AssertionError as error:
        return False, f"failed: {_line(error, tests)}"
    except BaseException as error:
        return False, f"{_named(error)} at: {_line(error, tests)}"
    return (True, "passed") if peer.lost is None else (False, f"the program: {peer.lost}")


def _named(error: BaseException) -> str:
    name = getattr(error, "of_program", type(error).__name__)
    return f"{name}: {_message(error)}".rstrip(": ")[:300]


def _line(error: BaseException, tests: str) -> str:
    import traceback

    lines = tests.splitlines()
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    number = numbers[-1] if numbers else None
    return lines[number - 1].strip()[:300] if number and number <= len(lines) else "?"


def judge() -> None:
    """Job on stdin, verdict on what was stdout; the program is at the two pipes whose numbers the job has. STARTED goes
    before the verdict once both processes have."""
    reader, writer = private_stdio()
    job = receive(reader)
    with os.fdopen(job["from_program"], "rb") as answers, os.fdopen(job["to_program"], "wb") as questions:
        peer = Peer(answers, questions, job["call_s"])
        _confined(job["limits"])
        try:
            peer.start(job["program_limits"])
        except NotStarted:
            os._exit(1)  # whoever kept it from starting has said why
        writer.write(STARTED)
        writer.flush()
        passed, reason = verdict(job["program"], job["tests"], peer)
        send(writer, {"passed": passed, "reason": reason})
        os._exit(0)


# A program that reads stdin and writes stdout.


def program() -> None:
    """Runs the program that stands in the file of descriptor argv[3] as a script; argv[2]: its limits. STARTED goes
    before all that it prints."""
    limits, source = json.loads(sys.argv[2]), int(sys.argv[3])
    with os.fdopen(source, "rb") as file:
        text = file.read().decode()
    confine(limits)
    os.write(1, STARTED)
    sys.argv = ["program.py"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(text, "<program>", "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {_message(error)}")
        sys.stderr.flush()
        try:
            sys.stdout.flush()
        finally:
            os._exit(1)


# Judge and candidate behind a service that runs one file.


def service(source: str, job: dict[str, Any], token: str) -> None:
    """Spawns the candidate, runs the tests here, and prints one line that begins with `token`."""
    import subprocess

    with contextlib.suppress(OSError):
        os.remove(__file__)  # the token and the tests stand in it
    _hide()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", source, "candidate"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, start_new_session=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    out, sys.stdout = sys.stdout, io.StringIO()  # what the tests print is no verdict
    peer = Peer(child.stdout, child.stdin, job["call_s"])
    try:
        peer.start(job["limits"])
        passed, reason = verdict(job["program"], job["tests"], peer)
        found = {"passed": passed, "reason": reason}
    except NotStarted as error:
        found = {"failed": str(error)}
    child.kill()
    out.write("\n" + token + json.dumps(found) + "\n")
    out.flush()
    os._exit(0)


if __name__ == "__main__" and len(sys.argv) > 1:
    {"candidate": candidate, "judge": judge, "program": program}[sys.argv[1]]()
