"""Paid answers, kept: one sqlite file, shared by the runs and processes of a host.

An answer is filed under what was asked (the body of the call: model, mode, sampling, text), the request's seed and the
sample's number, and is on disk before anybody uses it. What was refused or unusable is kept too: asking again would
cost again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (
  key TEXT PRIMARY KEY, teacher TEXT NOT NULL, mode TEXT NOT NULL, model TEXT NOT NULL, text TEXT NOT NULL,
  finish TEXT NOT NULL, prompt_tokens REAL NOT NULL, completion_tokens REAL NOT NULL, created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS findings (
  teacher TEXT, mode TEXT, finding TEXT NOT NULL, created REAL NOT NULL, PRIMARY KEY (teacher, mode)
) WITHOUT ROWID;
"""
_BUSY_S = 60.0
_KEYS_A_QUERY = 500


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample as it is stored."""

    key: str
    teacher: str  # kind:model, for the statistics
    mode: str
    model: str  # as answered
    text: str  # as answered, not aligned with the prefix
    finish: str  # stop | length | refused | unusable
    prompt_tokens: float  # its share of the call that paid for it
    completion_tokens: float
    created: float  # seconds since 1970


_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Row))
_INSERT = f"INSERT OR IGNORE INTO samples ({_COLUMNS}) VALUES ({', '.join('?' * len(dataclasses.fields(Row)))})"
_INSERT_FINDING = "INSERT OR REPLACE INTO findings VALUES (?, ?, ?, ?)"


def sample_keys(teacher: str, answered: str, mode: str, body: Mapping[str, Any], seed: int, n: int) -> list[str]:
    """The n addresses of a request's samples.

    Args:
      teacher: kind:model as asked.
      answered: the model's name as the probe heard it: an alias that has moved on is another teacher.
      mode: the continuation mode.
      body: what is sent, but for the number of samples and the seed.
      seed: the request's own.
    """
    content = json.dumps(
        [teacher, answered, mode, body, seed], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass"))
    keys = []
    for index in range(n):
        one = digest.copy()
        one.update(b"\x1f%d" % index)
        keys.append(one.hexdigest()[:40])
    return keys


class Cache:
    """A sqlite file in WAL mode. Any thread may read; one thread of its own writes, many answers a transaction.

    Args:
      path: the file; made with its folder where absent. A local disk: WAL does not work over a network.

    Raises:
      OSError: the file cannot be opened as a database.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # of the reading connection
        try:
            self._reader = self._connect()
            self._reader.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise OSError(f"{path} cannot be opened as a teacher cache: {error}.") from error
        self._queue: queue.SimpleQueue[tuple[str, list[tuple], Future[None]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="teacher-cache", daemon=True)
        self._writer.start()

    def get(self, keys: Sequence[str]) -> dict[str, Row]:
        """The rows of those keys that are here."""
        found = {}
        with self._lock:
            for start in range(0, len(keys), _KEYS_A_QUERY):
                some = keys[start : start + _KEYS_A_QUERY]
                marks = ",".join("?" * len(some))
                for values in self._reader.execute(f"SELECT {_COLUMNS} FROM samples WHERE key IN ({marks})", some):
                    found[values[0]] = Row(*values)
        return found

    def put(self, rows: Iterable[Row]) -> Future[None]:
        """Stores rows; the future is done when they are on disk. A key that is here already keeps its first answer."""
        return self._submit(_INSERT, [dataclasses.astuple(row) for row in rows])

    def get_finding(self, teacher: str, mode: str = "auto") -> dict[str, Any] | None:
        """What the last probe of this teacher found (in this mode, "auto": any); answers are replayed in its manner."""
        query = "SELECT finding FROM findings WHERE teacher = ? AND (mode = ? OR ? = 'auto') ORDER BY created DESC"
        with self._lock:
            found = self._reader.execute(query, (teacher, mode, mode)).fetchone()
        return json.loads(found[0]) if found else None

    def put_finding(
        self, teacher: str, mode: str, finding: Mapping[str, Any], created: float | None = None
    ) -> Future[None]:
        text = json.dumps(finding, sort_keys=True)
        return self._submit(_INSERT_FINDING, [(teacher, mode, text, time.time() if created is None else created)])

    def stats(self) -> list[dict[str, Any]]:
        """One object a teacher, mode and way of ending: samples, tokens, first and last day."""
        query = """SELECT teacher, mode, model, finish, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens),
                   MIN(created), MAX(created) FROM samples GROUP BY teacher, mode, model, finish ORDER BY 1, 2, 3, 4"""
        names = ("teacher", "mode", "model", "finish", "samples", "prompt_tokens", "completion_tokens", "first", "last")
        with self._lock:
            return [dict(zip(names, values, strict=True)) for values in self._reader.execute(query)]

    def export_lines(self) -> Iterator[str]:
        """Everything as JSON lines, in key order: findings, then samples."""
        with self._lock:
            for teacher, mode, finding, created in self._reader.execute("SELECT * FROM findings ORDER BY 1, 2"):
                line = {"teacher": teacher, "mode": mode, "finding": json.loads(finding), "created": created}
                yield json.dumps(line, ensure_ascii=False)
            names = [field.name for field in dataclasses.fields(Row)]
            for values in self._reader.execute(f"SELECT {_COLUMNS} FROM samples ORDER BY key"):
                yield json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False)

    def import_lines(self, lines: Iterable[str], name: str = "input") -> int:
        """Adds exported lines; returns the number of samples read.

        Raises:
          ValueError: a line that is not one of ours, by number; lines before it are kept.
        """
        count, rows = 0, []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                if "finding" in values:
                    self.put_finding(values["teacher"], values["mode"], values["finding"], values["created"]).result()
                    continue
                rows.append(Row(**values))
            except (ValueError, TypeError, KeyError) as error:
                self.put(rows).result()
                raise ValueError(f"{name}, line {number}: not a line of a teacher cache: {error}.") from error
            count += 1
            if len(rows) >= 1000:
                self.put(rows).result()
                rows = []
        self.put(rows).result()
        return count

    def close(self) -> None:
        """Writes what is waiting and closes the file."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()
        with self._lock:
            self._reader.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # on disk, not only with the operating system
        return connection

    def _submit(self, statement: str, values: list[tuple]) -> Future[None]:
        future: Future[None] = Future()
        if not self._writer.is_alive():
            future.set_exception(OSError(f"{self.path} is closed."))
        else:
            self._queue.put((statement, values, future))
        return future

    def _write(self) -> None:
        connection: sqlite3.Connection | None = None
        while (item := self._queue.get()) is not None:
            items = [item]
            is_last = False
            while not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    is_last = True
                    break
                items.append(more)
            try:
                connection = connection or self._connect()
                connection.execute("BEGIN IMMEDIATE")
                for statement, values, _ in items:
                    connection.executemany(statement, values)
                connection.execute("COMMIT")
            except Exception as error:  # whatever it was: a future left open would hold its step to the deadline
                with contextlib.suppress(sqlite3.Error):
                    if connection is not None and connection.in_transaction:
                        connection.execute("ROLLBACK")
                _finish(items, lambda future, e=error: future.set_exception(OSError(f"{self.path}: {e}")))
            else:
                _finish(items, lambda future: future.set_result(None))
            if is_last:
                break
        if connection is not None:
            connection.close()


def _finish(items: Sequence[tuple[str, list[tuple], Future[None]]], settle: Callable[[Future[None]], None]) -> None:
    for _, _, future in items:
        if future.set_running_or_notify_cancel():
            settle(future)
