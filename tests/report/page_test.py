"""The file: self-contained, whole, and no place for anyone else's script."""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from omniopd_jax import report
from tests.report import synthetic


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = synthetic.write_run(tmp_path_factory.mktemp("hostile"), steps=12, responses=2, hostile=True)
    return report.write_report(folder).read_text(encoding="utf-8")


def scripts(page):
    return re.findall(r"<script([^>]*)>(.*?)</script>", page, re.S)


def test_only_our_own_scripts_and_style_may_run(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    assert policy.startswith("default-src 'none'")
    running = [text for attributes, text in scripts(page) if "type=" not in attributes]
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert (len(running), len(styles)) == (2, 1)
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in running + styles
    }
    assert set(re.findall(r"'sha256-[^']*'", policy)) == digests


def test_nothing_is_fetched(page):
    outside = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    assert re.findall(r"(?:src|href)=\"(.*?)\"", outside) == ["data:,", "#content"]
    assert "@import" not in page
    assert "url(" not in page


def test_no_text_of_the_model_stands_in_the_markup(page):
    for attributes, text in scripts(page):
        if "application/json" in attributes:
            assert not set("<>&") & set(text)
            json.loads(text)
        elif "text/plain" in attributes:
            assert re.fullmatch(r"[A-Za-z0-9+/=]*", text)
    assert page.count("<script") == page.count("</script>") == len(scripts(page))
    assert "alert(1)" not in page.replace("alert(1)\\u003c", "")


def test_a_hostile_name_of_the_folder_is_escaped(tmp_path):
    folder = synthetic.write_run(tmp_path / "<img src=x onerror=alert(1)>", steps=2, responses=1)
    assert "<img" not in report.write_report(folder).read_text(encoding="utf-8")


def test_placeholders_in_the_data_are_not_filled(tmp_path):
    folder = synthetic.write_run(tmp_path / "{{script}}", steps=2, responses=1)
    assert report.write_report(folder).read_text(encoding="utf-8").count("{{script}}") == 3  # title, name, kicker


def test_the_page_can_be_written_while_the_run_writes(tmp_path):
    folder = synthetic.write_run(tmp_path, steps=6, responses=1)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            with (folder / "metrics.jsonl").open("ab") as file:
                file.write(lines[-1][:20])
                file.flush()
                file.write(lines[-1][20:])
            time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            assert report.write_report(folder).stat().st_size > 50_000
    finally:
        stop.set()
        writer.join()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "names", [["metrics.jsonl"], ["config.json"], ["audits.jsonl"], ["rollouts.jsonl"], ["result.json"]]
)
def test_any_one_file_makes_a_page(tmp_path, names):
    whole = synthetic.write_run(tmp_path / "whole", steps=3, responses=1)
    part = tmp_path / "part"
    part.mkdir()
    for name in names:
        (part / name).write_bytes((whole / name).read_bytes())
    assert report.write_report(part, part / "page.html").is_file()


def test_a_run_without_a_finished_step_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {"steps": 5}}')
    assert "No step has been finished yet" in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_reports_need_no_jax():
    code = "import sys, omniopd_jax.report; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_the_library_brings_its_licence():
    assets = Path(report.__file__).parent / "assets"
    assert "MIT" in (assets / "uplot.LICENSE").read_text()


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ("sft", "The arm sft audits no chunks: it learns from the teacher's whole answers."),
        ("grpo", "These are the student's responses."),
        ("verify", "No chunk was audited: responses are shorter than audit.chunk_tokens"),
    ],
)
def test_a_run_without_audits_says_why(tmp_path, arm, says):
    folder = synthetic.write_run(tmp_path / arm, steps=2, responses=2, arm=arm)
    (folder / "audits.jsonl").unlink()
    if arm == "sft":
        (folder / "rollouts.jsonl").unlink()
    page = report.write_report(folder).read_text(encoding="utf-8")
    head = json.loads(next(text for attributes, text in scripts(page) if 'id="head"' in attributes))
    assert says in head["audits"]["none"]
    assert head["audits"]["chunks"] == 0
