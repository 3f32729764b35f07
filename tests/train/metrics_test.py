"""What a run appends to its files, and what a resumed run finds there."""

import json
import math

import numpy as np
import pytest

from omniopd_jax.train.metrics import REGISTRY, JsonLines, RunLog, meaning, read_lines
from omniopd_jax.types import InputError


def steps_in(path):
    return [line["step"] for line in read_lines(path)]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, after_step=0)
    for step in range(1, 6):
        log.write([{"step": step, "loss/total": step / 2}])
    log.close()
    log = JsonLines(path, after_step=3)
    assert steps_in(path) == [1, 2, 3]
    log.write([{"step": 4, "loss/total": 0.0}])
    assert steps_in(path) == [1, 2, 3, 4]
    log.close()


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "audits.jsonl"
    path.write_text('{"step": 1}\n{"step": 1, "chunk": "a\u2028b"}\n{"step": 2, "chu', encoding="utf-8")
    JsonLines(path, after_step=2).close()
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 1, "chunk": "a\u2028b"}\n'
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but nobody knows whether more was to come
    JsonLines(path, after_step=2).close()
    assert steps_in(path) == [1]


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is not a JSON object with a step"):
        JsonLines(path, after_step=3)


def test_numbers_are_written_as_json_knows_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, after_step=0)
    log.write([{"step": np.int64(1), "a": np.float32(0.5), "b": math.nan, "c": np.array([1.0, math.inf]), "d": "ü␃"}])
    log.close()
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "a": 0.5, "b": None, "c": [1.0, None], "d": "ü␃"}
    assert "NaN" not in text
    assert "ü" in text


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    log = RunLog(tmp_path, after_step=0, tensorboard=True)
    log.write({"step": 1, "loss/total": 0.25})
    log.close()
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert b"loss/total" in events


def test_every_registered_metric_says_its_unit_and_meaning():
    for name, found in REGISTRY.items():
        assert found.unit, name
        assert found.text, name
    assert meaning("eval/greedy_accuracy") is REGISTRY["eval/*"]
    assert meaning("loss/nothing") is None
