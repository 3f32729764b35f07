"""Compares gradients at a fixed student: each text-only estimator against the exact white-box KL gradients.

    python -m experiments.align --config=configs/align_small.py --workdir=runs/align --results=docs/alignment.md

A cheap filter for settings: no student is trained. What is finished is kept; the same command goes on from there.
"""

from pathlib import Path

from absl import flags

from experiments import command, sections
from experiments.screen import Screen
from omniopd_jax.config import to_dict

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", "runs/align", "Where the world and the measurements are.")
_RESULTS = flags.DEFINE_string("results", "", "Markdown file of the table; default: WORKDIR/alignment.md.")
flags.mark_flag_as_required("config")


def main() -> None:
    common, plan = to_dict(command.read_config(_CONFIG)), sections.of_config("get_estimators")
    from omniopd_jax.study import alignment_table

    root = command.workdir(_WORKDIR.value, "runs/align")
    path = Path(_RESULTS.value or root / "alignment.md")
    rows: list[alignment_table.Row] = []
    with Screen() as bar:
        for row in alignment_table.measure_all(common, plan, root, progress=bar):
            rows.append(row)
            alignment_table.write(rows, path)  # whatever ends this early, what is measured is there to be read
    print(f"results  {path}")


if __name__ == "__main__":
    command.run(main)
