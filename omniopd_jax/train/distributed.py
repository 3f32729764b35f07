"""Several processes that run as one: how they start, and how they agree on what happens next.

What lies on the devices is split over all of them; what lies on the host is whole on each process, so that all make
the same batches, the same weights and the same programs. Only what differs by nature, a teacher's answers, a signal, a
disk, is exchanged: every process comes to the exchange, whatever happened to it, and a failure of one ends all.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from omniopd_jax.config import ConfigError, TeacherConfig
from omniopd_jax.teacher.protocol import TeacherStopped
from omniopd_jax.train.rendezvous import meet
from omniopd_jax.train.stops import CheckpointError, RunStopped

# A process that died is noticed by its missing heartbeat; this bounds the wait for one that lives and does not come.
PATIENCE_S = 2 * 3600
HEARTBEAT_S = 100
SHUTDOWN_S = 60  # the wait for the others when a process ends
_SMALLEST_MESSAGE = 1024  # bytes; sizes are doublings of it, so that few programs are compiled

T = TypeVar("T")


class PeerStopped(RunStopped):
    """Another process ended the run in an orderly way; `exit_code` is that process's."""

    def __init__(self, process: int, sentence: str, exit_code: int):
        super().__init__(f"Process {process} stopped: {sentence}")
        self.exit_code = exit_code


class PeerFailed(RuntimeError):
    """Another process failed; nothing is saved, for it cannot take part. `exit_code` is that process's, or 1."""

    def __init__(self, process: int, sentence: str, exit_code: int):
        super().__init__(f"Process {process} failed: {sentence}")
        self.exit_code = exit_code


def start(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    timeout_s: int = 600,
    environment: Mapping[str, str] = os.environ,
) -> bool:
    """Joins the processes of a run; the first thing a main does, before jax looks for devices.

    Args:
      coordinator: HOST:PORT of process 0; "": JAX_COORDINATOR_ADDRESS, else what the cluster says (TPU pods, Slurm,
        Open MPI), else this process runs alone; "auto": what the cluster says; "off": alone whatever it says.
      num_processes: in all; 0: JAX_NUM_PROCESSES, else as the cluster says.
      process_id: of this one, from 0; -1: JAX_PROCESS_ID, else as the cluster says.
      timeout_s: how long the others are waited for.
      environment: where those variables are looked for.

    Returns:
      Whether there are others.

    Raises:
      ConfigError: half an address, or nobody there within `timeout_s`.
    """
    if coordinator == "off":
        return False
    count = num_processes or int(environment.get("JAX_NUM_PROCESSES") or 0) or None
    address = coordinator
    if coordinator in ("", "auto"):  # half an address in the environment of a cluster is for jax to complete
        address = environment.get("JAX_COORDINATOR_ADDRESS", "") if count or not _is_cluster(environment) else ""
    is_cluster = coordinator == "auto" or (not address and _is_cluster(environment))
    index = process_id if process_id >= 0 else int(environment.get("JAX_PROCESS_ID") or -1)
    if not address and not is_cluster:
        if count is not None and count > 1:
            raise ConfigError("--num_processes needs --coordinator=HOST:PORT, the address of process 0.")
        return False
    if address and (":" not in address or count is None or not 0 <= index < count):
        raise ConfigError(
            f"--coordinator={address} needs the form HOST:PORT, --num_processes and a --process_id from 0 to one less, "
            "or JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment."
        )
    if address:
        assert count is not None
        if count == 1:
            return False
        meet(address, count, index, timeout_s=timeout_s)
    try:
        jax.distributed.initialize(
            address or None,
            count,
            index if index >= 0 else None,
            None if address else _all_devices_of_a_node(environment),
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
            # Each process sees its own devices unless a cluster says otherwise.
            cluster_detection_method="deactivate" if address else None,
        )
    except (RuntimeError, ValueError) as error:  # XlaRuntimeError is a RuntimeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"The processes of this run did not find each other within {timeout_s} s at "
            f"{address or 'the address that the cluster names'} (this is process {index if index >= 0 else '?'} of "
            f"{count or '?'}): {reason}"
        ) from error
    return jax.process_count() > 1


