"""One job of a study in a process of its own: `python -m omniopd_jax.study.job FOLDER JOB`.

FOLDER holds study.json; JOB is world/SEED or the path of a run below FOLDER (runs/ARM/LEARNING_RATE/seed-SEED).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.study import design
from omniopd_jax.study.design import Study

RECORD = "study.json"


def write_record(folder: Path, study: Study, common: Mapping[str, Any]) -> None:
    """What the jobs read."""
    folder.mkdir(parents=True, exist_ok=True)
    record = dict(study=design.to_plain(study), common=common)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[Study, dict[str, Any]]:
    """(study, common settings) of a study's folder."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return design.study_from(record["study"]), record["common"]


def do(folder: Path, job: str) -> None:
    """Does one job.

    Raises:
      InputError: no job of such a name.
    """
    from omniopd_jax.study import run

    study, common = read_record(folder)
    kind, _, rest = job.partition("/")
    if kind == "world":
        run.do_world(common, study, int(rest), folder)
    else:
        run.do_run(common, study, design.parse(job), folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    do(Path(sys.argv[1]), sys.argv[2])
