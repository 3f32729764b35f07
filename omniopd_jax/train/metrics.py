"""The files a run appends to, a step at a time, and what each number in them means."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omniopd_jax.config import ConfigError
from omniopd_jax.quiet import tensorflow, without_banners
from omniopd_jax.types import InputError


class Meaning(NamedTuple):
    unit: str
    text: str


# Every name that metrics.jsonl may hold. A name that ends in "/*" stands for a family.
REGISTRY: dict[str, Meaning] = {
    "loss/total": Meaning("nats/denominator", "the loss that was minimised: the sum of its terms"),
    "loss/trunk": Meaning(
        "nats/denominator", "− Σ weight · log π over the tokens of the responses (sft: of the teacher's answers)"
    ),
    "loss/branch": Meaning("nats/denominator", "− Σ weight · log π over the tokens of the branches"),
    "loss/anchor": Meaning("nats/denominator", "β Σ KL(π_ref ‖ π) over the tokens that carry the anchor"),
    "loss/divergence": Meaning("nats/denominator", "Σ weight · D(π_T, π) over the tokens of the responses, arm opd"),
    "loss/ratio": Meaning("1/denominator", "− Σ clipped ratio · advantage over the tokens of the responses, arm grpo"),
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
    "opd/divergence": Meaning(
        "nats/token", "divergence from the white-box teacher (sampled: log π − log π_T), mean over response tokens"
    ),
    "opd/scored_tokens": Meaning("tokens", "response tokens at which the teacher's distribution was read"),
    "sft/answer_tokens": Meaning("tokens", "mean length of a teacher's answer in the student's tokens"),
    "reward/mean": Meaning("reward", "mean over responses"),
    "reward/std": Meaning("reward", "standard deviation over responses"),
    "reward/informative": Meaning("share", "prompts whose responses do not all have one reward"),
    "update/clip_fraction": Meaning(
        "share", "weighted tokens whose ratio was clipped, in the last update of the batch"
    ),
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
    "teacher/used_calls": Meaning("calls", "calls behind the continuations, those answered from the cache included"),
    "teacher/used_prompt_tokens": Meaning("tokens", "teacher tokens read for them, likewise"),
    "teacher/used_completion_tokens": Meaning("tokens", "teacher tokens written for them, likewise"),
    "teacher/total_tokens": Meaning("tokens", "sum of used_completion_tokens over the steps of the run so far"),
    "teacher/total_prompt_tokens": Meaning("tokens", "sum of used_prompt_tokens over the steps of the run so far"),
    "teacher/total_calls": Meaning("calls", "sum of used_calls over the steps of the run so far"),
    "teacher/total_dollars": Meaning("dollars", "all that was paid in this work directory so far"),
    "time/sample_s": Meaning("seconds", "student's responses and the choice of chunks"),
    "time/score_s": Meaning("seconds", "the student's branches, absent without them"),
    "time/audit_s": Meaning("seconds", "teacher's continuations and their comparison"),
    "time/update_s": Meaning("seconds", "loss, gradient and update; of a batch in parts, what was waited for"),
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
    """TensorBoard events of the same numbers: through clu where TensorFlow is installed, else through tensorboardX.

    Opened at a step, it tells TensorBoard to forget what an earlier run wrote of the later ones.
    """

    def __init__(self, folder: Path, *, after_step: int):
        """Raises ConfigError where neither is installed."""
        first = max(after_step + 1, 0)
        self._write, self._flush, self._close = _clu_writer(folder, first) or _tensorboardx_writer(folder, first)

    def write(self, row: Mapping[str, Any]) -> None:
        self._write(row["step"], _scalars(row))
        self._flush()

    def close(self) -> None:
        self._close()


_Writer = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], None], Callable[[], None]]


def _clu_writer(folder: Path, first_step: int) -> _Writer | None:
    """(write, flush, close); None where clu, TensorFlow or TensorBoard is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("clu", "tensorflow", "tensorboard")):
        return None
    proto = importlib.import_module("tensorboard.compat.proto.event_pb2")  # its names come into being at run time
    tf = tensorflow()
    with without_banners():
        from clu import metric_writers
    folder.mkdir(parents=True, exist_ok=True)
    # TensorFlow's writer has no word for "forget the steps from here on"; a file that sorts before its own says it.
    start = proto.Event(
        wall_time=time.time(), step=first_step, session_log=proto.SessionLog(status=proto.SessionLog.START)
    )
    name = folder / f"events.out.tfevents.{int(time.time()):010d}.{first_step:010d}.start"
    with tf.io.TFRecordWriter(str(name)) as file:
        file.write(proto.Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        file.write(start.SerializeToString())
    with without_banners():
        writer = metric_writers.SummaryWriter(str(folder))
    return writer.write_scalars, writer.flush, writer.close


def _tensorboardx_writer(folder: Path, first_step: int) -> _Writer:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("config.logging.tensorboard=True needs tensorboardX: pip install tensorboardX.") from error
    writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.flush, writer.close


class Dashboard:
    """The same numbers at Weights & Biases. The key comes from the environment (WANDB_API_KEY) and is never written.

    A resumed run goes on with its page, whose id WORKDIR/wandb.json keeps with the last step sent: none is sent twice.
    """

    def __init__(self, workdir: Path, project: str, settings: Mapping[str, Any]):
        """Raises ConfigError where wandb is not installed, does not know the key, or cannot be reached."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("config.logging.wandb needs wandb: pip install wandb.") from error
        self._path = workdir / "wandb.json"
        kept = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        self._id, self._last = kept.get("id") or secrets.token_hex(8), kept.get("last_step", -1)
        team, _, name = project.rpartition("/")
        try:
            self._run = wandb.init(
                project=name,
                entity=team or None,
                name=workdir.name,
                id=self._id,
                resume="allow",
                dir=str(workdir),
                config=dict(settings),
                settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"config.logging.wandb={project!r}: {' '.join(str(error).split())} The key belongs in the environment "
                "variable WANDB_API_KEY; WANDB_MODE=offline sends nothing."
            ) from error

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] > self._last:
            self._last = row["step"]
            self._run.log(_scalars(row), step=self._last)
            written = self._path.with_name(self._path.name + ".new")  # a crash leaves the old one or the new one
            written.write_text(json.dumps({"id": self._id, "last_step": self._last}) + "\n", encoding="utf-8")
            written.replace(self._path)

    def close(self) -> None:
        self._run.finish()


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row without its step."""
    return {name: float(value) for name, value in row.items() if name != "step" and value is not None}


class RunLog:
    """metrics.jsonl, audits.jsonl, rollouts.jsonl of one work directory and, where asked for, TensorBoard events and a
    page at Weights & Biases."""

    def __init__(
        self,
        workdir: Path,
        *,
        after_step: int,
        tensorboard: bool = False,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        """Opens the logs for the steps that follow `after_step`.

        Args:
          tensorboard: events in WORKDIR/tensorboard.
          wandb: project at Weights & Biases, "" for none.
          settings: the run's config, for its page there.

        Raises:
          ConfigError: a library is not installed, or Weights & Biases refuses.
          InputError: a log is damaged.
        """
        self._metrics, self._audits, self._rollouts = (
            JsonLines(workdir / f"{name}.jsonl", after_step=after_step) for name in ("metrics", "audits", "rollouts")
        )
        self._events = EventFile(workdir / "tensorboard", after_step=after_step) if tensorboard else None
        self._page = Dashboard(workdir, wandb, settings or {}) if wandb else None

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
        for copy in (self._events, self._page):
            if copy is not None:
                copy.write(row)

    def close(self) -> None:
        for file in (self._metrics, self._audits, self._rollouts, self._events, self._page):
            if file is not None:
                file.close()
