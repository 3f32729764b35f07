"""Writing a folder whole or not at all, and the small files that travel with a model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from omniopd_jax.models.families import ModelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)


def replace_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a fresh folder and moves it to `destination` in one rename; on failure nothing changes."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if destination.exists() and not destination.is_dir():
        raise ModelError(f"{destination} is a file; a model is saved into a folder.")
    fresh = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        write(fresh)
        os.chmod(fresh, 0o755)
        if destination.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
            os.rename(destination, old / "model")
            os.rename(fresh, destination)
            shutil.rmtree(old)
        else:
            os.rename(fresh, destination)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def copy_files(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
