"""Pages of 2 MiB for what malloc hands out.

XLA's CPU backend asks malloc for a program's temporaries at every call, and malloc the kernel: of an update of 42 M
parameters an eighth of the time went into page faults, one for every 4 KiB (docs/benchmarks.md). Where the kernel gives
huge pages to who asks for them ("madvise"), glibc asks if a tunable says so, but it reads that once, when a process
starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SINCE = (2, 35)  # the glibc that has it


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the `given` environment of a new process needs for huge pages.

    Empty where it would change nothing: no Linux, an older or another C library, a kernel that gives huge pages to all
    or to none, or an environment that says already what it wants (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` is no).
    """
    said = given.get(_VARIABLE, "")
    if _TUNABLE in said or not _is_of_use():
        return {}
    return {_VARIABLE: ":".join(filter(None, (said, f"{_TUNABLE}=1")))}


def restart() -> None:
    """Called by a package whose module is being started by `python -m`: starts the command again with huge pages.

    The process stays the same one, with the same arguments; nothing was imported yet. Does nothing where
    `environment` is empty, and nothing in a program that merely imports the package.
    """
    if sys.argv[0] == "-m" and (more := environment()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)


def _is_of_use() -> bool:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        is_on_demand = "[madvise]" in _SETTING.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # Windows and macOS, no such kernel, another C library
        return False
    return name == "glibc" and is_on_demand and tuple(map(int, version.split(".")[:2])) >= _SINCE
