"""The edge between a ConfigDict and the rest: frozen dataclasses inside, one clear sentence an error.

`configs/base.py` holds each knob's default, unit and paper symbol; the classes here hold its name and type. Unknown
keys raise and name the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.types import InputError


class ConfigError(InputError):
    """A config that cannot run; the message says which field and what would be right."""


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    path: str
    param_dtype: str
    compute_dtype: str


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    targets: str
    export: str


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    dtype: str


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    kind: str
    path: str
    base_url: str
    model: str
    mode: str
    capabilities: str
    temperature: float
    top_p: float
    api_key_env: str
    allow_insecure_http: bool
    max_concurrency: int
    requests_per_minute: int
    tokens_per_minute: int
    request_timeout_s: float
    max_attempts: int
    step_deadline_s: float
    max_missing_fraction: float
    max_refusal_fraction: float
    token_slack: float
    cache_path: str
    replay_only: bool
    dry_run: bool
    prices: str
    max_dollars: float
    max_calls: int
    max_tokens: int
    script: str


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str
    eval: str
    prompt_field: str
    answer_field: str
    use_chat_template: bool
    template_args: Mapping[str, Any]
    system_prompt: str
    max_prompt_tokens: int
    shuffle: bool


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    batch_size: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    num_chunks: int
    chunk_tokens: int
    num_continuations: int
    similarity: str
    embedding_model: str
    positions: str
    max_fraction: float


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    arm: str
    prior_strength: float
    anchor_weight: float
    anchor_tokens: str
    normalise: str
    baseline: str
    num_branches: int
    repulsion: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    schedule: str
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    state_dtype: str


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    max_teacher_tokens: int
    seed: int
    micro_batch_size: int
    remat: str
    block_tokens: int
    checkpoint_every: int
    checkpoint_keep: int
    audit_log_every: int
    compilation_cache: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int
    problems: int
    batch_size: int
    max_new_tokens: int
    task: str


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    kind: str
    path: str
    seed: int
    digits: int
    train_problems: int
    eval_problems: int
    phrasings: int
    forget_carry: float
    slip: float
    teacher_width: int
    teacher_layers: int
    teacher_steps: int
    student_width: int
    student_layers: int
    student_steps: int
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Sections and knobs: `configs/base.py`."""

    student: StudentConfig
    lora: LoraConfig
    reference: ReferenceConfig
    teacher: TeacherConfig
    data: DataConfig
    rollout: RolloutConfig
    audit: AuditConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    eval: EvalConfig
    world: WorldConfig
    logging: LoggingConfig


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Freezes and validates a ConfigDict (or any nested mapping).

    Raises:
      ConfigError: an unknown key (with the nearest known one), a missing key, a value of another type, or a
        combination that cannot run.
    """
    to_plain = getattr(values, "to_dict", None)  # ml_collections.ConfigDict
    config = _freeze(Config, to_plain() if to_plain else values, "config")
    validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The nested mapping that `from_mapping` reads back."""
    return dataclasses.asdict(config)


