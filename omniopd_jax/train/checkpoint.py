"""Checkpoints: what a resumed run needs, written so that there is always an intact one (orbax)."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from omniopd_jax.config import Config, to_dict
from omniopd_jax.train import distributed
from omniopd_jax.train.stops import CheckpointError, WorkdirError
from omniopd_jax.types import Array, PyTree, TrainState

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# What a resumed run may set anew. Everything else decides the numbers and has to stay as it was.
MAY_CHANGE = (
    "train.steps",  # with a constant schedule: the others are drawn over it
    "train.max_teacher_tokens",
    "train.checkpoint_every",
    "train.checkpoint_keep",  # and checkpoint_keep_every
    "train.checkpoint_best",
    "train.audit_log_every",
    "train.compilation_cache",
    "eval.",
    "logging.",
    "mesh.",
    "pipeline.micro_batches",
    "pipeline.rollouts",
    "lora.export",
    "teacher.base_url",
    "teacher.api_key_env",
    "teacher.allow_insecure_http",
    "teacher.max_concurrency",
    "teacher.requests_per_minute",
    "teacher.tokens_per_minute",
    "teacher.request_timeout_s",
    "teacher.max_attempts",
    "teacher.step_deadline_s",
    "teacher.max_missing_fraction",
    "teacher.max_refusal_fraction",
    "teacher.cache_path",
    "teacher.replay_only",
    "teacher.dry_run",
    "teacher.prices",
    "teacher.max_dollars",
    "teacher.max_calls",
    "teacher.max_tokens",
)


def differing_fields(before: Mapping[str, Any], config: Config) -> list[str]:
    """Dotted names of the fields that differ and may not, in alphabetical order."""
    old, new = flat(before), flat(to_dict(config))
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    is_free = config.optimizer.schedule == "constant"
    return [
        name
        for name in differing
        if not name.startswith(MAY_CHANGE) or (name == "train.steps" and not is_free)
    ]  # fmt: skip


def check_same_config(before: Mapping[str, Any], config: Config, where: Path) -> None:
    """Raises WorkdirError, naming the fields, where `config` would not continue the run that wrote `before`."""
    names = differing_fields(before, config)
    if names:
        shown = changes(flat(before), flat(to_dict(config)), names)
        raise WorkdirError(f"{where} belongs to a run of another config ({shown}); use another work directory.")


def changes(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first few of the fields that differ between two flat configs, in words."""
    shown = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names[:4])
    return shown + (f"; and {len(names) - 4} more" if len(names) > 4 else "")


