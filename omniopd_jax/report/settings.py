"""A run's settings: what differs from the defaults first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniopd_jax.report.text import clean, number


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → value."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[clean(dotted)] = value
    return flat


def shown(value: object) -> str:
    """A setting as one reads it."""
    if isinstance(value, bool) or value is None or value == "":
        return {True: "true", False: "false", None: "null", "": '""'}[value]  # type: ignore[index]
    if isinstance(value, (int, float)):
        finite = number(value)
        return repr(value) if finite is None else f"{finite:g}" if isinstance(finite, float) else str(finite)
    text = clean(value)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text) - 400:,} more characters)"


def settings(config: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """{"changed": [[name, value, default]], "all": [[name, value]]}; "changed" is None without known defaults."""
    flat = flatten(config)
    rows = [[name, shown(value)] for name, value in sorted(flat.items())]
    if defaults is None:
        return {"changed": None, "all": rows}
    base = flatten(defaults)
    changed = [
        [name, shown(value), shown(base[name]) if name in base else "–"]
        for name, value in sorted(flat.items())
        if name not in base or base[name] != value
    ]
    return {"changed": changed, "all": rows}


def differences(configs: list[Mapping[str, Any]], ignored: frozenset[str] = frozenset()) -> dict[str, list[str]]:
    """The settings that are not the same in all configs: name → value in each, as shown."""
    flats = [flatten(config) for config in configs]
    names = sorted(set().union(*flats) - ignored) if flats else []
    columns = {name: [shown(flat[name]) if name in flat else "–" for flat in flats] for name in names}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}