def _is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax finds the other processes by itself: tasks of Slurm or Open MPI, or the hosts of a TPU pod."""
    for count, rank in (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        if int(environment.get(count) or 1) > 1 and rank in environment:
            return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    # A TPU VM does not say in its environment how many hosts it belongs to; jax asks the metadata server.
    has_chips = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    wants_them = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return has_chips and wants_them and importlib.util.find_spec("libtpu") is not None


def _all_devices_of_a_node(environment: Mapping[str, str]) -> list[int] | None:
    """Under Slurm jax gives each process one GPU; the only process of a node gets all that the node was given."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if tasks.partition("(")[0] != "1" or not visible or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return list(range(len(visible.split(","))))


def is_first() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def share(count: int) -> range:
    """The rows of `count` that this process asks the teacher about: neighbours, as equally many as can be."""
    index, processes = jax.process_index(), jax.process_count()
    return range(index * count // processes, (index + 1) * count // processes)


def own_folder(workdir: Path) -> Path:
    """Where this process keeps its teacher's cache and ledger: databases do not live on file systems that hosts share.

    Process 0 has the work directory itself; `teacher.cache_path` may name a place on a local disk.
    """
    return workdir if is_first() else workdir / f"process_{jax.process_index()}"


def teacher_share(teacher: TeacherConfig) -> TeacherConfig:
    """The settings of one process's teacher: caps and rates are of the whole run, so each process gets its share.

    Raises:
      ConfigError: a cap or a rate of which some process would get nothing.
    """
    processes = jax.process_count()

    def part(field: str) -> int:
        total = getattr(teacher, field)
        if 0 < total < processes:
            raise ConfigError(
                f"teacher.{field}={total} is less than one for each of {processes} processes: set it to {processes} or "
                "more, or to 0 for no limit."
            )
        return total // processes

    counts = ("max_calls", "max_tokens", "requests_per_minute", "tokens_per_minute")
    return dataclasses.replace(
        teacher, max_dollars=teacher.max_dollars / processes, **{field: part(field) for field in counts}
    )


_meetings = itertools.count()
_KNOWN = "_is_known_to_all_processes"


def gather(value: T) -> list[T]:
    """What each process gave, in their order. Every process has to call it; anything that pickle takes."""
    if jax.process_count() == 1:
        return [value]
    # Waiting here costs nothing; inside a collective some backends give up after a while.
    everyone = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"omniopd_{next(_meetings)}", timeout=PATIENCE_S, processes=everyone)
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    width = _SMALLEST_MESSAGE
    while width < sizes.max():
        width *= 2
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def collect(part: Callable[[], T]) -> list[T]:
    """Runs `part` on every process and returns what each came to, in their order.

    Where `part` raises on one process, all end: that process by its own exception, the others by `PeerStopped` (the
    run was stopped in order: a teacher, a signal) or `PeerFailed`, with the same exit code.
    """
    if jax.process_count() == 1:
        return [part()]
    value, failure = None, None
    try:
        value = part()
    except Exception as error:
        failure = error
    outcomes: list[tuple[Any, tuple[str, int, bool] | None]] = gather((value, _described(failure)))
    failed = [(process, found) for process, (_, found) in enumerate(outcomes) if found is not None]
    if not failed:
        return [found for found, _ in outcomes]
    # Who cannot go on in order decides for all; else the first.
    process, (sentence, exit_code, is_orderly) = min(failed, key=lambda pair: pair[1][2])
    own = _described(failure)
    if failure is not None and own is not None and own[1:] == (exit_code, is_orderly):
        failure.__dict__[_KNOWN] = True
        raise failure
    raise (PeerStopped if is_orderly else PeerFailed)(process, sentence, exit_code) from failure


def is_known_to_all(error: BaseException) -> bool:
    """Whether the other processes end because of this error as well, so that all can meet at the end."""
    return isinstance(error, PeerStopped | PeerFailed) or _KNOWN in getattr(error, "__dict__", {})


def agree(part: Callable[[], T]) -> T:
    """`collect` where only this process's own result matters."""
    if jax.process_count() == 1:
        return part()
    own: list[T] = []
    collect(lambda: own.append(part()))
    return own[0]


def first_only(part: Callable[[], object]) -> None:
    """Runs `part` on process 0; the others wait for it, and fail if it does."""
    agree(lambda: part() if is_first() else None)


def from_first(value: T) -> T:
    """Process 0's value, on every process."""
    return gather(value)[0]


def has_peers() -> bool:
    """Whether other processes run with this one."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(exit_code: int) -> None:
    """Ends a process that failed by itself, at once: at exit jax would wait for processes that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _described(failure: Exception | None) -> tuple[str, int, bool] | None:
    """(sentence, exit code, whether a checkpoint of the finished steps can still be written)."""
    if failure is None:
        return None
    is_orderly = isinstance(failure, RunStopped | TeacherStopped) and not isinstance(failure, CheckpointError)
    # A file that the process cannot read or write ends its run as a CheckpointError does (`loop.run`).
    otherwise = CheckpointError.exit_code if isinstance(failure, OSError) else 1
    return f"{type(failure).__name__}: {failure}", int(getattr(failure, "exit_code", otherwise)), is_orderly
