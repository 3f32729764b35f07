"""Freed memory that a process keeps: the kernel is not asked for the same pages again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd_jax import heap

ROOT = Path(__file__).resolve().parents[1]
# A program with 64 MiB of temporaries, run again and again by threads of jax: page faults of its later runs. At first
# the heap grows: a run may begin before the last one's memory is free, and small pieces lie in what was freed.
FAULTS = """
import resource, statistics, sys
from omniopd_jax import heap
kept = heap.keep_freed_memory() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp
program = jax.jit(lambda x: jnp.outer(x, x) @ x)
faults = []
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(jnp.arange(2.0**12)))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, statistics.median(faults[30:]))
"""


def _run(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    clean |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", FAULTS, *arguments]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif("glibc" not in (getattr(os, "confstr", str)("CS_GNU_LIBC_VERSION") or ""), reason="another malloc")
def test_the_pages_of_a_program_are_asked_for_once():
    kept, faults = _run("keep")
    assert kept == "True"
    assert float(faults) < 1000 < float(_run("leave")[1])  # of 16,384 pages


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "tpu"},
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"},
        {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
    ],
)
def test_accelerators_and_who_has_settings_of_his_own_are_left_alone(environment, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("malloc was told something"))
    assert not heap.keep_freed_memory()


def test_where_jax_has_other_backends_it_is_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(heap.importlib.util, "find_spec", lambda name: name == "jax_plugins" or None)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("malloc was told something"))
    assert not heap.keep_freed_memory()
