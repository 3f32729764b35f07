"""What a terminal and a log file show while a command works."""

import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs import tiny
from experiments.screen import RunWatch, Screen, duration, pace_line, teacher_line
from omniopd_jax.config import from_mapping
from omniopd_jax.teacher.protocol import Activity, Usage
from omniopd_jax.train.progress import Watch

ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class ApiTeacher:
    activity = Activity(wanted=640, arrived=312, in_flight=32, failed=3, spent=Usage(calls=900, dollars=0.125))


def _watched(stream, *, every_s=0.05, steps=3, **options):
    screen = Screen(stream, every_s=every_s, **options)
    config = from_mapping(tiny.get_config())
    with screen:
        watch = RunWatch(screen, "distil", config)
        assert isinstance(watch, Watch)
        watch.begin(ApiTeacher(), 0)
        for step in range(1, steps + 1):
            watch.phase("audit", True)
            time.sleep(0.3)
            watch.phase("audit", False)
            watch(step, {"rollout/tokens": 20.0, "time/sample_s": 0.5, "time/step_s": 1.0, "teacher/total_tokens": 9.0})


def test_a_log_file_gets_plain_lines_every_few_seconds_and_no_cursor_codes():
    log = io.StringIO()
    _watched(log, is_first=True)
    lines = log.getvalue().splitlines()
    assert 4 <= len(lines) <= 30
    assert not re.search(r"[\x00-\x1f]", "".join(lines))
    assert lines[-1].startswith("distil                3 of 8 (37 %) · ")
    during = next(line for line in lines if "step 2: audit" in line)
    assert "1 of 8 (12 %)" in during
    assert "teacher 312 of 640 continuations, 32 in flight, 3 failed, 900 calls, $0.12" in during
    assert "last step 1.0 s · sample 0.5 · student 320 tokens/s" in during  # 8 responses of 20 tokens in half a second


def test_a_slow_log_gets_few_lines():
    log = io.StringIO()
    _watched(log, every_s=60.0, is_first=True)
    assert len(log.getvalue().splitlines()) == 1  # where it ended


def test_a_terminal_is_redrawn_and_keeps_one_line_of_each_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    _watched(terminal, is_first=True)
    shown = terminal.getvalue()
    assert "\x1b[2K" in shown  # lines are erased and drawn again
    assert "in flight" in shown
    left = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.rsplit("distil  ", 1)[-1])
    assert "3 of 8 (37 %)" in left


def test_a_screen_that_is_being_drawn_can_be_written_to(monkeypatch):
    """rich draws under a lock of its own, which a thread that holds the screen's waits for when it prints."""
    monkeypatch.setenv("TERM", "xterm")
    with Screen(Terminal(), is_first=True) as screen:
        screen("distil", 1, 8)
        drawing = threading.Thread(target=screen._live.refresh, daemon=True)
        with screen._lock:
            drawing.start()
            drawing.join(5)
            is_waiting = drawing.is_alive()
        drawing.join()
    assert not is_waiting, "the drawing thread waits for the one that may wait for it"


def test_other_processes_show_nothing():
    log = io.StringIO()
    _watched(log, is_first=False, steps=1)
    assert log.getvalue() == ""


def test_a_new_name_starts_a_new_bar_and_the_old_one_stays():
    log = io.StringIO()
    with Screen(log, is_first=True) as bar:
        for done in range(1, 4):
            bar("train the teacher", done, 3)
        bar("evaluate", 5, 10)
    first, second = log.getvalue().splitlines()
    assert first.startswith("train the teacher     3 of 3 (100 %)")
    assert second.startswith("evaluate              5 of 10 (50 %)")
    assert threading.active_count() < 20


def test_the_time_left_does_not_count_the_step_that_compiles():
    log = io.StringIO()
    with Screen(log, is_first=True) as bar:
        bar("distil", 0, 100)
        bar._bar.marks.clear()
        for now, done in ((0.0, 0), (60.0, 1), (61.0, 2), (62.0, 3), (63.0, 4)):
            bar._bar.marks.append((now, done))
        bar._bar.done = 4
        assert bar._bar.left_s() == pytest.approx(96.0)


def test_texts():
    assert [duration(seconds) for seconds in (8.4, 65, 7383)] == ["8 s", "1:05 min", "2:03 h"]
    spent = Activity(spent=Usage(calls=7, dollars=1.5), wanted=40, arrived=20)
    assert teacher_line(spent, 20.0, 4.0) == (
        "teacher 20 of 40 continuations (5.0/s), 0 in flight, 0 failed, 7 calls, $1.50 of $20.00"
    )
    metrics = {
        "time/step_s": 4.0, "time/sample_s": 1.0, "time/audit_s": 2.0, "rollout/tokens": 50.0,
        "teacher/completion_tokens": 800.0, "teacher/calls": 60.0, "teacher/dollars": 0.01,
    }  # fmt: skip
    assert pace_line(metrics, 8) == (
        "last step 4.0 s · sample 1.0 · audit 2.0 · student 400 tokens/s · teacher 400 tokens/s · 30.0 calls/s"
    )


# Everything that a command prints beside its result, in a process as users start it.
QUIET = """
import logging
from experiments import command
def main():
    import jax.numpy as jnp, orbax.checkpoint, transformers, openai, anthropic
    from absl import logging as absl_logging
    from omniopd_jax.quiet import tensorflow
    tensorflow()
    print(jnp.ones(2).sum())
    absl_logging.info("chatter")
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("orbax").info("chatter")
    logging.getLogger("omniopd_jax.x").info("said by us")
command.run(main)
"""


@pytest.mark.slow
def test_libraries_are_quiet():
    for name in ("openai", "anthropic", "tensorflow"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "2.0\n"
    assert done.stderr == "said by us\n"
    assert logging.getLogger("omniopd_jax").handlers == []  # the library itself configures nothing
