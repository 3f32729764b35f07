"""The story of a run."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from omniopd_jax.config import Config
from omniopd_jax.data import Tokenizer
from omniopd_jax.models import Model
from omniopd_jax.teacher.protocol import Teacher, TeacherStopped, Usage
from omniopd_jax.train import distributed
from omniopd_jax.train.compilation import CompileCounter
from omniopd_jax.train.evaluation import Evaluator
from omniopd_jax.train.experiment import Experiment, export, prepare
from omniopd_jax.train.mirror import Mirror
from omniopd_jax.train.observation import observe, rollout_lines, step_metrics
from omniopd_jax.train.progress import Progress, Watch
from omniopd_jax.train.step import TERMS
from omniopd_jax.train.stops import CheckpointError, Interrupts, RunStopped, WorkdirError, check_finite
from omniopd_jax.train.update import Update
from omniopd_jax.types import Prompt

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run reports."""

    workdir: Path  # on this machine
    mirror: Mirror  # of a work directory in a bucket: `push` copies there what was written since
    model_path: Path  # the exported student
    model: Model
    updates: int  # optimizer steps, of this and earlier runs in the work directory
    teacher: Usage  # the same
    seconds: Mapping[str, float]  # by phase, of this run
    metrics: Mapping[str, float]  # of the last step

    @property
    def teacher_tokens(self) -> int:
        """Tokens that the teacher wrote."""
        return self.teacher.completion_tokens

    def __str__(self) -> str:
        phases = " · ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return (
            f"updates  {self.updates}\n"
            f"teacher  {self.teacher.completion_tokens:,} tokens written, {self.teacher.calls:,} calls"
            + (f", ${self.teacher.dollars:.2f}" if self.teacher.dollars else "")
            + f"\ntime     {phases}\n"
            f"model    {self.model_path}"
        )


