"""The files a run appends to, a step at a time, and what each number in them means."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omniopd_jax.types import InputError


class Meaning(NamedTuple):
    unit: str
    text: str


# Every name that metrics.jsonl may hold. A name that ends in "/*" stands for a family.
REGISTRY: dict[str, Meaning] = {
    "loss/total": Meaning("nats/denominator", "the loss that was minimised: trunk + branch + anchor"),
    "loss/trunk": Meaning("nats/denominator", "− Σ weight · log π over the tokens of the responses"),
    "loss/branch": Meaning("nats/denominator", "− Σ weight · log π over the tokens of the student's branches"),
    "loss/anchor": Meaning("nats/denominator", "β Σ KL(π_ref ‖ π) over the tokens that carry the anchor"),
    "anchor/kl": Meaning("nats/token", "mean KL(π_ref ‖ π) over the tokens that carry the anchor; absent where β = 0"),
    "anchor/fraction": Meaning("share", "response tokens that carry the anchor"),
    "optimizer/grad_norm": Meaning("1", "global norm of the gradient before clipping"),
    "optimizer/update_norm": Meaning("1", "global norm of the change made to the parameters"),
    "optimizer/learning_rate": Meaning("1", "learning rate of this update"),
    "rollout/tokens": Meaning("tokens", "mean length of a response, its stop token included"),
    "rollout/finished": Meaning("share", "responses that ended with a stop token"),
    "rollout/empty": Meaning("count", "responses without a token of text"),
    "rollout/entropy": Meaning("nats/token", "mean entropy of the student over response tokens"),
    "rollout/logprob": Meaning("nats/token", "mean log-probability of the sampled tokens"),
    "rollout/epoch": Meaning("epochs", "passes over the prompts when the step began"),
    "audit/chunks": Meaning("chunks", "chunks that the teacher was asked about"),
    "audit/audited": Meaning("share", "chosen chunks that the teacher answered at least once"),
    "audit/fraction": Meaning("share", "response tokens inside audited chunks"),
    "audit/entropy": Meaning("nats/token", "mean entropy at the starts of audited chunks"),
    "audit/prior": Meaning("probability", "mean π̄ of audited chunks"),
    "audit/target": Meaning("probability", "mean π̂ of audited chunks"),
    "audit/advantage": Meaning(
        "probability", "mean absolute weight of audited chunks (or branches) before denominators"
    ),
    "audit/score_mean": Meaning("similarity", "student's chunk against a continuation, mean over continuations"),
    "audit/agreement_mean": Meaning("similarity", "among the teacher's own texts of a chunk, mean over chunks"),
    "audit/branch_score_mean": Meaning("similarity", "branch against the teacher's texts, mean over branches"),
    "audit/branch_distinct_share": Meaning("share", "different texts among the branches of a chunk"),
    "audit/identical_share": Meaning("share", "chunks whose continuations are all equal: the target is all or nothing"),
    "audit/ended_share": Meaning("share", "continuations that end the answer within the chunk"),
    "audit/short_share": Meaning("share", "continuations cut off before the chunk's length"),
    "audit/moved_cuts": Meaning("count", "chunk starts inside a character, moved to the left"),
    "audit/dropped_cuts": Meaning("count", "chunk starts without a clean cut near them, left out"),
    "audit/similarity_seconds": Meaning("seconds", "re-tokenising and comparing texts"),
    "branch/kept": Meaning(
        "branches/response", "branches left after merging equal ones and dropping those of weight 0"
    ),
    "branch/packed": Meaning("share", "branch slots of the update that hold a branch"),
    "teacher/requested": Meaning("samples", "continuations asked for"),
    "teacher/received": Meaning("samples", "continuations received and usable"),
    "teacher/cached": Meaning("samples", "continuations answered from the cache"),
    "teacher/missing_share": Meaning("share", "samples asked for that did not come"),
    "teacher/refused_share": Meaning("share", "samples asked for that the teacher refused"),
    "teacher/calls": Meaning("calls", "calls of the teacher"),
    "teacher/prompt_tokens": Meaning("tokens", "teacher tokens read"),
    "teacher/completion_tokens": Meaning("tokens", "teacher tokens written"),
    "teacher/tokens": Meaning("tokens", "teacher tokens read and written"),
    "teacher/dollars": Meaning("dollars", "cost"),
    "teacher/seconds": Meaning("seconds", "from the first request to the last answer"),
    "teacher/latency_seconds": Meaning("seconds", "mean of a request, from submission to its last sample"),
    "teacher/total_tokens": Meaning("tokens", "teacher tokens written, the run so far"),
    "teacher/total_prompt_tokens": Meaning("tokens", "teacher tokens read, the run so far"),
    "teacher/total_calls": Meaning("calls", "calls of the teacher, the run so far"),
    "teacher/total_dollars": Meaning("dollars", "cost of the teacher, the run so far"),
    "time/sample_s": Meaning("seconds", "student's responses and the choice of chunks"),
    "time/score_s": Meaning("seconds", "the student's branches, absent without them"),
    "time/audit_s": Meaning("seconds", "teacher's continuations and their comparison"),
    "time/update_s": Meaning("seconds", "loss, gradient and update"),
    "time/evaluate_s": Meaning("seconds", "evaluation on held-out problems"),
    "time/checkpoint_s": Meaning("seconds", "copying the state of the step before for its checkpoint"),
    "time/step_s": Meaning("seconds", "the whole step, logging included"),
    "compile/programs": Meaning("count", "programs that jax compiled, or loaded from its cache, in this step"),
    "compile/seconds": Meaning("seconds", "time that they took"),
    "eval/*": Meaning("as named", "evaluation on held-out problems, after this step"),
}


def meaning(name: str) -> Meaning | None:
    """What a metric's name stands for; None for an unknown name."""
    return REGISTRY.get(name) or REGISTRY.get(name.partition("/")[0] + "/*")


