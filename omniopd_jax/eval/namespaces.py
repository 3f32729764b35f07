"""Starts one command in Linux namespaces of its own, for machines without bubblewrap.

    python -I -S namespaces.py SPEC COMMAND…        SPEC: JSON, see `main`

The command sees a file system of its own: what SPEC binds, read-only, and an empty /tmp of bounded size, the only place
that it can write to. It has no network but its own loopback (which is down), no processes but its own, no privileges.
As an ordinary user this takes a user namespace; root gives its privileges up instead. When this process is killed, so
is the command with everything that it started.

Standard library alone, and no import of the package: it runs as a script.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import select
import signal
import sys

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _PRIVATE_ALL = 1, 2, 4, 32, 4096, (1 << 18) | (1 << 14)
_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {errno.errorcode.get(number, number)}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _checked(
        _LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {target}",
    )


def _bind(source: str, root: str) -> None:
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, "", _BIND)
    if not source.startswith("/dev/"):
        kept = os.statvfs(target).f_flag & (_NOSUID | _NODEV | 8)  # what the mount has is locked; 8: noexec
        _mount("", target, "", _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | kept)


def _build(spec: dict) -> None:
    root = spec["root"]
    _mount("none", "/", "", _PRIVATE_ALL)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    os.makedirs(root + "/tmp")  # before the rest, for Python may lie in it
    _mount("tmpfs", root + "/tmp", "tmpfs", _NOSUID | _NODEV, f"size={spec['tmp_bytes']},mode=1777")
    for path in [*spec["bind"], "/dev/null", "/dev/zero", "/dev/urandom"]:
        _bind(path, root)
    for path, target in spec["links"]:
        os.symlink(target, root + path)
    os.chdir(root)
    _checked(_LIBC.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", _DETACH), "umount")
    os.chdir("/tmp")
    _mount("", "/", "", _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)


def main(argv: list[str]) -> int:
    """argv: a JSON object with `owner` (the process that this one dies with), `root` (an empty folder to mount on),
    `bind` (paths), `links` (path, target), `tmp_bytes`, `uid` (0: the caller's own); then the command."""
    spec, command = json.loads(argv[0]), argv[1:]
    uid, gid, is_root = os.getuid(), os.getgid(), os.geteuid() == 0
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != spec["owner"]:
        return 125  # it died before the line above
    flags = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (0 if is_root else _NEWUSER)
    _checked(_LIBC.unshare(flags), "unshare")
    if not is_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    is_alive, held = os.pipe()  # its end is closed when this process dies
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    try:
        _build(spec)
        if spec["uid"]:
            os.setgroups([])
            os.setresgid(spec["uid"], spec["uid"], spec["uid"])
            os.setresuid(spec["uid"], spec["uid"], spec["uid"])
        # After the change of user, which would clear it. The exec below drops what a user namespace gave.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.close(held)
        if select.select([is_alive], [], [], 0)[0]:
            os._exit(125)
        os.execve(command[0], command, {})
    except OSError as error:
        print(f"namespaces: {error}", file=sys.stderr, flush=True)
        os._exit(125)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