def run(
    config: Config,
    workdir: Path | str,
    *,
    student: Model | None = None,
    tokenizer: Tokenizer | None = None,
    teacher: Teacher | None = None,
    prompts: Sequence[Prompt] | None = None,
    evaluator: Evaluator | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Distils a student, resuming where `workdir` holds a checkpoint of the same config.

    Args:
      config, workdir, student, tokenizer, teacher, prompts, evaluator: see `experiment.prepare`.
      progress: called after each step with the number of finished steps and the step's metrics; a `Watch` is also
        told of the phases of a step.

    Raises:
      InputError: before any compute, in one sentence.
      RunStopped, TeacherStopped: the run ended early; the finished steps are in a checkpoint.
    """
    experiment = prepare(
        config,
        workdir,
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        prompts=prompts,
        evaluator=evaluator,
    )
    watch = progress if isinstance(progress, Watch) else None
    clock, counter = Clock(watch.phase if watch else None), CompileCounter()
    if watch is not None:
        watch.begin(experiment.teacher, experiment.num_finished)
    metrics: dict[str, float] = {}
    try:
        with Interrupts().installed() as interrupts, _saved_when_stopped(experiment):
            if experiment.evaluator is not None and experiment.num_finished == 0:
                with clock.phase("evaluate"):
                    write(experiment, {"step": 0} | experiment.evaluator(experiment.model))
            while not is_done(experiment):
                index = experiment.num_finished
                began = time.perf_counter()
                metrics, audits, rollouts = one_step(experiment, index, clock, interrupts)
                step = experiment.num_finished
                stopped = None
                if experiment.evaluator is not None and config.eval.every and step % config.eval.every == 0:
                    with clock.phase("evaluate"):
                        try:
                            metrics |= experiment.evaluator(experiment.model)
                        except RunStopped as error:  # the step itself is finished: its lines are written first
                            stopped = error
                programs, seconds = counter.take()
                metrics |= {"compile/programs": float(programs), "compile/seconds": seconds}
                metrics |= clock.take() | {"time/step_s": time.perf_counter() - began}
                write(experiment, {"step": step} | metrics, audits, rollouts)
                if stopped is not None:
                    raise stopped
                score = metrics.get(config.train.checkpoint_best)
                every = config.train.checkpoint_every
                if (every and step % every == 0) or experiment.checkpoints.is_best(score):
                    with clock.phase("checkpoint"):
                        save(experiment, score=score)
                distributed.agree(lambda: report(step, metrics, progress, interrupts))  # noqa: B023 (called at once)
            save(experiment)
            with clock.phase("export"):
                model_path = distributed.agree(lambda: export(experiment))
                push(experiment)
            experiment.checkpoints.wait()
        return RunResult(
            workdir=experiment.workdir,
            mirror=experiment.mirror,
            model_path=model_path,
            model=experiment.model,
            updates=experiment.num_finished * config.train.updates_per_batch,
            teacher=experiment.spent,
            seconds=clock.total,
            metrics=metrics,
        )
    finally:
        counter.close()
        experiment.close()


def is_done(experiment: Experiment) -> bool:
    """All steps are taken, or the teacher has written as much as it may."""
    train, written = experiment.config.train, experiment.spent.completion_tokens
    return experiment.num_finished >= train.steps or 0 < train.max_teacher_tokens <= written


def one_step(
    experiment: Experiment, index: int, clock: Clock, interrupts: Interrupts
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """One update on what was observed. Returns (metrics, audits, rollouts)."""
    config, step = experiment.config, index + 1
    update = Update(experiment, clock)
    seen = observe(experiment, index, clock, interrupts, update.add)
    updated = update.apply()
    terms = {name: np.asarray(updated[name]) for name in TERMS if name in updated}
    check_finite(step, terms, is_finite=bool(updated.pop("is_finite")))

    spent, asked = experiment.spent, seen.asked
    experiment.spent = Usage(
        prompt_tokens=spent.prompt_tokens + int(asked.get("teacher/used_prompt_tokens", 0)),
        completion_tokens=spent.completion_tokens + int(asked.get("teacher/used_completion_tokens", 0)),
        calls=spent.calls + int(asked.get("teacher/used_calls", 0)),
        # A ledger knows what was paid for before a crash as well.
        dollars=asked.get("teacher/total_dollars", spent.dollars + asked.get("teacher/dollars", 0.0)),
    )
    metrics = step_metrics(experiment, index, seen, update.packed, updated) | seen.asked
    if not config.train.audit_log_every or step % config.train.audit_log_every:
        return metrics, [], []
    return metrics, seen.audits, rollout_lines(experiment, step, seen)


class Clock:
    """Seconds by phase: of the step that is running, and of the run."""

    def __init__(self, listener: Callable[[str, bool], None] | None = None) -> None:
        """`listener` is told of each phase that begins (True) and ends (False)."""
        self._listener = listener
        self.total: dict[str, float] = {}
        self._step: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._listener is not None:
            self._listener(name, True)
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._listener is not None:
                self._listener(name, False)
            seconds = time.perf_counter() - began
            self._step[name] = self._step.get(name, 0.0) + seconds
            self.total[name] = self.total.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """time/* of the step, and starts the next."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._step.items()}
        self._step = {}
        return taken


def write(
    experiment: Experiment,
    row: Mapping[str, Any],
    audits: Iterable[Mapping[str, Any]] = (),
    rollouts: Iterable[Mapping[str, Any]] = (),
) -> None:
    """One step's lines, written by the process that has the log."""
    log = experiment.log
    distributed.first_only(lambda: log.write(row, audits, rollouts) if log is not None else None)


def report(step: int, metrics: Mapping[str, float], progress: Progress | None, interrupts: Interrupts) -> None:
    """Tells who watches, and notices a signal."""
    if progress is not None:
        progress(step, metrics)
    interrupts.check()


def save(experiment: Experiment, *, score: float | None = None) -> None:
    """Checkpoints the finished steps.

    The prompts and every random stream are functions of the seed and the step, so the step stands for both.
    """
    progress = {"spent": dataclasses.asdict(experiment.spent)}
    push(experiment)  # first: lines of steps that a checkpoint holds are never written again
    experiment.checkpoints.save(experiment.state, progress, score=score)


def push(experiment: Experiment) -> None:
    """Copies what is new of a work directory in a bucket.

    Raises:
      CheckpointError: the bucket took it when the run began and does not now, so another try may go on from there.
    """

    def copy() -> None:
        try:
            experiment.mirror.push()
        except WorkdirError as error:
            raise CheckpointError(f"{error} Of what is there, {experiment.checkpoints.last}.") from error

    distributed.agree(copy)


@contextmanager
def _saved_when_stopped(experiment: Experiment) -> Iterator[None]:
    """Whatever ends the run early in an orderly way leaves a checkpoint of the finished steps behind."""
    try:
        yield
    except CheckpointError:
        raise
    except (RunStopped, TeacherStopped):
        save(experiment)
        experiment.checkpoints.wait()
        raise
    except OSError as error:
        raise CheckpointError(
            f"A file could not be read or written ({error}); {experiment.checkpoints.last}."
        ) from error
