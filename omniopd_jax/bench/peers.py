"""Rival libraries, each in a virtual environment of its own under the cache folder, from pinned requirements."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from omniopd_jax.types import InputError

# rival → (environment, script that speaks `protocol`)
RIVALS = {
    "torch": ("trl", "torch_peer.py"),
    "transformers": ("trl", "torch_peer.py"),
    "trl": ("trl", "torch_peer.py"),
    "tunix": ("tunix", "tunix_peer.py"),
}


def commands(scripts: Path, cache: Path, say: Callable[[str], None]) -> dict[str, tuple[str, ...]]:
    """Makes the environments that are missing. Returns each rival's command.

    Args:
      scripts: folder of the rivals' scripts and requirement files.
      cache: where environments are kept; one is made anew when its requirements change.

    Raises:
      InputError: an environment cannot be made.
    """
    pythons = {name: _environment(name, scripts, cache, say) for name in {name for name, _ in RIVALS.values()}}
    return {rival: (str(pythons[name]), str(scripts / script)) for rival, (name, script) in RIVALS.items()}


def _environment(name: str, scripts: Path, cache: Path, say: Callable[[str], None]) -> Path:
    requirements = scripts / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = cache / f"{name}-{digest}"
    python = folder / "bin" / "python"
    is_complete = folder / "complete"
    if is_complete.is_file():
        return python
    say(f"a virtual environment for {name} is made in {folder}")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"No environment for {name}: {' '.join(command)} says: {done.stderr.strip()[-800:]}")
    is_complete.touch()
    return python
