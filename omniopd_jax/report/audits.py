"""The audit viewer's data: an index of all responses, and the responses themselves in compressed pieces.

A page of 10,000 audits opens fast because nothing but the index is read at first: each piece holds about a quarter
of a megabyte of JSON and is unpacked when a response in it is opened.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from typing import Any

from omniopd_jax.report.text import clean, clipped, number, numbers
from omniopd_jax.report.workdir import Response, WorkDir

PIECE_CHARACTERS = 256 * 1024  # of JSON, before compression
MAX_BYTES = 192 * 2**20  # of rollouts.jsonl and audits.jsonl that one page may hold
MAX_CHUNK = 4_000  # characters of a chunk or a continuation on the page
MAX_PROMPT = 20_000  # characters of a prompt
MAX_TOKEN = 400  # characters of one token
MAX_TOKENS = 16_384  # tokens of a response
MAX_TEXTS = 256  # continuations or branches of a chunk
MAX_LABEL = 160  # characters of a prompt in the list
_NUMBERS = (
    "start",
    "num_tokens",
    "entropy",
    "prior",
    "score_sum",
    "count",
    "requested",
    "target",
    "weight",
    "logprob",
    "moved",
)
_KNOWN = frozenset(
    {*_NUMBERS, "step", "response", "prompt_id", "slot", "chunk", "continuations", "branches", "is_end"}
)  # the rest of an audit's figures is shown by name


@dataclasses.dataclass(frozen=True)
class Audits:
    """What the page holds of the audits."""

    pieces: list[str]  # base64 of gzipped JSON; the first is the index
    num_responses: int
    num_audits: int
    remark: str  # which steps were left out, "" where none was


def read_audits(workdir: WorkDir, max_bytes: int = MAX_BYTES) -> Audits:
    """Packs the responses of a run. Where they are too many for one page, whole steps are left out evenly."""
    steps = sorted({response.step for response in workdir.responses.values()})
    kept = _steps_within(workdir, steps, max_bytes)
    responses = [response for response in workdir.responses.values() if response.step in kept]
    remark = ""
    if len(kept) < len(steps):
        remark = (
            f"The responses of {len(kept)} of the {len(steps)} logged steps are on this page, evenly spaced; the rest "
            f"would make it too large and stand in rollouts.jsonl and audits.jsonl."
        )
    repeats = _repeats(responses)
    pieces, index, pending, size = [], [], [], 0
    for response in responses:
        entry, summary = _entry(workdir, response, repeats)
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        if pending and size + len(text) > PIECE_CHARACTERS:
            pieces.append(pack("[" + ",".join(pending) + "]"))
            pending, size = [], 0
        index.append(summary | {"piece": len(pieces) + 1, "place": len(pending)})
        pending.append(text)
        size += len(text)
    if pending:
        pieces.append(pack("[" + ",".join(pending) + "]"))
    head = json.dumps(_columns(index), ensure_ascii=False, separators=(",", ":"))
    return Audits(
        pieces=[pack(head), *pieces] if index else [],
        num_responses=len(index),
        num_audits=sum(summary["chunks"] for summary in index),
        remark=remark,
    )


def pack(text: str) -> str:
    """base64 of the gzipped text; the same text gives the same piece."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), compresslevel=6, mtime=0)).decode("ascii")


def _steps_within(workdir: WorkDir, steps: list[int], max_bytes: int) -> set[int]:
    """As many evenly spaced steps as fit, the first and the last always among them."""
    size: dict[int, int] = dict.fromkeys(steps, 0)
    for response in workdir.responses.values():
        spans = [audit.span for audit in response.audits.values()] + ([response.rollout] if response.rollout else [])
        size[response.step] += sum(span.length for span in spans)
    total, count = sum(size.values()), len(steps)
    if total > max_bytes:
        count = max(2, int(count * max_bytes / total))
    if count >= len(steps):
        return set(steps)
    return {steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)}


def _repeats(responses: list[Response]) -> dict[int, list[tuple[int, float | None]]]:
    """text_key → [(step, log-probability)] of chunks that were written for the same prompt more than once."""
    found: dict[int, list[tuple[int, float | None]]] = {}
    for response in responses:
        for audit in response.audits.values():
            found.setdefault(audit.text_key, []).append((response.step, audit.logprob))
    return {key: places for key, places in found.items() if len({step for step, _ in places}) > 1}


