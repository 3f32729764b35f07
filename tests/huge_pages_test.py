"""A command of a package that asks for huge pages is started again once, as the same process, or left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd_jax import huge_pages

ROOT = Path(__file__).resolve().parents[1]
SHOW = "import os, sys; print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.utf8_mode)"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Says what the kernel is set to; the C library is one that can."""
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return lambda text: (tmp_path / "enabled").write_text(text)


def test_a_kernel_that_gives_huge_pages_on_demand_is_asked(kernel, monkeypatch):
    kernel("always [madvise] never\n")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert huge_pages.environment() == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("setting", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_other_kernels_are_left_alone(kernel, setting):
    if setting:
        kernel(setting)
    assert huge_pages.environment() == {}


@pytest.mark.parametrize("version", ["glibc 2.31", "musl 1.2", None])
def test_other_libraries_are_left_alone(kernel, monkeypatch, version):
    kernel("always [madvise] never\n")
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert huge_pages.environment() == {}


def test_who_has_said_what_he_wants_is_heard(kernel, monkeypatch):
    kernel("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert huge_pages.environment() == {}


def test_a_command_is_the_same_process_with_the_same_arguments(tmp_path):
    package = tmp_path / "commands"
    package.mkdir()
    (package / "__init__.py").write_text("from omniopd_jax import huge_pages\n\nhuge_pages.restart()\n")
    (package / "show.py").write_text(SHOW)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    command = [sys.executable, "-X", "utf8", "-m", "commands.show", "--flag", "two words"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        said = process.communicate()[0].strip()
    expected = huge_pages.environment().get("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES"))
    assert said == f"{process.pid} {expected} ['--flag', 'two words'] 1"
    imported = subprocess.run(
        [sys.executable, "-c", "import commands.show"], env=environment, capture_output=True, text=True, check=True
    )
    assert imported.stdout.split()[1] == "None"  # who imports the package is not started again
