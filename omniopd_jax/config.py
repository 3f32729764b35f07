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
    attention: str


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
    attention: str
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
    task: str
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
    slots: int
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    num_chunks: int
    chunk_tokens: int
    num_continuations: int
    similarity: str
    embedding_model: str
    positions: str
    max_fraction: float
    entropy_source: str
    control: str


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    verify: float
    branch: float
    imitate: float
    sft: float
    opd: float
    grpo: float


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    arm: str
    weights: WeightsConfig
    prior_strength: float
    anchor_weight: float
    anchor_tokens: str
    anchor_estimator: str
    normalise: str
    baseline: str
    num_branches: int
    repulsion: float
    confidence_power: float
    divergence: str
    divergence_beta: float
    top_k: int
    clip: float
    scale_advantage: bool


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
    updates_per_batch: int
    micro_batch_size: int
    remat: str
    block_tokens: int
    list_tokens_from: int
    checkpoint_every: int
    checkpoint_keep: int
    checkpoint_keep_every: int
    checkpoint_best: str
    audit_log_every: int
    compilation_cache: str


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    micro_batches: int
    rollouts: int
    staleness: int


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
    samples: int
    task: str
    instruction: str
    sandbox: str
    allow_unsandboxed: bool
    timeout_s: float
    memory_mb: int


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    kind: str
    path: str
    seed: int
    size: int
    train_problems: int
    validation_problems: int
    eval_problems: int
    phrasings: int
    misconception: float
    slip: float
    teacher_misconception: float
    teacher_tokenizer: str
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
    wandb: str


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
    pipeline: PipelineConfig
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


