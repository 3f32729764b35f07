"""The story of a run."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from omniopd_jax.config import Config
from omniopd_jax.data import Tokenizer
from omniopd_jax.models import Model
from omniopd_jax.teacher.protocol import Teacher, TeacherStopped, Usage
from omniopd_jax.teacher.verify import verify
from omniopd_jax.train import batching
from omniopd_jax.train.compilation import CompileCounter
from omniopd_jax.train.credit import Credit, give_credit, mean_where
from omniopd_jax.train.evaluation import Evaluator
from omniopd_jax.train.experiment import Experiment, export, prepare
from omniopd_jax.train.step import TERMS
from omniopd_jax.train.stops import CheckpointError, Interrupts, NotFinite, RunStopped
from omniopd_jax.types import Anchors, Prompt, PromptBatch, Rollout, TokenTree

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a finished run reports."""

    workdir: Path
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
    workdir: Path,
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
      progress: called after each step with the number of finished steps and the step's metrics.

    Raises:
      InputError: before any compute, in one sentence.
      RunStopped, TeacherStopped: the run ended early; the finished steps are in a checkpoint.
    """
    experiment = prepare(
        config,
        Path(workdir),
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        prompts=prompts,
        evaluator=evaluator,
    )
    clock, counter = Clock(), CompileCounter()
    metrics: dict[str, float] = {}
    try:
        with Interrupts().installed() as interrupts, _saved_when_stopped(experiment):
            if experiment.evaluator is not None and experiment.num_finished == 0:
                with clock.phase("evaluate"):
                    experiment.log.write({"step": 0} | experiment.evaluator(experiment.model))
            while not is_done(experiment):
                index = experiment.num_finished
                began = time.perf_counter()
                metrics, audits, rollouts = one_step(experiment, index, clock, interrupts)
                step = experiment.num_finished
                if experiment.evaluator is not None and config.eval.every and step % config.eval.every == 0:
                    with clock.phase("evaluate"):
                        metrics |= experiment.evaluator(experiment.model)
                programs, seconds = counter.take()
                metrics |= {"compile/programs": float(programs), "compile/seconds": seconds}
                metrics |= clock.take() | {"time/step_s": time.perf_counter() - began}
                experiment.log.write({"step": step} | metrics, audits, rollouts)
                if config.train.checkpoint_every and step % config.train.checkpoint_every == 0:
                    with clock.phase("checkpoint"):
                        save(experiment)
                if progress is not None:
                    progress(step, metrics)
                interrupts.check()
            save(experiment)
            with clock.phase("export"):
                model_path = export(experiment)
            experiment.checkpoints.wait()
        return RunResult(
            workdir=experiment.workdir,
            model_path=model_path,
            model=experiment.model,
            updates=experiment.num_finished,
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


class Observation(NamedTuple):
    """What one batch of responses and the teacher's texts come to, before anything is trained. Host arrays."""

    batch: PromptBatch
    rollout: Rollout
    anchors: Anchors
    credit: Credit
    audits: list[dict[str, Any]]  # one record a chunk that the teacher was asked about
    asked: dict[str, float]  # metrics of the audit


def observe(experiment: Experiment, index: int, clock: Clock, interrupts: Interrupts) -> Observation:
    """Prompts → responses → chunks → teacher → weights, of optimizer step `index` (from 0)."""
    config, student, model = experiment.config, experiment.student, experiment.model
    batch = experiment.stream.batch_for_step(index)
    step = index + 1

    with clock.phase("sample"):
        prompts = (batch.tokens_BxP, batch.mask_BxP, batch.sample_index_B)
        tokens_BxP, mask_BxP, index_B = batching.to_devices(prompts, experiment.mesh)
        at = jnp.asarray(index, jnp.int32)
        rollout_on_devices = student.respond(model, tokens_BxP, mask_BxP, index_B, at)
        anchors_on_devices = student.choose(rollout_on_devices, index_B, at)
        rollout, anchors = batching.to_host((rollout_on_devices, anchors_on_devices))
    _check_finite(step, {"rollout/entropy": rollout.entropy_BxT, "rollout/logprob": rollout.logprob_BxT})
    interrupts.check()

    branches = None
    if config.objective.arm == "branch":
        with clock.phase("score"):
            branches = batching.to_host(student.branch(model, rollout_on_devices, anchors_on_devices, index_B, at))
        _check_finite(step, {"branch/logprob": branches.logprob_BxMxGxC})

    with clock.phase("audit"), interrupts.abandonable():
        verdicts, audits, asked = verify(
            batch,
            rollout,
            anchors,
            branches,
            tokenizer=experiment.tokenizer,
            teacher=experiment.teacher,
            similarity=experiment.similarity,
            settings=experiment.verify_settings,
            seed=config.train.seed,
            step=step,
        )
        credit = give_credit(config, rollout, anchors, verdicts, branches, _groups(batch))
    return Observation(batch, rollout, anchors, credit, _complete(audits, credit), asked)