def _entry(
    workdir: WorkDir, response: Response, repeats: dict[int, list[tuple[int, float | None]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the response as the viewer shows it, its row in the index)."""
    rollout = workdir.read("rollouts.jsonl", response.rollout) if response.rollout else {}
    tokens = rollout.get("tokens")
    tokens = tokens if isinstance(tokens, list) else []
    audits = []
    for slot, audit in sorted(response.audits.items()):
        line = workdir.read("audits.jsonl", audit.span)
        audits.append(_audit(slot, line) | {"repeats": repeats.get(audit.text_key, [])[:MAX_TEXTS]})
    audits.sort(key=lambda audit: (audit["start"] is None, audit["start"], audit["slot"]))
    entry = {
        "step": response.step,
        "row": response.row,
        "prompt_id": clipped(response.prompt_id, MAX_LABEL),
        "prompt": clipped(rollout.get("prompt"), MAX_PROMPT),
        "answer": clipped(rollout.get("answer"), MAX_CHUNK),
        "tokens": [clipped(token, MAX_TOKEN) for token in tokens[:MAX_TOKENS]],
        "num_tokens": len(tokens),
        "entropy": numbers(rollout.get("entropy"), MAX_TOKENS),
        "logprob": numbers(rollout.get("logprob"), MAX_TOKENS),
        "is_finished": bool(rollout.get("is_finished")),
        "has_rollout": bool(rollout),
        "audits": audits,
    }
    prompt = rollout.get("prompt")
    summary = {
        "step": response.step,
        "row": response.row,
        "prompt_id": response.prompt_id,
        "label": clean(prompt[:MAX_LABEL]) if isinstance(prompt, str) else "",
        "tokens": len(tokens),
        "finished": int(entry["is_finished"]),
        "chunks": len(audits),
        "similarity": _mean([_ratio(audit["score_sum"], audit["count"]) for audit in audits]),
        "target": _mean([audit["target"] for audit in audits]),
        "entropy": _mean(entry["entropy"]),
        "logprob": _mean(entry["logprob"]),
    }
    return entry, summary


def _audit(slot: int, line: dict[str, Any]) -> dict[str, Any]:
    continuations, branches = (
        [text for text in texts if isinstance(text, dict)] if isinstance(texts := line.get(name), list) else []
        for name in ("continuations", "branches")
    )
    return {
        "slot": slot,
        "chunk": clipped(line.get("chunk"), MAX_CHUNK),
        "continuations": [
            {
                "text": clipped(text.get("text"), MAX_CHUNK),
                "score": number(text.get("score")),
                "finish_reason": clipped(text.get("finish_reason"), 40),
            }
            for text in continuations[:MAX_TEXTS]
        ],
        "branches": [
            {
                "text": clipped(text.get("text"), MAX_CHUNK),
                "score": number(text.get("score")),
                "weight": number(text.get("weight")),
            }
            for text in branches[:MAX_TEXTS]
        ],
        "num_continuations": len(continuations),
        "num_branches": len(branches),
        "is_end": line.get("is_end") is True,
        "others": {
            clean(name)[:80]: number(value) if isinstance(value, (int, float)) else clipped(value, 400)
            for name, value in list(line.items())[:64]
            if name not in _KNOWN and isinstance(value, (int, float, str))
        },
    } | {name: number(line.get(name)) for name in _NUMBERS}


def _columns(index: list[dict[str, Any]]) -> dict[str, Any]:
    """The index by columns, prompts named once."""
    prompts: dict[str, int] = {}
    labels: list[str] = []
    for row in index:
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = len(prompts)
            labels.append("")
        row["prompt"] = prompts[row["prompt_id"]]
        labels[row["prompt"]] = labels[row["prompt"]] or row["label"]
    dropped = {"prompt_id", "label"}
    return {
        "prompts": [
            {"id": prompt_id[:MAX_LABEL], "label": label} for prompt_id, label in zip(prompts, labels, strict=True)
        ],
        "columns": {name: [row[name] for row in index] for name in index[0] if name not in dropped} if index else {},
    }


def _ratio(total: float | None, count: float | None) -> float | None:
    return total / count if total is not None and count else None


def _mean(values: list[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return number(float(sum(known) / len(known))) if known else None
