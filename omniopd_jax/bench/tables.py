"""Records as text: a few lines on the terminal, tables for docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.types import InputError

Record = Mapping[str, Any]
_BEGIN, _END = "<!-- tables begin -->", "<!-- tables end -->"
_COLUMNS = ("contestant", "median", "tokens/s", "× bound", "memory", "compiled anew", "ours is faster", "bar")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; of a contest that was held again, the last.

    Raises:
      InputError: no such file, or a line that is no record.
    """
    if not path.is_file():
        raise InputError(f"--tables={path}: no such file.")
    held: dict[Any, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            key = (record["work"], record["model"], record.get("cores"), record.get("device"))
            entrant = record["entrant"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} line {number} is no record of this benchmark: {error!r}.") from error
        group = held.setdefault(key, [])
        if any(other["entrant"] == entrant for other in group):
            group.clear()  # the contest was held again
        group.append(record)
    return [record for group in held.values() for record in group]


def summary(records: Sequence[Record]) -> str:
    """One contest, a line a contestant."""
    first = records[0]
    lines = [f"{first['work']} {first['model']}".rstrip()]
    for record in records:
        if "error" in record:
            lines.append(f"  {record['entrant']:<34} failed: {record['error'].strip().splitlines()[-1]}")
        else:
            lines.append(f"  {record['entrant']:<34} " + "  ".join(cell for cell in _cells(record)[1:] if cell))
    return "\n".join(lines)


def markdown(records: Iterable[Record]) -> str:
    """One table for each number of cores."""
    by_cores: dict[Any, list[Record]] = {}
    for record in records:
        by_cores.setdefault((record.get("device", ""), record.get("cores")), []).append(record)
    parts = []
    for (device, cores), group in by_cores.items():
        parts.append(f"### {device}, {cores} core{'s' if cores != 1 else ''}\n")
        parts.append(_machine_line(group))
        parts.append("| work | " + " | ".join(_COLUMNS) + " |\n|---|---|" + "---:|" * (len(_COLUMNS) - 1))
        previous = None
        for record in group:
            work = f"{record['work']} {record['model']}".rstrip()
            cells = [record["entrant"], "failed"] if "error" in record else _cells(record)
            cells += [""] * (len(_COLUMNS) - len(cells))
            parts.append("| " + " | ".join([work if work != previous else "", *cells]) + " |")
            previous = work
        parts.append("")
    return "\n".join(parts)


def put_into(path: Path, text: str) -> None:
    """Replaces what stands between the two marks of a document.

    Raises:
      InputError: no such document, or one without the marks.
    """
    if not path.is_file():
        raise InputError(f"--into={path}: no such file.")
    document = path.read_text(encoding="utf-8")
    head, begin, rest = document.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        raise InputError(f"--into={path} needs the lines {_BEGIN} and {_END}, between which the tables go.")
    path.write_text(f"{head}{_BEGIN}\n{text.rstrip()}\n{_END}{tail}", encoding="utf-8")


def _machine_line(group: Sequence[Record]) -> str:
    measured = [record["machine"] for record in group if "machine" in record]
    if not measured:
        return ""
    low, high = (f(m["flops_per_s"] for m in measured) / 1e9 for f in (min, max))
    xla = max(m["xla_flops_per_s"] for m in measured) / 1e9
    read_rate = max(m["bytes_per_s"] for m in measured) / 1e9
    versions: dict[str, str] = {}
    for record in group:
        versions |= record.get("versions", {})
    clocks = sorted({record["clock"] for record in group if "clock" in record})
    return (
        f"{group[0].get('cpu', '')}. Best matrix product {low:.0f} to {high:.0f} GFLOP/s (XLA's own at most "
        f"{xla:.0f}), reads {read_rate:.1f} GB/s; clock: {', '.join(clocks)}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        + ".\n"
    )


def _cells(record: Record) -> list[str]:
    multiple, faster = record.get("multiple_of_bound"), record.get("ours_is_faster")
    bar = record.get("bar")
    if "over_device" in record:
        extra = f"{record['over_device']:.2f} × the batch at once"
    elif "same_responses" in record:
        extra = (
            f"decode = rescore in {record['same_responses']:.0%} of responses, {record['same_chunks']:.0%} of chunks"
        )
    else:
        extra = f"{faster:.2f}×" if faster else (f"{record['faster_than_best']:.2f}× the best" if bar else "")
    return [
        record["entrant"],
        _seconds(record["median_s"]),
        f"{record['tokens_per_s']:,.0f}" if record["tokens"] > 1 else "",
        f"{multiple:.2f}×" if multiple else "",
        f"{record['extra_memory_mib']:,.0f} MiB",
        str(record["compilations"]),
        extra,
        f"{bar:.2f}×" if bar else "",
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