def read_data(path: Path) -> DataConfig:
    """The section `data` of a work directory's config.json.

    The other sections are not looked at: a model can be measured although its run could not be repeated now.

    Raises:
      ConfigError: not JSON, or without such a section.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict) or "data" not in values:
        raise ConfigError(f"{path} has no section 'data': it is not a run's config.json.")
    return _freeze(DataConfig, values["data"], f"{path}: config.data")


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


_DTYPES = ("float32", "bfloat16", "float16")
_TRAINED_DTYPES = ("float32", "bfloat16")  # in float16 the ε of AdamW is 0
_TASKS = ("gsm8k", "math", "aime", "amc", "olympiad", "humaneval", "mbpp", "livecodebench")
_CHOICES = {
    "student.param_dtype": _TRAINED_DTYPES,
    "student.compute_dtype": ("auto", *_DTYPES),
    "student.attention": ("auto", "xla", "cudnn", "splash"),
    "reference.dtype": ("same", *_DTYPES),
    "optimizer.state_dtype": _TRAINED_DTYPES,
    "lora.export": ("merged", "peft"),
    "teacher.kind": ("local", "self", "openai", "anthropic", "gemini", "scripted"),
    "teacher.attention": ("auto", "xla", "cudnn", "splash"),
    "teacher.mode": ("auto", "completions", "prefill", "instruct"),
    "audit.positions": ("peak", "entropy_weighted", "random", "lowest"),
    "audit.entropy_source": ("decode", "rescore"),
    "audit.control": ("none", "constant", "shuffled"),
    "objective.arm": ("verify", "branch", "imitate", "sft", "opd", "grpo", "anchor", "mixture"),
    "objective.anchor_tokens": ("unaudited", "all"),
    "objective.anchor_estimator": ("exact", "k3"),
    "objective.normalise": ("token", "sequence", "response"),
    "objective.divergence": ("reverse_kl", "forward_kl", "jensen_shannon", "sampled"),
    "objective.baseline": ("none", "leave_one_out", "teacher_agreement"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "train.remat": ("none", "full", "dots"),
    "data.task": ("", *_TASKS),
    "eval.task": ("auto", *_TASKS, "world"),
    "world.kind": ("", "arithmetic", "rewriting"),
    "world.teacher_tokenizer": ("words", "characters"),
}
_SIMILARITY = re.compile(r"(edit|edit_words|exact|rouge1|rouge_l|embedding)(\^(?=.*[1-9])\d*\.?\d+)?")
_POSITIVE = (
    "lora.alpha",
    "teacher.top_p",
    "teacher.max_concurrency",
    "teacher.request_timeout_s",
    "teacher.max_attempts",
    "teacher.step_deadline_s",
    "data.max_prompt_tokens",
    "rollout.batch_size",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "audit.num_chunks",
    "audit.chunk_tokens",
    "audit.num_continuations",
    "audit.max_fraction",
    "objective.num_branches",
    "objective.divergence_beta",
    "objective.clip",
    "train.updates_per_batch",
    "optimizer.learning_rate",
    "optimizer.eps",
    "train.steps",
    "train.block_tokens",
    "train.checkpoint_keep",
    "pipeline.micro_batches",
    "eval.problems",
    "eval.samples",
    "eval.timeout_s",
    "eval.memory_mb",
    "world.size",
    "world.train_problems",
    "world.eval_problems",
    "world.phrasings",
    "world.teacher_width",
    "world.teacher_layers",
    "world.teacher_steps",
    "world.student_width",
    "world.student_layers",
    "world.student_steps",
    "world.batch_size",
    "world.learning_rate",
)
_NOT_NEGATIVE = (
    "eval.batch_size",
    "lora.rank",
    "teacher.temperature",
    "teacher.requests_per_minute",
    "teacher.tokens_per_minute",
    "teacher.max_missing_fraction",
    "teacher.max_refusal_fraction",
    "teacher.max_dollars",
    "teacher.max_calls",
    "teacher.max_tokens",
    "objective.prior_strength",
    "objective.anchor_weight",
    "objective.repulsion",
    "objective.confidence_power",
    "objective.top_k",
    "optimizer.warmup_steps",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "rollout.slots",
    "rollout.top_k",
    "rollout.min_p",
    "train.max_teacher_tokens",
    "train.seed",
    "train.micro_batch_size",
    "train.list_tokens_from",
    "train.checkpoint_every",
    "train.checkpoint_keep_every",
    "pipeline.rollouts",
    "pipeline.staleness",
    "train.audit_log_every",
    "eval.every",
    "eval.max_new_tokens",
    "world.seed",
    "world.validation_problems",
    "world.misconception",
    "world.slip",
    "world.teacher_misconception",
)
_LARGEST_SEED = 2**32 - 1  # what a random key of jax tells apart
_AT_MOST = {
    "teacher.top_p": 1,
    "teacher.max_missing_fraction": 1,
    "teacher.max_refusal_fraction": 1,
    "rollout.top_p": 1,
    "rollout.min_p": 1,
    "audit.max_fraction": 1,
    "objective.repulsion": 1,
    "train.seed": _LARGEST_SEED,
    "world.seed": _LARGEST_SEED,
    "world.size": 9,  # a problem and its solution fit the models' 512 positions
    "world.phrasings": 3,  # as many as each world has
    "world.misconception": 1,
    "world.teacher_misconception": 1,
    "world.slip": 1,
}
_BELOW_ONE = ("optimizer.b1", "optimizer.b2", "objective.divergence_beta", "objective.clip")
# Problems of a size that a world has: as its `num_problems` says, which lies further downstream.
_NUM_PROBLEMS = {"arithmetic": lambda size: 10 ** (2 * size), "rewriting": lambda size: 7**size}
_WIDTH_STEP = 8  # the small world's models have 4 heads, whose width rope needs to be even


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
    for name, bound in _AT_MOST.items():
        if not _get(config, name) <= bound:
            raise ConfigError(f"config.{name} must be at most {bound}, got {_get(config, name)}.")
    for name in _BELOW_ONE:
        if not _get(config, name) < 1:
            raise ConfigError(f"config.{name} must be less than 1, got {_get(config, name)}.")
    if not config.teacher.token_slack >= 1:
        raise ConfigError(
            f"config.teacher.token_slack must be at least 1, got {config.teacher.token_slack}: the teacher is asked "
            "for no fewer tokens than it is compared with."
        )
    _check_world(config.world)
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
    if rollout.batch_size % config.pipeline.micro_batches:
        raise ConfigError(
            f"config.rollout.batch_size={rollout.batch_size} must be a multiple of "
            f"config.pipeline.micro_batches={config.pipeline.micro_batches}."
        )
    if config.pipeline.rollouts and config.pipeline.micro_batches % config.pipeline.rollouts:
        raise ConfigError(
            f"config.pipeline.micro_batches={config.pipeline.micro_batches} must be a multiple of "
            f"config.pipeline.rollouts={config.pipeline.rollouts}: what is sampled together is audited in whole parts."
        )
    if train.checkpoint_best and not config.eval.every:
        raise ConfigError(
            f"config.train.checkpoint_best={train.checkpoint_best!r} needs config.eval.every: an evaluation "
            "tells which checkpoint is the best."
        )
    has_chunks = bool({"verify", "branch", "imitate"} & set(mixed_arms(config.objective.arm, config.objective.weights)))
    if has_chunks and audit.chunk_tokens > rollout.max_new_tokens * audit.max_fraction:
        raise ConfigError(
            f"config.audit.chunk_tokens={audit.chunk_tokens} never fits: a response has at most "
            f"config.rollout.max_new_tokens={rollout.max_new_tokens} tokens, of which "
            f"config.audit.max_fraction={audit.max_fraction} may be audited."
        )
    _check_arms(config)
    if not re.fullmatch(r"(local|https?://\S+)?", config.eval.sandbox):
        raise ConfigError(
            f"config.eval.sandbox={config.eval.sandbox!r} must be '', 'local' or the address of a service: "
            "http://HOST:PORT."
        )
    if config.eval.instruction != "auto" and "{problem}" not in config.eval.instruction:
        raise ConfigError("config.eval.instruction must be 'auto' or a text with {problem} in it.")
    if not _SIMILARITY.fullmatch(audit.similarity):
        raise ConfigError(
            f"config.audit.similarity={audit.similarity!r} must be {_SIMILARITY.pattern.split(')')[0].strip('(')}, "
            "with ^p for a power p > 0."
        )
    try:
        re.compile(config.lora.targets)
    except re.error as error:
        raise ConfigError(f"config.lora.targets is not a regular expression: {error}.") from error


def mixed_arms(arm: str, weights: WeightsConfig) -> dict[str, float]:
    """The arms that are trained and the weight of each: the one of `objective.arm`, or those of a mixture."""
    if arm != "mixture":
        return {arm: 1.0}
    return {name: weight for name, weight in dataclasses.asdict(weights).items() if weight > 0}


def _check_arms(config: Config) -> None:
    objective, rollout = config.objective, config.rollout
    for name, weight in dataclasses.asdict(objective.weights).items():
        if not weight >= 0:
            raise ConfigError(f"config.objective.weights.{name} must not be negative, got {weight}.")
    arms = mixed_arms(objective.arm, objective.weights)
    if not arms:
        raise ConfigError("config.objective.arm='mixture' needs a weight above 0 in config.objective.weights.")
    if "branch" in arms and objective.num_branches < 2:
        raise ConfigError("config.objective.num_branches must be at least 2: a branch is compared with the others.")
    if "grpo" in arms and rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"config.rollout.samples_per_prompt={rollout.samples_per_prompt} must be at least 2: arm 'grpo' compares "
            "the responses of one prompt with each other."
        )
    if "opd" in arms and config.teacher.kind not in ("local", "self"):
        raise ConfigError(
            f"config.teacher.kind={config.teacher.kind!r} shows no logits: arm 'opd' needs a local teacher with the "
            "student's vocabulary (teacher.kind='local' and teacher.path)."
        )
    if "opd" in arms and objective.divergence == "sampled" and objective.top_k:
        raise ConfigError(
            "config.objective.top_k must be 0 with objective.divergence='sampled', which reads one token."
        )
    chunked = [name for name in arms if name in ("verify", "branch", "imitate")]
    if objective.normalise == "response" and chunked:
        raise ConfigError(
            f"config.objective.normalise='response' does not fit arm {chunked[0]!r}, whose unit is the chunk: choose "
            "'token' or 'sequence'."
        )
    if config.audit.control != "none" and not {"verify", "branch"} & set(arms):
        raise ConfigError(
            f"config.audit.control={config.audit.control!r} replaces scores, which arm {objective.arm!r} does not use: "
            "choose arm 'verify' or 'branch'."
        )
    unclipped = [name for name in arms if name in ("verify", "branch")]
    unclipped += ["opd"] if "opd" in arms and objective.divergence == "sampled" else []
    if config.train.updates_per_batch > 1 and unclipped:
        raise ConfigError(
            f"config.train.updates_per_batch={config.train.updates_per_batch} must be 1 with arm {unclipped[0]!r}: its "
            "weights hold for the student that sampled the batch, and no ratio corrects them."
        )


def _check_world(world: WorldConfig) -> None:
    for name in ("teacher_width", "student_width"):
        if getattr(world, name) % _WIDTH_STEP:
            raise ConfigError(f"config.world.{name} must be a multiple of {_WIDTH_STEP}, got {getattr(world, name)}.")
    asked = world.train_problems + world.validation_problems + world.eval_problems
    there_are = _NUM_PROBLEMS[world.kind or "arithmetic"](world.size)
    if asked > there_are:
        raise ConfigError(
            f"config.world.train_problems={world.train_problems}, config.world.validation_problems="
            f"{world.validation_problems} and config.world.eval_problems={world.eval_problems} are {asked} in all, but "
            f"of config.world.size={world.size} there are {there_are} problems."
        )
