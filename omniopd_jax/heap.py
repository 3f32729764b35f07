"""The C library's heap: what a process has freed stays with it.

XLA's CPU backend asks malloc for a program's temporaries at every call, and glibc gets them from the kernel and gives
them back each time, which zeroes every page anew: a tenth of an update of 42 M parameters (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # <malloc.h>
_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which a user settles the same
_ACCELERATORS = ("libtpu", "jax_plugins")  # modules that come with jax's other backends


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed for what is asked for next. For a main, before jax has made its devices.

    A process then holds what it held at its peak: one that trains needs it again at the next step. During its first
    calls the heap grows beyond that, where a small piece lies in what was freed: the peak of the fast quickstart by 3 %
    (jax 0.10) and 8 % (0.12). All threads share one heap, because from heaps of their own glibc takes large pieces to
    the kernel whatever it is told. Nothing is done where jax may find an accelerator, whose host has little to compute,
    where the C library is not glibc, and where the environment has settings for malloc (`GLIBC_TUNABLES`, `MALLOC_…`).

    Returns:
      Whether it is so now.
    """
    if not _is_cpu_alone() or any(name.startswith(_SETTINGS) for name in os.environ):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows
        return False
    return all([set_option(_ARENA_MAX, 1), set_option(_MMAP_MAX, 0), set_option(_TRIM_THRESHOLD, -1)])  # -1: never


def _is_cpu_alone() -> bool:
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" if asked else not any(map(importlib.util.find_spec, _ACCELERATORS))
