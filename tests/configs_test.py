"""Configs build, validate and are read; what does not fit is refused in one sentence."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, compare_small, tiny
from omniopd_jax import config as config_lib
from omniopd_jax.config import ConfigError
from omniopd_jax.train import small_world
from omniopd_jax.train.sharding import MESH_AXES
from omniopd_jax.worlds import WORLDS, get_world

ROOT = Path(__file__).resolve().parents[1]
NAMES = [*sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")]
ARGUMENTS = {
    "tiny": ("", *tiny.ARMS),
    "compare_small": ("", "fast", *compare_small.SECTIONS),
    "quickstart": ("", "recommended", "published", "branch"),
}


def _cases():
    return [(name, argument) for name in NAMES for argument in ARGUMENTS.get(name, ("",))]


@pytest.mark.parametrize(("name", "argument"), _cases(), ids=lambda value: value or "-")
def test_every_config_builds_and_validates(name, argument):
    module = importlib.import_module(f"configs.{name}")
    values = module.get_config(argument) if argument else module.get_config()
    config = config_lib.from_mapping(values)
    assert config_lib.from_mapping(config_lib.to_dict(config)) == config
    assert module.__doc__ is not None
    if name != "base":
        assert f"configs/{name}.py" in module.__doc__, "the header shows the command that runs it"


def test_base_and_dataclasses_name_the_same_knobs():
    values = base.get_config().to_dict()
    for section in dataclasses.fields(config_lib.Config):
        kind = config_lib.Config.__annotations__[section.name]
        fields = {field.name for field in dataclasses.fields(getattr(config_lib, kind))}
        assert set(values[section.name]) == fields, section.name
    assert len(values) == len(dataclasses.fields(config_lib.Config))


def test_every_knob_is_read_somewhere():
    """A knob that nothing reads is a promise that nobody keeps. (The mesh reads its sizes by their names.)"""
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for room in ("omniopd_jax", "experiments")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "config.py"
    )
    unread = [
        f"{section}.{knob}"
        for section, knobs in base.get_config().to_dict().items()
        for knob in knobs
        if not (section == "mesh" and knob in MESH_AXES)
        and not re.search(rf"\b(?:{section}|settings|\w*config)\.{knob}\b", text)
    ]
    assert not unread


def test_every_choice_is_checked():
    for name in config_lib._CHOICES:
        values = base.get_config()
        section, knob = name.split(".")
        values[section][knob] = "nonsense"
        with pytest.raises(ConfigError, match=rf"config\.{name}='nonsense' must be one of"):
            config_lib.from_mapping(values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, 0, "greater than 0") for name in config_lib._POSITIVE]
    + [(name, -1, "must not be negative") for name in config_lib._NOT_NEGATIVE]
    + [(name, bound + 1, f"at most {bound}") for name, bound in config_lib._AT_MOST.items()]
    + [(name, 1, "less than 1") for name in config_lib._BELOW_ONE],
)
def test_every_bound_is_checked(name, value, message):
    values = base.get_config().to_dict()
    section, knob = name.split(".")
    values[section][knob] = value
    with pytest.raises(ConfigError, match=rf"config\.{name} .*{message}"):
        config_lib.from_mapping(values)


def test_every_number_has_a_bound():
    """A number that nothing bounds fails later, in the middle of a run."""
    tables = (*config_lib._POSITIVE, *config_lib._NOT_NEGATIVE, *config_lib._AT_MOST, *config_lib._CHOICES)
    free = {"teacher.token_slack", "mesh.data", "mesh.fsdp", "mesh.tensor"}  # checked by themselves
    numbers = {
        f"{section}.{knob}"
        for section, knobs in base.get_config().to_dict().items()
        for knob, value in knobs.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers - set(tables) == free


def test_the_world_has_as_many_phrasings_as_the_config_allows():
    for world in WORLDS.values():
        assert config_lib._AT_MOST["world.phrasings"] == len(world.MARKS)


def test_the_widest_problem_fits_the_worlds_models():
    size = config_lib._AT_MOST["world.size"]
    for kind, world in WORLDS.items():
        [problem] = world.problems(np.random.default_rng(0), 1, size)
        texts = [world.solution(problem, np.random.default_rng(seed), phrasings=3) for seed in range(20)]
        longest = max(map(len, texts))  # in characters: one of the tokenizers has one token each
        model = small_world.model_config(64, 1, vocab_size=len(world.vocabulary()))
        assert len(problem.question) + longest + 4 <= model.max_positions, kind


def test_there_are_as_many_problems_as_the_config_counts():
    for kind, count in config_lib._NUM_PROBLEMS.items():
        assert [count(size) for size in (1, 2, 5)] == [get_world(kind).num_problems(size) for size in (1, 2, 5)]
    assert {"", *WORLDS} == set(config_lib._CHOICES["world.kind"])


@pytest.mark.parametrize("width", range(8, 104, 8))
def test_every_width_that_the_config_allows_makes_a_model(width):
    assert small_world.model_config(width, 1, vocab_size=32).head_dim == width // 4


def test_the_data_section_of_a_work_directory(tmp_path):
    path = tmp_path / "config.json"
    values = base.get_config().to_dict()
    values["data"]["system_prompt"] = "Be brief."
    path.write_text(json.dumps(values | {"audit": {}}), encoding="utf-8")
    assert config_lib.read_data(path).system_prompt == "Be brief."
    for text, message in (("{", "not valid JSON"), ("[]", "no section 'data'"), ('{"data": {}}', "is missing")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            config_lib.read_data(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit.num_chunks": 0}, "config.audit.num_chunks must be greater than 0, got 0."),
        ({"objective.anchor_weight": -0.1}, "config.objective.anchor_weight must not be negative, got -0.1."),
        ({"rollout.batch_size": 6, "rollout.samples_per_prompt": 4}, "must be a multiple of"),
        ({"rollout.batch_size": 6, "train.micro_batch_size": 4}, "must be a multiple of"),
        ({"audit.max_fraction": 1.5}, "config.audit.max_fraction must be at most 1, got 1.5."),
        ({"teacher.top_p": 0.0}, "config.teacher.top_p must be greater than 0, got 0.0."),
        ({"teacher.top_p": 1.1}, "config.teacher.top_p must be at most 1, got 1.1."),
        ({"teacher.token_slack": 0.5}, "config.teacher.token_slack must be at least 1, got 0.5"),
        ({"teacher.max_dollars": float("nan")}, "config.teacher.max_dollars must not be negative, got nan."),
        ({"rollout.top_p": 0.0}, "config.rollout.top_p must be greater than 0, got 0.0."),
        ({"rollout.min_p": 1.5}, "config.rollout.min_p must be at most 1, got 1.5."),
        ({"audit.entropy_source": "both"}, "config.audit.entropy_source='both' must be one of 'decode', 'rescore'"),
        ({"objective.repulsion": 2.0}, "config.objective.repulsion must be at most 1, got 2.0."),
        ({"optimizer.b1": 1.0}, "config.optimizer.b1 must be less than 1, got 1.0."),
        ({"student.param_dtype": "fp32"}, "config.student.param_dtype='fp32' must be one of 'float32'"),
        ({"student.param_dtype": "auto"}, "config.student.param_dtype='auto' must be one of 'float32'"),
        ({"train.seed": -1}, "config.train.seed must not be negative, got -1."),
        ({"train.seed": 2**32}, "config.train.seed must be at most 4294967295, got 4294967296."),
        ({"world.phrasings": 4}, "config.world.phrasings must be at most 3, got 4."),
        ({"world.slip": 1.5}, "config.world.slip must be at most 1, got 1.5."),
        ({"world.student_steps": 0}, "config.world.student_steps must be greater than 0, got 0."),
        ({"world.student_width": 36}, "config.world.student_width must be a multiple of 8, got 36."),
        ({"world.teacher_width": 34}, "config.world.teacher_width must be a multiple of 8, got 34."),
        ({"world.size": 1, "world.train_problems": 90, "world.eval_problems": 11}, "101 in all, but of"),
        ({"audit.chunk_tokens": 300}, "config.audit.chunk_tokens=300 never fits"),
        ({"objective.arm": "branch", "objective.num_branches": 1}, "at least 2"),
        ({"objective.arm": "grpo"}, "config.rollout.samples_per_prompt=1 must be at least 2"),
        ({"objective.arm": "opd", "teacher.kind": "anthropic"}, "config.teacher.kind='anthropic' shows no logits"),
        ({"objective.arm": "opd", "objective.divergence": "sampled", "objective.top_k": 5}, "top_k must be 0"),
        ({"objective.arm": "mixture"}, "needs a weight above 0 in config.objective.weights"),
        ({"objective.weights.branch": -1.0}, "config.objective.weights.branch must not be negative"),
        ({"objective.normalise": "response"}, "does not fit arm 'verify', whose unit is the chunk"),
        ({"objective.arm": "sft", "audit.control": "shuffled"}, "replaces scores, which arm 'sft' does not use"),
        ({"train.updates_per_batch": 2}, "must be 1 with arm 'verify'"),
        ({"lora.targets": "("}, "not a regular expression"),
        (
            {"rollout.batch_size": 8, "pipeline.micro_batches": 4, "pipeline.rollouts": 3},
            "must be a multiple of config.pipeline.rollouts=3",
        ),
        (
            {"rollout.batch_size": 8, "pipeline.micro_batches": 3},
            "must be a multiple of config.pipeline.micro_batches=3",
        ),
        ({"train.checkpoint_best": "eval/greedy_accuracy"}, "needs config.eval.every"),
    ],
)
def test_combinations_that_cannot_run(changes, message):
    values = base.get_config()
    values.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_lib.from_mapping(values)


def test_unknown_and_missing_keys_and_wrong_types():
    values = base.get_config().to_dict()
    with pytest.raises(
        ConfigError, match=r"config\.audit\.num_chunk is not a setting; did you mean config\.audit\.num_chunks"
    ):
        config_lib.from_mapping(values | {"audit": values["audit"] | {"num_chunk": 3}})
    with pytest.raises(ConfigError, match=r"config\.audits is not a setting; did you mean config\.audit\?"):
        config_lib.from_mapping(values | {"audits": {}})
    with pytest.raises(ConfigError, match=r"config\.audit must be a group of settings, got 3"):
        config_lib.from_mapping(values | {"audit": 3})
    without = {name: knobs for name, knobs in values.items() if name != "mesh"}
    with pytest.raises(ConfigError, match=r"config\.mesh is missing"):
        config_lib.from_mapping(without)
    with pytest.raises(ConfigError, match=r"config\.train\.steps must be int, got '5'"):
        config_lib.from_mapping(values | {"train": values["train"] | {"steps": "5"}})
    with pytest.raises(ConfigError, match=r"config\.train\.steps must be int, got True"):
        config_lib.from_mapping(values | {"train": values["train"] | {"steps": True}})
    assert config_lib.from_mapping(ConfigDict(values | {"audit": values["audit"] | {"max_fraction": 1}}))
