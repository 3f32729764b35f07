"""Configs build, validate and are read; what does not fit is refused in one sentence."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from omniopd_jax import config as config_lib
from omniopd_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [*sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")]
ARGUMENTS = {"quickstart": ("", "recommended", "published")}


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
    """A knob that nothing reads is a promise that nobody keeps."""
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
        if not re.search(rf"\b(?:{section}|settings|config)\.{knob}\b", text)
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
    ("changes", "message"),
    [
        ({"audit.num_chunks": 0}, "config.audit.num_chunks must be greater than 0, got 0."),
        ({"objective.anchor_weight": -0.1}, "config.objective.anchor_weight must not be negative, got -0.1."),
        ({"rollout.batch_size": 6, "rollout.samples_per_prompt": 4}, "must be a multiple of"),
        ({"rollout.batch_size": 6, "train.micro_batch_size": 4}, "must be a multiple of"),
        ({"audit.max_fraction": 1.5}, "at most 1, got 1.5"),
        ({"audit.chunk_tokens": 300}, "config.audit.chunk_tokens=300 never fits"),
        ({"objective.arm": "branch", "objective.num_branches": 1}, "at least 2"),
        ({"lora.targets": "("}, "not a regular expression"),
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
