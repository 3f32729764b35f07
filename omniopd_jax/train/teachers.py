"""Which teacher a run has: none, somebody who writes text, the student as it was, or a model whose logits are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omniopd_jax import gathering
from omniopd_jax.algo.registry import Needs
from omniopd_jax.config import Config, ConfigError
from omniopd_jax.data import Tokenizer, load_tokenizer
from omniopd_jax.models import Model
from omniopd_jax.teacher.absent import AbsentTeacher
from omniopd_jax.teacher.factory import make_teacher
from omniopd_jax.teacher.local import LocalTeacher
from omniopd_jax.teacher.protocol import Teacher
from omniopd_jax.train import distributed, sharding


def teacher_of(config: Config, needs: Needs, workdir: Path) -> Teacher | None:
    """The teacher that the config describes, as far as the arms need one; None: it is the student, not loaded yet.

    Each process has its own, with its own cache and ledger, and its share of what the run may spend.
    """
    if not needs.teacher:
        return AbsentTeacher()
    if config.teacher.kind == "self":
        return None
    return make_teacher(
        distributed.teacher_share(config.teacher),
        workdir=distributed.own_folder(workdir),
        run_seed=config.train.seed,
        template_args=config.data.template_args,
        is_raw=not config.data.use_chat_template,
    )


def initial_student(config: Config, student: Model, tokenizer: Tokenizer) -> LocalTeacher:
    """teacher.kind="self": a copy of the student as it is now, in the dtype in which a local teacher is loaded.

    It shares no array with what is trained and lies on this process's own device.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params, adapters = gathering.whole((student.params, student.adapters))
    params, adapters = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), (params, adapters))  # copies
    module = student.module.clone(layout=None, compute_dtype=dtype)
    copy = dataclasses.replace(student, params=params, adapters=adapters, module=module)
    return LocalTeacher(
        copy,
        tokenizer,
        name="self",
        template_args=config.data.template_args,
        attention=config.teacher.attention,
    )


def check_white_box(teacher: Teacher | None, config: Config, tokenizer: Tokenizer) -> None:
    """Before anything is loaded: whether the teacher's logits can be had, over the student's vocabulary.

    Raises:
      ConfigError: they cannot.
    """
    if teacher is None:
        if config.teacher.kind == "self":
            return
        other = load_tokenizer(config.teacher.path)
    elif isinstance(teacher, LocalTeacher):
        other = teacher.tokenizer
    else:
        raise ConfigError(
            f"Arm 'opd' reads the teacher's logits, but {teacher.name} only writes text: give a local teacher."
        )
    if not tokenizer.has_same_vocabulary(other):
        raise ConfigError(
            "Arm 'opd' compares distributions over one vocabulary, but the teacher's tokenizer differs from the "
            "student's: choose a teacher of the same family, or an arm that reads text (verify, branch, imitate, sft)."
        )


def white_box(teacher: Teacher, mesh: Mesh) -> Model:
    """The teacher's model on the mesh, for the step."""
    assert isinstance(teacher, LocalTeacher)
    return sharding.placed(teacher.model, mesh)
