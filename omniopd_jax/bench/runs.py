"""Whole training runs: a step beside a slow teacher, and the second start of a run beside its first."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.bench.checkpoint import word_tokenizer
from omniopd_jax.bench.programs import model_of, work
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.config import Config, from_mapping
from omniopd_jax.data import Tokenizer
from omniopd_jax.models import Model
from omniopd_jax.teacher.protocol import ContinuationRequest, ContinuationResult, Teacher
from omniopd_jax.teacher.scripted import scripted_teacher
from omniopd_jax.train import loop
from omniopd_jax.train.compilation import CompileCounter
from omniopd_jax.types import Message, Prompt

_WARM_UP = 3  # steps that may compile
_STEPS = 4  # steps measured in each of the two halves


class SlowTeacher:
    """Another teacher whose answers to a whole step take `step_s` seconds, in whatever parts it is asked."""

    def __init__(self, teacher: Teacher, requests_a_step: int):
        self.name = teacher.name
        self.step_s = 0.0
        self._teacher = teacher
        self._requests = requests_a_step
        self._busy = threading.Lock()  # parts of a step asked for side by side do not make it faster

    def probe(self) -> str:
        return self._teacher.probe()

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        with self._busy:
            time.sleep(self.step_s * len(requests) / self._requests)
        return self._teacher.continue_texts(requests)

    def close(self) -> None:
        self._teacher.close()


def step(spec: Spec) -> Work:
    """Steps with a teacher that takes as long as the devices do: the case in which overlap matters most.

    The devices' time is that of a batch in one part whose teacher answers at once, whatever parts are measured: smaller
    parts may keep the devices busy for longer. Says step_s, device_s, parts_s (the devices' time in parts) and
    `over_device`, step_s over device_s, which is the teacher's time too.
    """
    counter = CompileCounter()
    config, model, tokenizer = _parts(spec, steps=_WARM_UP + 2 * _STEPS)
    whole = dataclasses.replace(
        config,
        pipeline=dataclasses.replace(config.pipeline, micro_batches=1, rollouts=0),
        train=dataclasses.replace(config.train, steps=_WARM_UP + _STEPS),
    )
    asked = config.rollout.batch_size * config.audit.num_chunks

    def steps(config: Config, slow_s: float = 0.0) -> list[float]:
        """Seconds of each step after the warm-up; from the fifth of these on the teacher takes `slow_s`."""
        teacher = SlowTeacher(scripted_teacher("noise"), asked)
        times: list[float] = []

        def progress(number: int, metrics: Mapping[str, float]) -> None:
            times.append(metrics["time/step_s"])
            if number == _WARM_UP + _STEPS:
                teacher.step_s = slow_s

        with tempfile.TemporaryDirectory() as folder:
            loop.run(
                config, Path(folder), student=model, tokenizer=tokenizer, teacher=teacher, prompts=_prompts(config),
                progress=progress,
            )  # fmt: skip
        return times[_WARM_UP:]

    def run() -> dict[str, Any]:
        device_s = statistics.median(steps(whole))
        times = steps(config, device_s)
        slow_s = statistics.median(times[_STEPS:])
        seconds = {"wall_s": slow_s, "cpu_s": slow_s, "step_s": slow_s, "device_s": device_s}
        seconds |= {"parts_s": statistics.median(times[:_STEPS]), "over_device": slow_s / device_s}
        return seconds | {"tokens": config.rollout.batch_size}

    return work(run, counter)


def start(spec: Spec) -> Work:
    """Two steps of a run in a new process with a given compilation cache; its time is what jax spent on programs."""
    counter = CompileCounter()
    config, model, tokenizer = _parts(spec, steps=2)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loop.run(
            config,
            Path(folder),
            student=model,
            tokenizer=tokenizer,
            teacher=scripted_teacher("noise"),
            prompts=_prompts(config),
        )
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = sum(json.loads(line).get("compile/seconds", 0.0) for line in lines)
    programs, _ = counter.take()
    said = {"wall_s": seconds, "cpu_s": seconds, "tokens": 1, "compile_s": seconds, "programs": programs}
    return work(lambda: said, counter, {"start_s": time.perf_counter() - began})


def _parts(spec: Spec, *, steps: int) -> tuple[Config, Model, Tokenizer]:
    values = dict(spec["config"])
    values["train"] = dict(values["train"], steps=steps)
    model = model_of(spec)
    return from_mapping(values), model, Tokenizer(word_tokenizer(model.config.vocab_size))


def _prompts(config: Config) -> list[Prompt]:
    return [
        Prompt(str(i), (Message("user", " ".join(f"w{10 + (7 * i + j) % 100}" for j in range(12))),), is_raw=True)
        for i in range(4 * config.rollout.batch_size)
    ]
