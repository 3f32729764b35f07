"""What each API and model can do: `capabilities.json`, a user's own file before it, and the probe after it.

A record says what is worth trying; the start-up probe says what works.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.config import ConfigError

_OURS = Path(__file__).with_name("capabilities.json")
_CHOICES = {
    "modes": ("completions", "prefill", "instruct"),
    "sampling": ("both", "one", "fixed"),
    "prefill": ("trailing", "continue_final_message", "prefix_flag"),
    "max_tokens_name": ("max_tokens", "max_completion_tokens"),
}


@dataclasses.dataclass(frozen=True)
class Capability:
    """One record. `kind`, `model` and `base_url` say whom it is about, the first match counts."""

    kind: str  # openai | anthropic | gemini
    model: str = "*"  # shell pattern over the model's name
    base_url: str = "*"  # shell pattern over the server's address; "" is the vendor's own
    modes: tuple[str, ...] = ("instruct",)  # continuation modes worth trying, best first
    max_n: int = 1  # samples a call
    seed: bool = False  # a seed is accepted
    sampling: str = "both"  # temperature and top_p: "both" | "one" of them | "fixed" by the provider
    prefill: str = "trailing"  # how the last assistant turn is marked as unfinished
    max_tokens_name: str = "max_tokens"
    extra_chat: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # added to chat calls: thinking off
    extra_completions: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # added to completions calls
    answers_as: tuple[str, ...] = ()  # shell patterns of other names that this model may answer with
    note: str = ""


def find_capability(kind: str, model: str, base_url: str, overrides: str = "") -> Capability:
    """The first record that matches: the user's file before ours.

    Args:
      overrides: path of a JSON file in the layout of `capabilities.json`, or "".

    Raises:
      ConfigError: a file that cannot be read, or a record that says something unknown.
    """
    records = (_read(Path(overrides)) if overrides else []) + _read(_OURS)
    for record in records:
        is_model = record.kind == kind and fnmatch.fnmatchcase(model, record.model)
        if is_model and fnmatch.fnmatchcase(base_url, record.base_url):
            return record
    raise ConfigError(f"No capability record matches config.teacher.kind={kind!r}, model={model!r}.")


def _read(path: Path) -> list[Capability]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} must be a JSON object with a list "records": {error}.') from error
    return [_record(values, f"{path}: record {index}") for index, values in enumerate(records)]


def _record(values: Any, where: str) -> Capability:
    fields = {field.name for field in dataclasses.fields(Capability)}
    if not isinstance(values, dict) or "kind" not in values:
        raise ConfigError(f'{where} must be an object with at least "kind".')
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: {name!r} is not a field; known are {', '.join(sorted(fields))}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, choices in _CHOICES.items():
        given = values.get(name, ())
        for value in given if isinstance(given, tuple) else (given,):
            if value not in choices:
                raise ConfigError(f"{where}: {name}={value!r} must be one of {', '.join(map(repr, choices))}.")
    return Capability(**values)