def save(config: Config, path: Path) -> None:
    """Writes config.json. No secret can be in it: keys come from the environment by name."""
    path.write_text(json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(path: Path) -> Config:
    return from_mapping(json.loads(path.read_text(encoding="utf-8")))


def _freeze(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a group of settings, got {values!r}.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
            raise ConfigError(f"{where}.{name} is not a setting; did you mean {where}.{nearest[0]}?")
    missing = [name for name in hints if name not in values]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is missing; start from configs/base.py.")
    fields = {}
    for name, hint in hints.items():
        value = values[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            fields[name] = _freeze(hint, value, f"{where}.{name}")
        else:
            fields[name] = _typed(value, hint, f"{where}.{name}")
    return kind(**fields)


def _typed(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is not None:  # Mapping[str, Any]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a group of settings, got {value!r}.")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value


_CHOICES = {
    "lora.export": ("merged", "peft"),
    "teacher.kind": ("local", "openai", "anthropic", "gemini", "scripted"),
    "teacher.mode": ("auto", "completions", "prefill", "instruct"),
    "audit.positions": ("peak", "entropy_weighted", "random"),
    "objective.arm": ("verify", "branch"),
    "objective.anchor_tokens": ("unaudited", "all"),
    "objective.normalise": ("token", "sequence"),
    "objective.baseline": ("none", "leave_one_out", "teacher_agreement"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "train.remat": ("none", "full", "dots"),
    "eval.task": ("auto", "math", "world"),
    "world.kind": ("", "arithmetic"),
}
_SIMILARITY = re.compile(r"(edit|edit_words|exact|rouge1|rouge_l|embedding)(\^(?=.*[1-9])\d*\.?\d+)?")
_POSITIVE = (
    "teacher.max_concurrency",
    "teacher.request_timeout_s",
    "teacher.max_attempts",
    "teacher.step_deadline_s",
    "data.max_prompt_tokens",
    "rollout.batch_size",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "audit.num_chunks",
    "audit.chunk_tokens",
    "audit.num_continuations",
    "audit.max_fraction",
    "objective.num_branches",
    "optimizer.learning_rate",
    "train.steps",
    "train.block_tokens",
    "train.checkpoint_keep",
    "eval.problems",
    "eval.batch_size",
)
_NOT_NEGATIVE = (
    "lora.rank",
    "teacher.temperature",
    "objective.prior_strength",
    "objective.anchor_weight",
    "objective.repulsion",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "train.max_teacher_tokens",
    "train.micro_batch_size",
    "train.checkpoint_every",
    "train.audit_log_every",
    "eval.every",
)


def _get(config: Config, name: str) -> Any:
    section, knob = name.split(".")
    return getattr(getattr(config, section), knob)


def validate(config: Config) -> None:
    """Raises ConfigError with one sentence for the first thing that does not fit."""
    for name, choices in _CHOICES.items():
        if _get(config, name) not in choices:
            raise ConfigError(f"config.{name}={_get(config, name)!r} must be one of {', '.join(map(repr, choices))}.")
    for name in _POSITIVE:
        if not _get(config, name) > 0:
            raise ConfigError(f"config.{name} must be greater than 0, got {_get(config, name)}.")
    for name in _NOT_NEGATIVE:
        if not _get(config, name) >= 0:
            raise ConfigError(f"config.{name} must not be negative, got {_get(config, name)}.")
    rollout, audit, train = config.rollout, config.audit, config.train
    if rollout.batch_size % rollout.samples_per_prompt:
        raise ConfigError(
            f"config.rollout.batch_size={rollout.batch_size} must be a multiple of "
            f"config.rollout.samples_per_prompt={rollout.samples_per_prompt}."
        )
    if train.micro_batch_size and rollout.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"config.rollout.batch_size={rollout.batch_size} must be a multiple of "
            f"config.train.micro_batch_size={train.micro_batch_size}."
        )
    if audit.max_fraction > 1:
        raise ConfigError(f"config.audit.max_fraction is a share of the response, at most 1, got {audit.max_fraction}.")
    if audit.chunk_tokens > rollout.max_new_tokens * audit.max_fraction:
        raise ConfigError(
            f"config.audit.chunk_tokens={audit.chunk_tokens} never fits: a response has at most "
            f"config.rollout.max_new_tokens={rollout.max_new_tokens} tokens, of which "
            f"config.audit.max_fraction={audit.max_fraction} may be audited."
        )
    if config.objective.arm == "branch" and config.objective.num_branches < 2:
        raise ConfigError("config.objective.num_branches must be at least 2: a branch is compared with the others.")
    if not _SIMILARITY.fullmatch(audit.similarity):
        raise ConfigError(
            f"config.audit.similarity={audit.similarity!r} must be {_SIMILARITY.pattern.split(')')[0].strip('(')}, "
            "with ^p for a power p > 0."
        )
    try:
        re.compile(config.lora.targets)
    except re.error as error:
        raise ConfigError(f"config.lora.targets is not a regular expression: {error}.") from error