def fingerprint(tree: PyTree) -> Array:
    """uint32 sum of every bit pattern of a tree: the same whatever the sharding, another if a number is damaged."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
        total += jnp.sum(jax.lax.bitcast_convert_type(leaf, width), dtype=jnp.uint32)
    return total


class Checkpoints:
    """The checkpoints of one work directory, one folder a step. Which stay: the newest, every so many steps, the best.

    Saving copies the state to the host and writes it in the background; an error of the disk is raised by the next
    call. A folder gets its final name only when it is complete. Several processes write one checkpoint together, each
    what lies on its devices, so the folder is one that all of them see.
    """

    def __init__(self, folder: Path, config: Config, *, keep: int, keep_every: int = 0, keeps_best: bool = False):
        """Opens `folder` for a run of `config`.

        Args:
          keep: how many of the newest stay.
          keep_every: those of every so many steps stay as well; 0: none of them.
          keeps_best: the one with the highest score stays as well.
        """
        self._folder = folder
        self._config = config
        policies = ocp.checkpoint_managers
        stays: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            stays.append(policies.EveryNSteps(keep_every))
        if keeps_best:
            best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
            stays.append(best)
        several: dict[str, Any] = {}
        if jax.process_count() > 1:
            # With the processes named, orbax lets them meet at the coordinator, with a limit, and not in a collective.
            everyone = set(range(jax.process_count()))
            distributed.first_only(lambda: folder.mkdir(parents=True, exist_ok=True))
            several["create"] = False
            several["multiprocessing_options"] = ocp.options.MultiprocessingOptions(active_processes=everyone)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(stays),
            best_fn=_score if keeps_best else None,
            cleanup_tmp_directories=True,
            **several,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._fingerprint = jax.jit(fingerprint)
        self._best = max((self._stored_score(step) for step in self.steps()), default=-math.inf) if keeps_best else None

    def steps(self) -> list[int]:
        """Finished steps of the checkpoints found, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def last(self) -> str:
        """Where a run that stops now goes on, as the end of a sentence."""
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was written yet"

    def is_best(self, score: float | None) -> bool:
        """Whether a score is above those of all checkpoints so far, where the best one is kept."""
        return score is not None and self._best is not None and score > self._best

    def save(self, state: TrainState, progress: Mapping[str, Any], *, score: float | None = None) -> None:
        """Starts to write the checkpoint of `state.step`, unless there is one.

        Args:
          state: what the step changes.
          progress: JSON-ready, what else the run has to remember (teacher tokens spent).
          score: how good the state is, higher is better; None: not known.

        Raises:
          CheckpointError: this one or the one before it could not be written; the ones before are intact.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = {
            "config": to_dict(self._config),
            "progress": dict(progress),
            "shapes": _shapes(state),
            "fingerprint": int(self._fingerprint(state)),
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = {"score": score} if score is not None and self._best is not None else None
        distributed.agree(lambda: self._written(lambda: self._manager.save(step, args=args, metrics=metrics)))
        if self._best is not None and score is not None:
            self._best = max(self._best, score)

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete."""
        distributed.agree(lambda: self._written(self._manager.wait_until_finished))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, progress) of the newest intact checkpoint; None where there is none at all.

        Args:
          like: a state of the shapes, dtypes and shardings wanted.

        Raises:
          WorkdirError: the checkpoint is of another config, or of a model or optimizer of other shapes.
          CheckpointError: there are checkpoints and none can be read.
        """
        steps = distributed.from_first(self.steps()[::-1])
        for step in steps:
            described = self._attempt(step, lambda step=step: self._described(step))
            if described is None:
                continue
            self._check_shapes(described["shapes"], like, step)
            check_same_config(described["config"], self._config, self._folder / str(step))
            state = self._attempt(step, lambda step=step: self._read(step, like))
            if state is None:
                continue
            if int(self._fingerprint(state)) != described["fingerprint"]:
                self._report_torn(step, "its numbers are not those that were written")
                continue
            self._discard_after(step)
            return state, described["progress"]
        if steps:
            raise CheckpointError(f"None of the checkpoints in {self._folder} (steps {steps[::-1]}) can be read.")
        return None

    def close(self) -> None:
        """Waits for the last checkpoint and frees the threads."""
        try:
            self._written(self._manager.wait_until_finished)  # not agreed on: others may be gone
        finally:
            self._manager.close()

    def _written(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            raise self._write_error(error) from error

    def _described(self, step: int) -> dict[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return {name: meta[name] for name in ("config", "shapes", "progress", "fingerprint")}

    def _read(self, step: int, like: TrainState) -> TrainState:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(step, args=args)["state"]

    def _attempt(self, step: int, read: Callable[[], T]) -> T | None:
        """What `read` finds; None, and a line in the log, where a process cannot read it."""
        found, problem = None, None
        try:
            found = read()
        except Exception as error:  # whatever a torn file makes orbax raise
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = next(filter(None, distributed.gather(problem)), None)
        if problem is None:
            return found
        self._report_torn(step, problem)
        return None

    def _stored_score(self, step: int) -> float:
        metrics = self._manager.metrics(step)
        return -math.inf if metrics is None else _score(metrics)

    def _discard_after(self, step: int) -> None:
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _report_torn(self, step: int, reason: str) -> None:
        _LOG.warning("The checkpoint of step %d in %s cannot be read (%s); trying the one before it.",
                     step, self._folder, reason[:200])  # fmt: skip

    def _write_error(self, error: Exception) -> CheckpointError:
        chain, cause = [], error
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        is_full = any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain) or any(
            "no space left" in str(e).lower() for e in chain
        )
        reason = "the disk is full" if is_full else (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return CheckpointError(f"A checkpoint could not be written to {self._folder}: {reason}; {self.last}.")

    def _check_shapes(self, stored: Mapping[str, str], like: TrainState, step: int) -> None:
        wanted = _shapes(like)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise WorkdirError(
                    f"{self._folder / str(step)} is a checkpoint of another model or optimizer: {name} is "
                    f"{stored.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this run."
                )


def _score(metrics: Mapping[str, Any]) -> float:
    return float(metrics["score"])


def check_workdir(workdir: Path, config: Config) -> None:
    """Makes the work directory, and finds that it is this config's own or nobody's; before any compute.

    Raises:
      WorkdirError: it cannot be written, or belongs to another config.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(f"The work directory {workdir} cannot be written: {error.strerror or error}.") from error
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkdirError(f"{path} is not JSON ({error}); remove it or use another work directory.") from error
        check_same_config(before, config, workdir)


def claim_workdir(workdir: Path, config: Config) -> None:
    """Writes config.json: from now on the directory is this config's. Last, so that a mistyped path claims nothing."""
    path = workdir / "config.json"
    text = json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"
    written = path.with_name("config.json.new")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


def check_room(workdir: Path, state: TrainState) -> None:
    """Raises CheckpointError where the disk has no room for two checkpoints of `state`."""
    wanted = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if free < wanted:
        raise CheckpointError(
            f"{workdir} has {free / 2**20:.0f} MiB free, and two checkpoints of this model take "
            f"{wanted / 2**20:.0f} MiB; free some space or use another work directory."
        )


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _shapes(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype.name}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.knob": value} of nested settings."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found
