"""What the overlap of sampling with a teacher's delay is worth: the time of a step against what it cannot be less than.

    python -m experiments.overlap

A student of random weights, and a teacher that takes its time and nothing else: as long as the student's own work, half
and twice that. Once it answers whatever it is asked after a fixed delay (an API), once at a fixed pace (a busy server).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omniopd_jax import models
from omniopd_jax.config import Config, from_mapping
from omniopd_jax.data import load_tokenizer
from omniopd_jax.teacher.protocol import Continuation, ContinuationRequest, ContinuationResult
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.train import loop, small_world
from omniopd_jax.worlds import arithmetic

WARM_UP = 2  # steps that compile
_TEXT = "3 plus 4 makes 7"


class DelayedTeacher(ScriptedTeacher):
    """Says one thing after a while.

    Args:
      delay_s: from a question to its answer, or for the questions of a whole batch.
      share: of a batch in one call.
      has_pace: a server that works off `1 / share` calls in `delay_s`, one after the other; else each call takes
        `delay_s`, however many there are.
    """

    def __init__(self, delay_s: float, share: float, *, has_pace: bool):
        super().__init__(lambda request: [Continuation(_TEXT, "length")] * request.n)
        self.is_concurrent = not has_pace
        self._seconds = delay_s * share if has_pace else delay_s

    def continue_texts(self, requests: Sequence[ContinuationRequest]) -> list[ContinuationResult]:
        time.sleep(self._seconds)
        return super().continue_texts(requests)

    def cancel(self) -> None:
        """A delay ends by itself."""


def step_times(config: Config, teacher: ScriptedTeacher, folder: Path, *, steps: int) -> list[Mapping[str, float]]:
    """The time/* metrics of `steps` steps after the warm-up."""
    tokenizer_folder = folder / "tokenizer"
    arithmetic.save_tokenizer(str(tokenizer_folder))
    tokenizer = load_tokenizer(tokenizer_folder)
    decoder = small_world.model_config(config.world.student_width, 2, vocab_size=tokenizer.vocab_size)
    student = models.init_model(decoder, jax.random.key(0))
    problems = arithmetic.problems(np.random.default_rng(0), 256, 3)
    seen: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        loop.run(
            config,
            Path(workdir),
            student=student,
            tokenizer=tokenizer,
            teacher=teacher,
            prompts=[problem.prompt(f"p{i}") for i, problem in enumerate(problems)],
            progress=lambda step, metrics: seen.append(metrics),
        )
    return seen[WARM_UP : WARM_UP + steps]


def measure(values: Mapping[str, Any], *, micro_batches: int, steps: int = 5) -> Iterator[dict[str, Any]]:
    """One record a teacher: seconds of a step with and without overlap, medians over `steps`, and the bound.

    Args:
      values: every knob; sizes of the batch, the responses and the student are taken from it.
      micro_batches: parts of the batch.
      steps: measured after the warm-up.
    """

    def config(parts: int) -> Config:
        train = dict(values["train"], steps=WARM_UP + steps, checkpoint_every=0, audit_log_every=0)
        return from_mapping({**values, "train": train, "pipeline": dict(values["pipeline"], micro_batches=parts)})

    def median(times: Sequence[Mapping[str, float]], *names: str) -> float:
        return statistics.median(sum(step.get(f"time/{name}_s", 0.0) for name in names) for step in times)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        free = step_times(config(1), DelayedTeacher(0.0, 1.0, has_pace=False), folder, steps=steps)
        split = DelayedTeacher(0.0, 1 / micro_batches, has_pace=False)
        # The student's own work in the same parts, so that the bound counts what smaller batches cost.
        own = step_times(config(micro_batches), split, folder, steps=steps)
        device_s, sample_s = median(own, "step"), median(own, "sample", "score")
        for has_pace in (False, True):
            for ratio in (0.5, 1.0, 2.0):
                delay_s = ratio * median(free, "step")
                alone = step_times(config(1), DelayedTeacher(delay_s, 1.0, has_pace=has_pace), folder, steps=steps)
                teacher = DelayedTeacher(delay_s, 1 / micro_batches, has_pace=has_pace)
                overlapped = step_times(config(micro_batches), teacher, folder, steps=steps)
                one_s = sample_s / micro_batches + (delay_s / micro_batches if has_pace else delay_s)
                yield {
                    "suite": "overlap",
                    "teacher": "pace" if has_pace else "delay",
                    "micro_batches": micro_batches,
                    "device_s": device_s,
                    "teacher_s": delay_s,
                    "micro_batch_s": one_s,
                    "without_s": median(alone, "step"),
                    "step_s": median(overlapped, "step"),
                    "bound_s": 1.15 * max(device_s, delay_s) + one_s,
                }
