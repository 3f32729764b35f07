"""What the documents tell users to type exists: commands, flags, config knobs, make targets, files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*DOCUMENTS, *sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "experiments").glob("*.py"))]

# Parses a command's flags without running it: what it would do is tested in end_to_end_test.py.
PARSE = """
import importlib, sys
from absl import flags
importlib.import_module(sys.argv[1])
flags.FLAGS([sys.argv[1], *sys.argv[2:]])
if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
    from omniopd_jax.config import from_mapping
    from_mapping(flags.FLAGS["config"].value)
"""


def _commands() -> list[str]:
    found = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for match in re.finditer(r"python -m (experiments\.\w+[^`\n|#]*)", text):
            line = re.sub(r"\s+", " ", match[1]).strip()
            if "…" not in line and "[" not in line and "NAME" not in line:
                found.add(line)
    return sorted(found)


def test_there_are_commands():
    assert len(_commands()) > 5


@pytest.mark.parametrize("line", _commands())
def test_commands_parse(line):
    module, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for target in re.findall(r"`(?:[A-Z]+=\S+ )?make ([a-z-]+)", path.read_text(encoding="utf-8")):
        assert target in targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(path):
    assert not re.findall(r"@[A-Z]+@", path.read_text(encoding="utf-8"))


def test_the_first_command_stands_on_the_first_screen():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any("make quickstart" in line for line in lines[:15])
