"""One run of a study: distils a student in its own work directory and writes down what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from omniopd_jax import models
from omniopd_jax.config import Config
from omniopd_jax.data import load_tokenizer
from omniopd_jax.study import design
from omniopd_jax.study.design import Run, Study
from omniopd_jax.study.measure import measure
from omniopd_jax.train import loop
from omniopd_jax.train.evaluation import Evaluator, make_evaluator
from omniopd_jax.train.small_world import build_world
from omniopd_jax.train.stops import NotFinite

MEASURED = "measured.json"  # written last: its presence says that a run is finished


def do_world(common: Mapping[str, Any], study: Study, seed: int, folder: Path) -> None:
    """Builds the world of a seed and measures its student, before any distillation, and its teacher."""
    world = design.world_path(folder, seed)
    config = design.run_config(common, study, Run(study.arms[0].name, 1e-4, seed), folder)
    build_world(config.world, world)
    found = {}
    for name in ("student", "teacher"):
        model, tokenizer = models.load_model(world / name, dtype=jnp.float32), load_tokenizer(world / name)
        found[name] = measure(config, world, model, tokenizer, kl_problems=study.kl_problems)
    _write(world / MEASURED, found)


def do_run(common: Mapping[str, Any], study: Study, run: Run, folder: Path) -> None:
    """Does one run and measures it. A run whose numbers overflow is a result too: the search passes it by."""
    workdir = folder / run.path
    config = design.run_config(common, study, run, folder)
    clock = _UpdateClock(config, load_tokenizer(design.world_path(folder, run.seed) / "student"))
    try:
        done = loop.run(config, workdir, evaluator=clock.evaluator, progress=clock.step_done)
    except NotFinite as error:
        _write(workdir / MEASURED, dict(failed=str(error)))
        return
    world = design.world_path(folder, run.seed)
    found = measure(config, world, done.model, load_tokenizer(world / "student"), kl_problems=study.kl_problems)
    _write(
        workdir / MEASURED,
        found
        | dict(
            failed="",
            updates=done.updates,
            teacher_tokens=done.teacher.completion_tokens,
            teacher_tokens_read=done.teacher.prompt_tokens,
            seconds_an_update=clock.seconds_an_update,
            cpu_seconds_an_update=clock.cpu_seconds_an_update,
        ),
    )


class _UpdateClock:
    """Seconds of an update, by the wall and of this process's CPUs: medians, so that compilation does not count.

    Evaluations are taken out. On a machine that is shared, CPU seconds are what can be compared.
    """

    def __init__(self, config: Config, tokenizer: Any):
        self._evaluate: Evaluator = make_evaluator(config, tokenizer)
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._last = (time.perf_counter(), time.process_time())

    def evaluator(self, model: models.Model) -> dict[str, float]:
        before = (time.perf_counter(), time.process_time())
        found = self._evaluate(model)
        after = (time.perf_counter(), time.process_time())
        self._last = (self._last[0] + after[0] - before[0], self._last[1] + after[1] - before[1])
        return found

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        now = (time.perf_counter(), time.process_time())
        self._wall.append(now[0] - self._last[0])
        self._cpu.append(now[1] - self._last[1])
        self._last = now

    @property
    def seconds_an_update(self) -> float | None:
        return float(np.median(self._wall)) if self._wall else None

    @property
    def cpu_seconds_an_update(self) -> float | None:
        return float(np.median(self._cpu)) if self._cpu else None


def read_measured(path: Path) -> dict[str, Any] | None:
    """What was measured in a run's or a world's folder; None while it is not finished."""
    file = path / MEASURED
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values) + "\n", encoding="utf-8")
    part.replace(path)  # all or nothing: a study goes on from what is complete
