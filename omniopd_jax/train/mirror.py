"""Work directories in a bucket (gs://…): a folder on the local disk stands for one, and is copied there.

Logs are appended to, databases are locked, models are renamed into place: object stores know none of that. So a run
works in a local folder, which is filled from the bucket when it starts and copied back at every checkpoint and at the
end. What a crash loses lies after the last checkpoint, and is written again by the resumed run. Checkpoints go straight
to the bucket, written by all processes together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from etils import epath

from omniopd_jax.train.cache_home import cache_home
from omniopd_jax.train.stops import WorkdirError

CHECKPOINTS = "checkpoints"
# What stays on the machine: a database that is written to cannot be copied, and a temporary file is nobody's.
_STAYS = (".sqlite", ".sqlite-wal", ".sqlite-shm", ".new", ".rewritten")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a work directory is an address and no folder of this machine."""
    return "://" in os.fspath(path)


class Mirror:
    """A work directory and its local folder, which are the same for a folder of this machine."""

    def __init__(self, workdir: str | os.PathLike[str]):
        self._address = os.fspath(workdir)
        self.is_remote = is_remote(workdir)
        self._copied: dict[str, tuple[int, int]] = {}  # what is there already: size and time of the local file
        if not self.is_remote:
            self.local = Path(workdir)
            return
        name = hashlib.sha256(self._address.encode()).hexdigest()[:16]
        self.local = cache_home() / "workdirs" / f"{name}-{jax.process_index()}"

    @property
    def checkpoints(self) -> Any:
        """Where the checkpoints go, which all processes see."""
        return epath.Path(self._address) / CHECKPOINTS if self.is_remote else self.local / CHECKPOINTS

    def pull(self) -> None:
        """Makes the local folder what the bucket holds, apart from checkpoints and exports.

        Raises:
          WorkdirError: the bucket cannot be read.
        """
        if not self.is_remote:
            return
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            for path in _files(self.local):
                if not path.name.endswith(_STAYS):
                    path.unlink()
            self._pull(epath.Path(self._address), self.local)
        except Exception as error:  # each kind of store has errors of its own
            raise WorkdirError(f"The work directory {self._address} cannot be read: {_reason(error)}.") from error

    def push(self) -> None:
        """Copies what is new or has changed since the last time.

        Raises:
          WorkdirError: the bucket cannot be written.
        """
        if not self.is_remote:
            return
        try:
            for path in _files(self.local):
                name, status = path.relative_to(self.local).as_posix(), path.stat()
                state = (status.st_size, status.st_mtime_ns)
                if name.endswith(_STAYS) or self._copied.get(name) == state:
                    continue
                there = epath.Path(self._address) / name
                there.parent.mkdir(parents=True, exist_ok=True)
                with path.open("rb") as source, there.open("wb") as target:
                    shutil.copyfileobj(source, target, 2**24)
                self._copied[name] = state
        except Exception as error:
            raise WorkdirError(f"The work directory {self._address} cannot be written: {_reason(error)}.") from error

    def _pull(self, source: Any, target: Path) -> None:
        if not source.exists():
            return
        for path in source.iterdir():
            here = target / path.name
            if path.is_dir():
                if target != self.local or path.name not in (CHECKPOINTS, "model"):
                    self._pull(path, here)
                continue
            here.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as there, here.open("wb") as file:
                shutil.copyfileobj(there, file, 2**24)
            status = here.stat()
            self._copied[here.relative_to(self.local).as_posix()] = (status.st_size, status.st_mtime_ns)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
