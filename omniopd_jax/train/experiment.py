"""What a run is made of, put together and checked before anything is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omniopd_jax import models, prng
from omniopd_jax.algo.registry import Needs
from omniopd_jax.config import Config, ConfigError, to_dict
from omniopd_jax.data import PromptStream, Tokenizer, load_tokenizer
from omniopd_jax.data.preflight import Side, preflight, raise_errors, table
from omniopd_jax.eval.evaluate import Judge
from omniopd_jax.models import Model
from omniopd_jax.models.decoder import Remat
from omniopd_jax.models.parameters import parameter_table
from omniopd_jax.similarity import get_similarity
from omniopd_jax.teacher.protocol import Teacher, Usage
from omniopd_jax.teacher.verify import Similarity, VerifySettings
from omniopd_jax.train import checkpoint, distributed, sharding
from omniopd_jax.train.compilation import set_up_cache
from omniopd_jax.train.credit import needs_of, puts_weight_on_trunk
from omniopd_jax.train.evaluation import Evaluator, judge_of, make_evaluator, rows_of
from omniopd_jax.train.metrics import RunLog
from omniopd_jax.train.mirror import Mirror
from omniopd_jax.train.optimizer import make_optimizer
from omniopd_jax.train.pipeline import check_staleness
from omniopd_jax.train.score import Student, make_scorer, make_student
from omniopd_jax.train.small_world import with_world
from omniopd_jax.train.step import (
    Step,
    StepOptions,
    init_state,
    make_step,
    state_shardings,
    with_trainable,
    without_trainable,
)
from omniopd_jax.train.teachers import check_white_box, initial_student, teacher_of, white_box
from omniopd_jax.types import Array, Prompt, Rollout, TrainState

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Experiment:
    """Everything the loop uses. `state` and `spent` are what changes."""

    config: Config
    workdir: Path  # on this machine
    mirror: Mirror  # where it comes from and goes to, if that is a bucket
    mesh: Mesh
    tokenizer: Tokenizer
    stream: PromptStream
    teacher: Teacher
    similarity: Similarity
    verify_settings: VerifySettings
    frozen: Model  # the student without what is trained
    student: Student
    step: Step
    evaluator: Evaluator | None
    checkpoints: checkpoint.Checkpoints
    log: RunLog | None  # process 0 writes it
    state: TrainState
    spent: Usage  # by the teacher, the run so far
    needs: Needs  # of the run's arms
    judge: Judge | None  # of responses, where an arm needs rewards
    teacher_logprob: Callable[[Rollout], Array] | None  # of sampled tokens, where an arm needs it

    @property
    def model(self) -> Model:
        """The student as it is now."""
        return with_trainable(self.frozen, self.state.params)

    @property
    def num_finished(self) -> int:
        """Finished optimizer steps."""
        return int(self.state.step)

    def close(self) -> None:
        """Frees everything, once a checkpoint that is being written is complete."""
        with contextlib.ExitStack() as closing:  # each, whatever happens to the others
            closing.callback(self.checkpoints.close)
            closing.callback(self.teacher.close)
            if self.log is not None:
                closing.callback(self.log.close)


def prepare(
    config: Config,
    workdir: Path | str,
    *,
    student: Model | None = None,
    tokenizer: Tokenizer | None = None,
    teacher: Teacher | None = None,
    prompts: Sequence[Prompt] | None = None,
    evaluator: Evaluator | None = None,
) -> Experiment:
    """Builds an experiment, cheap checks first, and resumes it where `workdir` holds its checkpoint.

    Args:
      config: the run.
      workdir: where it lives, a folder or gs://BUCKET/…; made if absent.
      student: instead of the folder `student.path`; left as it is.
      tokenizer: instead of that folder's.
      teacher: instead of the one that `teacher.*` describes; `close` closes it.
      prompts: instead of the file `data.train`.
      evaluator: instead of the one that `eval.*` describes.

    Raises:
      InputError: anything that the user gave does not fit; nothing was computed.
      TeacherStopped: the teacher does not answer.
      CheckpointError: no room for checkpoints, or none of those found can be read.
    """
    first_only, agree = distributed.first_only, distributed.agree
    mirror = Mirror(workdir)
    workdir = mirror.local
    agree(mirror.pull)
    first_only(lambda: checkpoint.check_workdir(workdir, config))
    check_staleness(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config)
    set_up_cache(config.train.compilation_cache)
    given = config
    first_only(lambda: with_world(given, workdir))  # the others find it built
    if mirror.is_remote:
        first_only(mirror.push)
        agree(lambda: None if distributed.is_first() else mirror.pull())
    config = agree(lambda: with_world(given, workdir))
    checked = agree(lambda: _checked(config, mesh, student, tokenizer, teacher, prompts, evaluator))
    train, needs = config.train, needs_of(config)
    checkpoints = checkpoint.Checkpoints(
        mirror.checkpoints,
        given,
        keep=train.checkpoint_keep,
        keep_every=train.checkpoint_keep_every,
        keeps_best=bool(train.checkpoint_best),
    )
    teacher = teacher or agree(lambda: teacher_of(config, needs, workdir))
    try:
        is_unfinished = max(distributed.from_first(checkpoints.steps()), default=0) < train.steps
        if teacher is not None and needs.text and is_unfinished:
            # before the student is loaded: a teacher that is down shows in seconds
            _LOG.info("%s", agree(teacher.probe))
        decoder, tokenizer = checked.decoder, checked.tokenizer
        if student is None:
            student = agree(lambda: _load_student(config, decoder, mesh))
        else:
            student = sharding.placed(student, mesh)
        if teacher is None:
            teacher = initial_student(config, student, tokenizer)
        student = models.with_kernel(student, models.Kernel(attention_kernel(config, decoder)))
        if config.lora.rank > 0 and student.adapters is None:
            student = models.add_adapters(
                student,
                prng.named_key(config.train.seed, 0, "adapters"),
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                targets=config.lora.targets,
            )
        num_updates = train.steps * train.updates_per_batch
        optimizer = make_optimizer(config.optimizer, num_updates)
        shardings = state_shardings(mesh, student, optimizer)
        state = init_state(student, optimizer, shardings)
        first_only(lambda: None if mirror.is_remote else checkpoint.check_room(workdir, state))
        found = checkpoints.restore(state)
        spent = Usage()
        if found is not None:
            state, progress = found
            spent = Usage(**progress["spent"])
        log = agree(lambda: _open_log(given, workdir, int(state.step)) if distributed.is_first() else None)
        first_only(lambda: checkpoint.claim_workdir(workdir, given))
        agree(mirror.push)
        frozen = without_trainable(student)
        taught = white_box(teacher, mesh) if needs.logits or needs.logprob else None
        score = make_scorer(mesh, block_tokens=sharding.block_tokens(config, mesh))
        step = make_step(
            frozen,
            _reference(config, student),
            optimizer,
            mesh,
            shardings,
            step_options(config, mesh),
            taught if needs.logits else None,
        )
        return Experiment(
            config=config,
            workdir=workdir,
            mirror=mirror,
            mesh=mesh,
            tokenizer=tokenizer,
            stream=checked.stream,
            teacher=teacher,
            similarity=checked.similarity,
            verify_settings=VerifySettings.from_config(config),
            frozen=frozen,
            student=make_student(
                config,
                mesh,
                stop_tokens=tokenizer.stop_tokens,
                banned_tokens=tokenizer.banned_tokens(student.config.vocab_size),
            ),
            step=step,
            evaluator=checked.evaluator,
            checkpoints=checkpoints,
            log=log,
            state=state,
            spent=spent,
            needs=needs,
            judge=checked.judge,
            teacher_logprob=functools.partial(score, taught) if needs.logprob and taught is not None else None,
        )
    except BaseException:
        if teacher is not None:
            teacher.close()
        raise


class _Checked(NamedTuple):
    """What was read before anything is computed."""

    tokenizer: Tokenizer
    stream: PromptStream
    similarity: Similarity
    evaluator: Evaluator | None
    judge: Judge | None
    decoder: models.DecoderConfig


def _checked(
    config: Config,
    mesh: Mesh,
    student: Model | None,
    tokenizer: Tokenizer | None,
    teacher: Teacher | None,
    prompts: Sequence[Prompt] | None,
    evaluator: Evaluator | None,
) -> _Checked:
    """The cheap parts of an experiment; raises InputError for the first that does not fit."""
    if student is None and not config.student.path:
        raise ConfigError("config.student.path is empty: it names the folder of the model to be trained.")
    tokenizer = tokenizer or load_tokenizer(config.student.path)
    stream = _stream(config, tokenizer, prompts)
    similarity = _similarity(config)
    if config.eval.every and evaluator is None:
        evaluator = make_evaluator(config, tokenizer)
    for name, on_policy in (("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0)):
        value = getattr(config.rollout, name)
        if value != on_policy:
            _LOG.warning("config.rollout.%s=%g: the responses are not on-policy.", name, value)
    decoder = models.read_config(config.student.path) if student is None else student.config
    attention_kernel(config, decoder)
    sharding.check_model(mesh, decoder)
    needs = needs_of(config)
    other = _teacher_side(config) if teacher is None and needs.teacher else None
    _preflight(config, _side(tokenizer, decoder), other, stream)
    if needs.logits or needs.logprob:
        check_white_box(teacher, config, tokenizer)
    judge = None
    if needs.reward:
        _check_answers(stream)
        judge = judge_of(config, stream.prompts)
    return _Checked(tokenizer, stream, similarity, evaluator, judge, decoder)


def attention_kernel(config: Config, decoder: models.DecoderConfig) -> str:
    """The kernel that `student.attention` means here; raises ModelError where it cannot be used."""
    dtype = compute_dtype(config.student.compute_dtype)
    return models.kernel_of(config.student.attention, decoder, dtype, jax.devices()[0])


def _open_log(config: Config, workdir: Path, finished: int) -> RunLog:
    return RunLog(
        workdir,
        after_step=finished or -1,  # without a finished step the first evaluation is written again, so line 0 goes too
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
        settings=to_dict(config),
    )


def step_options(config: Config, mesh: Mesh) -> StepOptions:
    """What the config and the mesh fix of the compiled step."""
    return StepOptions(
        has_trunk=puts_weight_on_trunk(config),
        has_anchor=config.objective.anchor_weight > 0,
        anchor_estimator=config.objective.anchor_estimator,
        divergence=config.objective.divergence,
        divergence_beta=config.objective.divergence_beta,
        top_k=config.objective.top_k,
        clip=config.objective.clip,
        updates=config.train.updates_per_batch,
        remat=cast(Remat, config.train.remat),  # one of them: config.validate has seen to it
        block_tokens=sharding.block_tokens(config, mesh),
    )


def _stream(config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt] | None) -> PromptStream:
    data = config.data
    if prompts is None:
        if not data.train:
            raise ConfigError("config.data.train is empty: it names the jsonl or parquet file of prompts.")
        prompts = rows_of(data.train, data)
    stream = PromptStream(
        prompts,
        tokenizer,
        batch_size=config.rollout.batch_size,
        samples_per_prompt=config.rollout.samples_per_prompt,
        max_prompt_tokens=data.max_prompt_tokens,
        seed=config.train.seed,
        shuffle=data.shuffle,
        template_args=data.template_args,
        use_chat_template=data.use_chat_template,
    )
    return stream


def _check_answers(stream: PromptStream) -> None:
    unanswered = next((prompt.id for prompt in stream.prompts if not prompt.answer), None)
    if unanswered is not None:
        raise ConfigError(
            f"Arm 'grpo' judges responses by reference answers, but prompt {unanswered!r} has none: name their column "
            "in config.data.answer_field."
        )


def _teacher_side(config: Config) -> Side | None:
    """A local teacher's tokenizer and vocabulary; cheap, so a wrong folder shows before anything is loaded."""
    if config.teacher.kind != "local":
        return None
    if not config.teacher.path:
        raise ConfigError("config.teacher.path is empty: it names the folder of the local teacher.")
    return _side(load_tokenizer(config.teacher.path), models.read_config(config.teacher.path))


