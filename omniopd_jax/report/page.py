"""One self-contained HTML file: template, style, scripts and data. Nothing in it asks the network for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omniopd_jax.report.text import embed

_SCRIPTS = ("text.js", "diff.js", "charts.js", "audits.js", "page.js")


def write_page(path: Path, title: str, head: Mapping[str, Any], pieces: Sequence[str] = ()) -> Path:
    """Writes the page at once or not at all: a reader never sees half a file.

    Args:
      path: the HTML file.
      title: of the browser's tab.
      head: what page.js draws at once.
      pieces: base64 texts that it unpacks when they are needed.
    """
    library = _asset("uplot.min.js")
    style = _asset("uplot.min.css") + "\n" + _asset("page.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();"
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digest(library)} {_digest(script)}",
            f"style-src {_digest(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(title),
        "style": style,
        "library": library,
        "script": script,
        "head": embed(head),
        "pieces": "\n".join(
            f'<script type="text/plain" id="piece-{number}">{piece}</script>' for number, piece in enumerate(pieces)
        ),
    }
    page = "".join(parts.get(name, name) for name in _template())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)
    return path


def _template() -> list[str]:
    """page.html split at its {{names}}: text, name, text, … A name never stands in the data, which comes in later."""
    found = []
    for index, part in enumerate(_asset("page.html").split("{{")):
        name, end, text = part.partition("}}")
        found += [part] if index == 0 or not end else [name, text]
    return found


def _digest(text: str) -> str:
    """What the page's policy calls a script or style by: any other one is refused by the browser."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"


def _asset(name: str) -> str:
    return resources.files("omniopd_jax.report").joinpath("assets", name).read_text(encoding="utf-8")
