"""Compilations: the persistent cache's one set-up, and a counter that shows when something compiles anew."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from omniopd_jax.train.cache_home import cache_home

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def cache_folder(setting: str) -> Path | None:
    """The folder that `train.compilation_cache` names: "auto" is the user's cache folder, "off" or "" is none."""
    if setting in ("off", ""):
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    return cache_home() / "compiled"


def set_up_cache(setting: str) -> Path | None:
    """Points jax's persistent compilation cache at a folder; a folder that cannot be written is only a warning.

    jax saves compilations of a second and more unless told otherwise; on small models most are shorter.
    """
    folder = cache_folder(setting)
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"No compilation cache: {folder} cannot be written ({error.strerror}).", stacklevel=2)
        return None
    if jax.config.values.get("jax_compilation_cache_dir") != str(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()  # jax looks at the folder once, at the first compilation
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


class CompileCounter:
    """Counts the programs that jax compiled or loaded from its cache since the counter was made."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        monitoring.register_event_duration_secs_listener(self._listen)

    def take(self) -> tuple[int, float]:
        """(programs, seconds) since the last call."""
        taken = self.count, self.seconds
        self.count, self.seconds = 0, 0.0
        return taken

    def close(self) -> None:
        monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