def one_step(
    experiment: Experiment, index: int, clock: Clock, interrupts: Interrupts
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """One update on what was observed. Returns (metrics, audits, rollouts)."""
    config, step = experiment.config, index + 1
    seen = observe(experiment, index, clock, interrupts)
    with clock.phase("update"):
        packed = batching.pack(seen.credit.tree)
        count = config.rollout.batch_size // (config.train.micro_batch_size or config.rollout.batch_size)
        trees = batching.to_devices(batching.micro_batches(packed, count), experiment.mesh, axis=1)
        experiment.state, on_devices = experiment.step(experiment.state, trees)
        updated = {name: float(value) + 0.0 for name, value in batching.to_host(on_devices).items()}
    _check_finite(step, {name: np.asarray(updated[name]) for name in TERMS}, is_finite=bool(updated.pop("is_finite")))

    experiment.spent += Usage(
        prompt_tokens=int(seen.asked["teacher/prompt_tokens"]),
        completion_tokens=int(seen.asked["teacher/completion_tokens"]),
        calls=int(seen.asked["teacher/calls"]),
        dollars=seen.asked["teacher/dollars"],
    )
    metrics = _metrics(experiment, index, seen, packed, updated) | seen.asked
    if not config.train.audit_log_every or step % config.train.audit_log_every:
        return metrics, [], []
    return metrics, seen.audits, _rollout_lines(experiment, step, seen.batch, seen.rollout)


class Clock:
    """Seconds by phase: of the step that is running, and of the run."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._step: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._step[name] = self._step.get(name, 0.0) + seconds
            self.total[name] = self.total.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """time/* of the step, and starts the next."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._step.items()}
        self._step = {}
        return taken


def save(experiment: Experiment) -> None:
    """Checkpoints the finished steps."""
    progress = {"spent": dataclasses.asdict(experiment.spent)}
    experiment.checkpoints.save(experiment.state, progress)


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


def _check_finite(step: int, terms: Mapping[str, np.ndarray], *, is_finite: bool = True) -> None:
    for name, value in terms.items():
        if not np.isfinite(value).all():
            raise NotFinite(step, name)
    if not is_finite:
        raise NotFinite(step, "the loss")


def _groups(batch: PromptBatch) -> np.ndarray:
    """int32 [B], equal for responses of one prompt."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(prompt.id, row) for row, prompt in enumerate(batch.prompts)], np.int32)


def _metrics(
    experiment: Experiment, index: int, seen: Observation, packed: TokenTree, updated: Mapping[str, float]
) -> dict[str, float]:
    rollout, anchors, credit = seen.rollout, seen.anchors, seen.credit
    mask_BxT, chunk_tokens = rollout.mask_BxT, experiment.config.audit.chunk_tokens
    tokens = max(int(mask_BxT.sum()), 1)
    length_B = mask_BxT.sum(axis=1)
    is_audited_BxM, spent = credit.is_audited_BxM, experiment.spent
    start_entropy_BxM = np.take_along_axis(np.asarray(rollout.entropy_BxT), anchors.start_BxM, axis=1)
    metrics = dict(updated)
    kl_sum, anchored = metrics.pop("anchor/kl_sum"), metrics.pop("anchor/tokens")
    if anchored:
        metrics["anchor/kl"] = kl_sum / anchored
    metrics |= {
        "anchor/fraction": anchored / tokens,
        "rollout/tokens": float(length_B.mean()),
        "rollout/finished": float(rollout.is_finished_B.mean()),
        "rollout/empty": float((length_B <= rollout.is_finished_B).sum()),
        "rollout/entropy": mean_where(np.asarray(rollout.entropy_BxT), mask_BxT),
        "rollout/logprob": mean_where(rollout.logprob_BxT, mask_BxT),
        "rollout/epoch": float(experiment.stream.epoch(index)),
        "audit/fraction": float(is_audited_BxM.sum() * chunk_tokens / tokens),
        "audit/audited": mean_where(is_audited_BxM.astype(np.float32), anchors.is_valid_BxM),
        "audit/entropy": mean_where(start_entropy_BxM, is_audited_BxM),
        "audit/prior": mean_where(credit.prior_BxM, is_audited_BxM),
        "audit/advantage": mean_where(np.abs(credit.advantage), is_audited_BxM),
        "teacher/total_tokens": float(spent.completion_tokens),
        "teacher/total_prompt_tokens": float(spent.prompt_tokens),
        "teacher/total_calls": float(spent.calls),
        "teacher/total_dollars": spent.dollars,
    }
    if credit.target_BxM is not None:
        metrics["audit/target"] = mean_where(credit.target_BxM, is_audited_BxM)
    else:
        kept = int((packed.branch_weight_BxRxC != 0).any(axis=2).sum())
        metrics["branch/kept"] = kept / len(mask_BxT)
        metrics["branch/packed"] = kept / max(packed.branch_start_BxR.size, 1)
    return metrics


def _complete(audits: list[dict[str, Any]], credit: Credit) -> list[dict[str, Any]]:
    """The audit records with what the arm decided."""
    for record in audits:
        place = (record["response"], record["slot"])
        record["prior"] = round(float(credit.prior_BxM[place]), 4)
        if credit.target_BxM is not None:
            record["target"] = round(float(credit.target_BxM[place]), 4)
            record["weight"] = round(float(credit.advantage[place]), 4)
        else:
            for branch, weight in zip(record["branches"], credit.advantage[place], strict=True):
                branch["weight"] = round(float(weight), 4)
    return audits


def _rollout_lines(experiment: Experiment, step: int, batch: PromptBatch, rollout: Rollout) -> list[dict[str, Any]]:
    lines = []
    for row, prompt in enumerate(batch.prompts):
        length = int(rollout.mask_BxT[row].sum())
        line = {
            "step": step,
            "response": row,
            "prompt_id": prompt.id,
            "prompt": "\n\n".join(message.content for message in prompt.messages),
            "tokens": experiment.tokenizer.token_texts(rollout.tokens_BxT[row, :length].tolist()),
            "entropy": np.asarray(rollout.entropy_BxT)[row, :length].astype(np.float64).round(4).tolist(),
            "logprob": rollout.logprob_BxT[row, :length].astype(np.float64).round(4).tolist(),
            "is_finished": bool(rollout.is_finished_B[row]),
        }
        if prompt.answer:
            line["answer"] = prompt.answer
        lines.append(line)
    return lines
