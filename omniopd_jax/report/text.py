"""Model output is hostile input: what is done to a string or a number before it enters a page."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: object) -> str:
    """A string that UTF-8 can hold: lone surrogates become U+FFFD. Anything else than a string becomes its repr."""
    if not isinstance(text, str):
        text = "" if text is None else repr(text)
    return _LONE_SURROGATE.sub("\ufffd", text)


def clipped(text: object, limit: int) -> str | dict[str, Any]:
    """The text, or {"text": its first `limit` characters, "more": how many were left out}."""
    if isinstance(text, str) and len(text) > limit:
        return {"text": clean(text[:limit]), "more": len(text) - limit}
    return clean(text)


def number(value: object) -> float | int | None:
    """A finite number with six significant digits, or None."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if abs(value) < 2**53 else float(f"{value:.6g}") if abs(value) < 10**300 else None
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return None


def numbers(values: object, limit: int) -> list[float | int | None]:
    """The first `limit` entries of a list through `number`; [] where it is no list."""
    return [number(value) for value in values[:limit]] if isinstance(values, list) else []


def embed(value: object) -> str:
    """JSON that may stand inside an HTML script element: pure ASCII, no `<`, `>` or `&`.

    Raises:
      ValueError: a number that JSON does not know (NaN, infinity).
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
