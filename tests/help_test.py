"""--help says everything that can be set, in the words of the documents."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import base
from experiments.help import _TERMS, setting_lines

ROOT = Path(__file__).resolve().parents[1]


def test_every_setting_is_listed_with_its_default():
    lines = setting_lines()
    named = [line.strip().partition("=")[0] for line in lines]
    knobs = [f"{section}.{knob}" for section, values in base.get_config().to_dict().items() for knob in values]
    assert sorted(named) == sorted(knobs)
    assert "  audit.num_chunks=10  M [P]" in lines


@pytest.mark.parametrize("word", [word for word, _ in _TERMS])
def test_its_words_are_those_of_the_documents(word):
    assert word in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


def test_help_needs_no_config():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for part in ("Distils a student", "--workdir", "--config", "Words", "teacher.max_dollars=0.0", "Exit codes"):
        assert part in done.stdout
    assert done.stderr == ""
