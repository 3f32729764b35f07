"""What the documents tell users to type exists: commands, flags, config knobs, make targets, files."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs import base
from omniopd_jax.config import _CHOICES
from omniopd_jax.train.metrics import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*DOCUMENTS, *sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "experiments").glob("*.py"))]

# Parses the flags of commands without running them, each in a fork: what they would do is tested in end_to_end_test.py.
PARSE = """
import importlib, json, os, sys, traceback
from experiments import command
from omniopd_jax.config import from_mapping
from absl import flags
failed = {}
for line in json.load(sys.stdin):
    reader, writer = os.pipe()
    if not os.fork():
        said = ""
        try:
            sys.argv = line  # where ml_collections looks for overrides
            importlib.import_module(line[0])
            flags.FLAGS(line)
            if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
                from_mapping(flags.FLAGS["config"].value)
        except BaseException:
            said = traceback.format_exc()[-1500:]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.wait()
    if said:
        failed[" ".join(line)] = said
print(json.dumps(failed))
"""


def _commands(pattern: str = r"python -m (experiments\.\w+[^`\n|#]*)") -> list[str]:
    found = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for match in re.finditer(pattern, text):
            line = re.sub(r"\s+", " ", match[1]).strip()
            if "…" not in line and "[" not in line and "NAME" not in line:
                found.add(line)
    return sorted(found)


def test_every_command_parses():
    lines = [shlex.split(line) for line in _commands()]
    assert len(lines) > 15
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(lines), cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n\n".join(f"{line}\n{said}" for line, said in failed.items())


def test_other_modules_to_be_run_exist():
    for module in _commands(r"python -m ((?:tests|configs|omniopd_jax)[\w.]*)"):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_settings_that_the_documents_name_exist():
    knobs = base.get_config().to_dict()
    for path in DOCUMENTS:
        for words in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            for section, knob, value in re.findall(r"(?<![\w./-])(?:config\.)?(\w+)\.(\w+)(=\"?[\w^.-]+)?", words):
                if section not in knobs or knob in ("py", "md", "json", "jsonl", "sqlite"):
                    continue
                assert knob in knobs[section], f"{path.name}: {section}.{knob} is no setting"
                choices = _CHOICES.get(f"{section}.{knob}")
                if value and choices:
                    assert value.strip('="') in choices, f"{path.name}: {section}.{knob}{value}"


def test_metrics_that_the_documents_name_exist():
    known = set(REGISTRY) | set(re.findall(r"^\| `(\w+/\w+)` ", (ROOT / "docs/metrics.md").read_text("utf-8"), re.M))
    families = {name.partition("/")[0] for name in known} - {"eval"}
    for path in DOCUMENTS:
        for name in re.findall(r"`(\w+/\w+)`", path.read_text(encoding="utf-8")):
            assert name in known or name.partition("/")[0] not in families, f"{path.name}: {name} is no metric"


def test_extras_that_the_documents_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        for names in re.findall(r"omniopd_jax\[([\w,]+)\]", path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras), f"{path.name}: {names}"


def test_messages_that_the_faq_quotes_are_said():
    """Alarms by their titles, errors by their words; … stands for what differs from case to case."""
    faq = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    said = "\n".join(_strings(path) for room in ("omniopd_jax", "experiments") for path in (ROOT / room).rglob("*.py"))
    quoted = [
        title for titles in re.findall(r"Alarms? (\*[^.;]+\*)", faq) for title in re.findall(r"\*(.+?)\*", titles)
    ]
    quoted += re.findall(r"^\| `([^`]+)`", faq, re.M)
    assert len(quoted) > 12
    for message in quoted:
        for part in message.split("…"):
            assert part.strip(" `") in said, f"docs/faq.md quotes {message!r}, which nothing says"


def _strings(path: Path) -> str:
    """Every text of a module, pieces of f-strings joined by a space."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_the_documents_are_read_in_one_order_and_none_is_left_out():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\((\w+\.md)\)", index)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not pages - set(linked), f"docs/README.md should link {sorted(pages - set(linked))}"
    order = ["quickstart", "method", "arms", "teachers", "models", "scale", "evaluation"]
    order += ["comparison", "results", "alignment", "benchmarks", "metrics", "faq"]
    assert [name for name in linked if name != "paper_map.md"] == [f"{n}.md" for n in order if f"{n}.md" in linked]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_of_links_are_headings(path):
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        target = path.parent / name if name else path
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{path.name} links to {name}#{anchor}"


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
