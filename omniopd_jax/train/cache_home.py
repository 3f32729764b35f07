"""The user's folder of what can be made again: compiled programs, copies of buckets, other programs' environments."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """This project's part of $XDG_CACHE_HOME, or of ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omniopd_jax"
