"""Does the runs of a study one process each, a few side by side, and goes on from what is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.config import to_dict
from omniopd_jax.study import design
from omniopd_jax.study.design import Run, Study
from omniopd_jax.study.measure import score
from omniopd_jax.study.run import read_measured
from omniopd_jax.train.checkpoint import WorkdirError, changes, flat
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.types import InputError

Report = Callable[[str], None]

# One core a process: what several of them share is not fought over.
ONE_THREAD: Mapping[str, str] = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}
# Paths move with the folder; the rest is how a run works, not what comes out.
_CHANGES_NO_NUMBER = ("world.path", "data.eval", "pipeline.", "train.compilation_cache", "train.checkpoint_every")
_LAST_LINES = 5  # of a failed process's log that the message shows


class RunFailed(InputError):
    """A run ended with an error; what is finished stays, and the same command goes on from there."""

    exit_code = 1


def finished(study: Study, folder: Path) -> dict[Run, float]:
    """The score of every finished run of the study's arms, whatever its learning rate."""
    scores = {}
    names = {arm.name for arm in study.arms}
    for path in sorted(folder.glob("runs/*/*/seed-*")):
        measured = read_measured(path)
        if measured is not None and path.parts[-3] in names:
            scores[design.parse(path.relative_to(folder).as_posix())] = score(measured)
    return scores


def check_settings(study: Study, common: Mapping[str, Any], folder: Path) -> None:
    """A table must not mix runs of two configs, and what is finished is not done again.

    Raises:
      WorkdirError: a finished run of the study's arms had other settings; names the run and the fields.
    """
    for run in finished(study, folder):
        file = folder / run.path / "config.json"
        if not file.is_file():
            continue
        old = flat(json.loads(file.read_text(encoding="utf-8")))
        new = flat(to_dict(design.run_config(common, study, run, folder)))
        differing = [
            name
            for name in sorted(old.keys() & new.keys())
            if old[name] != new[name] and not name.startswith(_CHANGES_NO_NUMBER)
        ]
        if differing:
            raise WorkdirError(
                f"{folder / run.path} is finished with other settings ({changes(old, new, differing)}); "
                "name another --workdir, or delete this run to have it done again."
            )


def do_all(
    study: Study,
    folder: Path,
    *,
    workers: int,
    report: Report,
    command: Sequence[str] = (sys.executable, "-m", "omniopd_jax.study.job"),
    poll_s: float = 0.5,
) -> None:
    """Builds the worlds, then does every run of the study that is not finished.

    Args:
      study, folder: what and where.
      workers: processes at a time; with more than one, each computes on one thread.
      report: told a line when a job starts or ends.
      command: does one job when the folder and the job's name are appended.
      poll_s: seconds between looks at the processes.

    Raises:
      Interrupted: Ctrl-C or SIGTERM; the jobs under way were told to stop and are waited for.
      RunFailed: jobs ended with an error; everything that does not need them was done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ) | (dict(ONE_THREAD) if workers > 1 else {})
    active: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: list[str] = []
    try:
        with Interrupts().installed() as interrupts:
            while True:
                for job, (process, began) in list(active.items()):
                    if process.poll() is not None:
                        del active[job]
                        report(f"{job}: {'done' if process.returncode == 0 else 'FAILED'}, {time.time() - began:.0f} s")
                        failed += [job] if process.returncode else []
                jobs = [job for job in next_jobs(study, folder) if job not in active and job not in failed]
                for job in jobs[: workers - len(active)]:
                    log = _log(folder, job)
                    log.parent.mkdir(parents=True, exist_ok=True)
                    with log.open("ab") as lines:
                        process = subprocess.Popen(
                            [*command, str(folder), job], stdout=lines, stderr=lines, env=environment
                        )
                    active[job] = (process, time.time())
                    report(f"{job}: started")
                if not active:
                    break
                time.sleep(poll_s)
                interrupts.check()
    finally:
        for process, _ in active.values():
            process.terminate()
        for process, _ in active.values():
            process.wait()
    if failed:
        log = _log(folder, failed[0])
        last = " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RunFailed(f"{failed[0]}{more} failed ({log}): {last}")


def next_jobs(study: Study, folder: Path) -> list[str]:
    """Names of the jobs that can be started now, in order; runs whose world is not there yet wait."""
    has_world = {seed: read_measured(design.world_path(folder, seed)) is not None for seed in study.all_seeds}
    runs = [run for run in design.wanted(study, finished(study, folder)) if has_world[run.seed]]
    worlds = [f"world/{seed}" for seed, is_there in has_world.items() if not is_there]
    return [*worlds, *(run.path for run in runs)]


def _log(folder: Path, job: str) -> Path:
    return folder / "logs" / f"{job.replace('/', '_')}.log"