def _side(tokenizer: Tokenizer, decoder: models.DecoderConfig) -> Side:
    count = sum(math.prod(parameter.shape) for parameter in parameter_table(decoder))
    return Side(tokenizer, decoder.vocab_size, count)


def _preflight(config: Config, student: Side, teacher: Side | None, stream: PromptStream) -> None:
    findings = preflight(
        student,
        teacher,
        stream,
        max_prompt_tokens=config.data.max_prompt_tokens,
        template_args=config.data.template_args,
        use_chat_template=config.data.use_chat_template,
    )
    raise_errors(findings)
    is_clean = all(finding.level == "ok" for finding in findings)
    _LOG.log(logging.INFO if is_clean else logging.WARNING, "%s", table(findings))


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of `student.compute_dtype`: "auto" is bfloat16 on accelerators and float32 on a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _load_student(config: Config, decoder: models.DecoderConfig, mesh: Mesh) -> Model:
    model = models.load_model(
        config.student.path,
        dtype=jnp.dtype(config.student.param_dtype),
        compute_dtype=compute_dtype(config.student.compute_dtype),
        shardings=sharding.config_shardings(mesh, decoder),
    )
    return sharding.laid_out(model, mesh)


def _reference(config: Config, student: Model) -> Model | None:
    """The frozen initial student; under adapters it is the base, which is there anyway."""
    if config.objective.anchor_weight == 0:
        return None
    base = dataclasses.replace(student, adapters=None)
    if student.adapters is not None or config.reference.dtype == "same":
        return base
    dtype = jnp.dtype(config.reference.dtype)
    return dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf.astype(dtype), base.params))


def _similarity(config: Config) -> Similarity:
    try:
        return get_similarity(config.audit.similarity, embedding_model=config.audit.embedding_model)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"config.audit.similarity={config.audit.similarity!r}: {error}") from error


def export(experiment: Experiment) -> Path:
    """Writes the student to WORKDIR/model, as one model or as an adapter folder (`lora.export`)."""
    config, folder = experiment.config, experiment.workdir / "model"
    source = config.student.path or None
    if config.lora.rank > 0 and config.lora.export == "peft":
        models.save_adapters(folder, experiment.model, base=config.student.path, source=source)
    else:
        models.save_model(folder, experiment.model, experiment.tokenizer.hf, source=source)
    return folder
