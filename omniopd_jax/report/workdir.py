"""Reads a work directory: also while a run writes to it, and after a crash.

A line that cannot be read is counted, never an error. Where a step was written twice, the later lines hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omniopd_jax.report.text import clean, number


@dataclasses.dataclass(frozen=True)
class Span:
    """Where one line lies in its file, in bytes."""

    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class Audit:
    """One audited chunk: where its line lies, and the few figures that say something about the whole step."""

    span: Span
    text_key: int  # hash of prompt id and chunk text, for this process: finds the same words again
    logprob: float | None  # nats, sum over the chunk
    similarity: float | None  # mean over the continuations received
    is_unanimous: bool | None  # the teacher said the same every time; None where it spoke less than twice


@dataclasses.dataclass
class Response:
    """One response of one step: where its rollout and its audits lie."""

    step: int
    row: int  # index within the step
    prompt_id: str = ""
    rollout: Span | None = None
    repetition: float | None = None  # share of its runs of four tokens that stood in it before
    audits: dict[int, Audit] = dataclasses.field(default_factory=dict)  # slot → audit


@dataclasses.dataclass
class WorkDir:
    """What the files of one run say."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: dict[int, dict[str, float]]  # step → name → value, finite values only; steps ascend
    not_finite: dict[str, list[int]]  # metric → steps where it was NaN or infinite
    responses: dict[tuple[int, int], Response]  # (step, row) → response, ascending
    remarks: list[str]  # one sentence for each thing that could not be read
    modified: float  # seconds since the epoch of the newest line of metrics.jsonl; 0 without one

    @property
    def name(self) -> str:
        return clean(self.path.resolve().name)

    @property
    def last_step(self) -> int:
        return max(self.metrics, default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric, only where it was written."""
        pairs = [(step, row[name]) for step, row in self.metrics.items() if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def setting(self, name: str, default: Any = None) -> Any:
        """A value of config.json by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def read(self, file: str, span: Span) -> dict[str, Any]:
        """One line of `file`, {} where it has changed since it was indexed."""
        with (self.path / file).open("rb") as lines:
            lines.seek(span.offset)
            return parse(lines.read(span.length)) or {}


def read_workdir(path: Path | str) -> WorkDir:
    """Reads config.json, result.json and metrics.jsonl, and indexes rollouts.jsonl and audits.jsonl.

    Raises:
      FileNotFoundError: the folder does not exist or holds none of these files.
    """
    path = Path(path)
    known = ("config.json", "result.json", "metrics.jsonl", "rollouts.jsonl", "audits.jsonl")
    if not any((path / name).is_file() for name in known):
        raise FileNotFoundError(f"{path} is no work directory: it holds none of {', '.join(known)}.")
    remarks: list[str] = []
    metrics, not_finite = _read_metrics(path / "metrics.jsonl", remarks)
    metrics_path = path / "metrics.jsonl"
    return WorkDir(
        path=path,
        config=_read_object(path / "config.json", remarks),
        result=_read_object(path / "result.json", remarks),
        metrics=metrics,
        not_finite=not_finite,
        responses=_index_responses(path, remarks),
        remarks=remarks,
        modified=metrics_path.stat().st_mtime if metrics_path.is_file() else 0.0,
    )


def parse(line: bytes) -> dict[str, Any] | None:
    """One JSON object; broken UTF-8 becomes U+FFFD. None where the line is no object."""
    try:
        value = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_object(path: Path, remarks: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = parse(path.read_bytes())
    if value is None:
        remarks.append(f"{path.name} is not a JSON object and was left out.")
    return value or {}


def _lines(path: Path, remarks: list[str]) -> Iterator[tuple[Span, dict[str, Any]]]:
    """Every readable line that names a step. What is appended meanwhile is for the next report."""
    if not path.is_file():
        return
    size, offset, num_unreadable, is_partial = path.stat().st_size, 0, 0, False
    with path.open("rb") as lines:
        while offset < size and (line := lines.readline()):
            span = Span(offset, len(line))
            offset += len(line)
            value = parse(line)
            if value is not None and _index(value.get("step")) is not None:
                value["step"] = int(value["step"])
                yield span, value
            elif not line.endswith(b"\n"):
                is_partial = True
            elif line.strip():
                num_unreadable += 1
    if num_unreadable:
        remarks.append(f"{num_unreadable:,} of the lines of {path.name} could not be read and were left out.")
    if is_partial:
        remarks.append(
            f"The last line of {path.name} is incomplete and was left out: the run was writing it, or died doing so."
        )


def _index(value: object) -> int | None:
    """A step, row or slot: a whole number ≥ 0, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53:
        return None
    return int(value) if value == int(value) else None


def _read_metrics(path: Path, remarks: list[str]) -> tuple[dict[int, dict[str, float]], dict[str, list[int]]]:
    rows: dict[int, dict[str, float]] = {}
    for _, line in _lines(path, remarks):
        values = {clean(name): value for name, raw in line.items() if (value := _float(raw)) is not None}
        rows.setdefault(int(values.pop("step")), {}).update(values)
    not_finite: dict[str, list[int]] = {}
    for step in sorted(rows):
        for name in [name for name, value in rows[step].items() if not math.isfinite(value)]:
            not_finite.setdefault(name, []).append(step)
            del rows[step][name]
    return {step: rows[step] for step in sorted(rows)}, not_finite


def _float(value: object) -> float | None:
    """A metric's value; NaN where it was logged as not finite (null in strict JSON), None where it is no number."""
    if value is None or (isinstance(value, str) and value.lower().lstrip("+-") in ("nan", "inf", "infinity")):
        return math.nan
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return None


def _index_responses(path: Path, remarks: list[str]) -> dict[tuple[int, int], Response]:
    responses: dict[tuple[int, int], Response] = {}
    for span, line in _lines(path / "rollouts.jsonl", remarks):
        if (row := _index(line.get("response"))) is not None:
            step, prompt_id = line["step"], clean(line.get("prompt_id"))
            responses[step, row] = Response(step, row, prompt_id, span, repetition(line.get("tokens")))
    for span, line in _lines(path / "audits.jsonl", remarks):
        row, slot = _index(line.get("response")), _index(line.get("slot"))
        if row is not None and slot is not None:
            key = (line["step"], row)
            response = responses.setdefault(key, Response(*key, clean(line.get("prompt_id"))))
            response.audits[slot] = _audit(response.prompt_id, span, line)
    return {key: responses[key] for key in sorted(responses)}


def _audit(prompt_id: str, span: Span, line: dict[str, Any]) -> Audit:
    total, received = number(line.get("score_sum")), number(line.get("count"))
    continuations = line.get("continuations")
    texts = (
        [str(each.get("text")) for each in continuations if isinstance(each, dict)]
        if isinstance(continuations, list)
        else []
    )
    return Audit(
        span=span,
        text_key=hash((prompt_id, str(line.get("chunk")))),
        logprob=number(line.get("logprob")),
        similarity=total / received if total is not None and received else None,
        is_unanimous=len(set(texts)) == 1 if len(texts) > 1 else None,
    )


def repetition(tokens: object, width: int = 4) -> float | None:
    """Share of the runs of `width` tokens that stood in the response before; None for less than two runs."""
    if not isinstance(tokens, list) or len(tokens) <= width:
        return None
    texts = [str(token) for token in tokens]
    runs = [tuple(texts[i : i + width]) for i in range(len(texts) - width + 1)]
    return 1 - len(set(runs)) / len(runs)