class JsonLines:
    """One file of JSON objects, each with its "step"; what is written is on disk before `write` returns.

    Opened at a step, it drops the lines of later ones (a resumed run writes them again) and a last line torn by a
    crash, so that no step stands in it twice.
    """

    def __init__(self, path: Path, *, after_step: int):
        """Opens `path` for the steps that follow `after_step`.

        Raises:
          InputError: a line before the last is not a JSON object with a step.
        """
        self._path = path
        if path.is_file():
            _drop_later_lines(path, after_step)
        self._file = path.open("ab", buffering=0)  # nothing is left to write when it is closed

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows and waits for the disk."""
        text = "".join(json.dumps(_plain(row), ensure_ascii=False, separators=(", ", ": ")) + "\n" for row in rows)
        left = text.encode("utf-8", "replace")  # a lone surrogate has no UTF-8 form
        while left:
            left = left[self._file.write(left) :]
        if text:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _drop_later_lines(path: Path, after_step: int) -> None:
    kept, dropped = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise InputError(
                    f"{path} line {number} is not a JSON object with a step; the file is damaged."
                ) from None
            dropped += 1  # torn by a crash
            continue
        if step <= after_step and line.endswith(b"\n"):
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        rewritten = path.with_name(path.name + ".rewritten")
        rewritten.write_bytes(b"".join(kept))
        os.replace(rewritten, path)


def _plain(value: Any) -> Any:
    """JSON-ready: numpy and jax scalars become numbers, what is not finite null (JSON knows neither NaN nor inf)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class EventFile:
    """TensorBoard events of the same numbers, through tensorboardX."""

    def __init__(self, folder: Path, *, after_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError("config.logging.tensorboard=True needs tensorboardX: pip install tensorboardX.") from error
        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """metrics.jsonl, audits.jsonl, rollouts.jsonl and, where asked for, TensorBoard events of one work directory."""

    def __init__(self, workdir: Path, *, after_step: int, tensorboard: bool = False):
        self._metrics, self._audits, self._rollouts = (
            JsonLines(workdir / f"{name}.jsonl", after_step=after_step) for name in ("metrics", "audits", "rollouts")
        )
        self._events = EventFile(workdir / "tensorboard", after_step=after_step) if tensorboard else None

    def write(
        self,
        row: Mapping[str, Any],
        audits: Iterable[Mapping[str, Any]] = (),
        rollouts: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """One step: its audits and rollouts first, so that a step named in metrics.jsonl is whole."""
        self._rollouts.write(rollouts)
        self._audits.write(audits)
        self._metrics.write([row])
        if self._events is not None:
            self._events.write(row)

    def close(self) -> None:
        for file in (self._metrics, self._audits, self._rollouts, self._events):
            if file is not None:
                file.close()
