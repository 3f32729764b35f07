"""What a run appends to its files, and what a resumed run finds there."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from omniopd_jax.config import ConfigError
from omniopd_jax.train.metrics import REGISTRY, JsonLines, RunLog, meaning
from omniopd_jax.types import InputError
from tests.train.conftest import read_lines


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


def _run(workdir: Path, after_step: int, steps: range, loss: float, **where) -> None:
    log = RunLog(workdir, after_step=after_step, **where)
    for step in steps:
        log.write({"step": step, "loss/total": loss, "eval/greedy_accuracy": None})
    log.close()


def test_tensorboard_events_hold_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("omniopd_jax.train.metrics._clu_writer", lambda *_: None)
    _run(tmp_path, -1, range(1, 3), 0.25, tensorboard=True)
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"loss/total") == 2


@pytest.mark.slow
@pytest.mark.parametrize("library", ["clu", "tensorboardX"])
def test_tensorboard_shows_the_same_numbers_and_no_step_twice(tmp_path, monkeypatch, capfd, library):
    """A run that had gone three steps beyond its checkpoint and was resumed, read by TensorBoard itself."""
    needed = [library, "tensorboard"] + (["tensorflow"] if library == "clu" else [])
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    if library != "clu":
        monkeypatch.setattr("omniopd_jax.train.metrics._clu_writer", lambda *_: None)
    _run(tmp_path, -1, range(1, 6), 0.25, tensorboard=True)
    time.sleep(1.1)  # event files are named by the second
    _run(tmp_path, 2, range(3, 7), 0.5, tensorboard=True)
    assert "oneDNN" not in capfd.readouterr().err  # TensorFlow is quiet
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("loss/total")
    shown = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events]
    assert shown == [(1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5), (5, 0.5), (6, 0.5)]


def test_a_page_at_weights_and_biases_goes_on_where_it_was(tmp_path, monkeypatch):
    """Against a stand-in with wandb's names: id and project, no step sent twice, the key in no file."""
    calls, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    class Error(Exception):
        pass

    stand_in = SimpleNamespace(init=init, Settings=dict, Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written")
    _run(tmp_path, -1, range(1, 4), 0.25, wandb="team/project", settings={"train": {"seed": 0}})
    _run(tmp_path, 1, range(2, 6), 0.5, wandb="team/project", settings={"train": {"seed": 0}})
    first, end, second, _ = calls
    assert end == "finish"
    assert (first["entity"], first["project"], first["config"]) == ("team", "project", {"train": {"seed": 0}})
    assert first["id"] == second["id"]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    assert logged[0][1] == {"loss/total": 0.25}
    assert not any(b"not-to-be-written" in file.read_bytes() for file in tmp_path.iterdir())

    def refuse(**_):
        raise Error("api_key not configured (no-tty).")

    stand_in.init = refuse
    with pytest.raises(ConfigError, match=r"config\.logging\.wandb='p': api_key not .* WANDB_API_KEY"):
        RunLog(tmp_path, after_step=0, wandb="p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        RunLog(tmp_path, after_step=0, wandb="p")


@pytest.mark.slow
def test_wandb_itself_takes_the_numbers_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _run(tmp_path, -1, range(1, 4), 0.25, wandb="project", settings={"train": {"seed": 0}})
    written = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == 1
    deadline = time.monotonic() + 30  # wandb's own process writes the file
    while b"loss/total" not in written[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"loss/total" in written[0].read_bytes()


def test_every_registered_metric_says_its_unit_and_meaning():
    for name, found in REGISTRY.items():
        assert found.unit, name
        assert found.text, name
    assert meaning("eval/greedy_accuracy") is REGISTRY["eval/*"]
    assert meaning("loss/nothing") is None
