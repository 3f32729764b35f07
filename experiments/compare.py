"""Compares arms at equal teacher tokens and equal updates: learning rates searched, several seeds, paired tests.

    python -m experiments.compare --config=configs/compare_small.py --workdir=runs/compare --workers=2
    python -m experiments.compare --config=configs/compare_small.py:fast --workdir=runs/compare_fast

Every run has a folder and a process of its own; the same command goes on from what is finished. --only=verify,branch
restricts it to some arms. A config has sections (`:rewriting`, …), each a study in a folder of --workdir; results.md
and its figures are written from all studies found there.
"""

from pathlib import Path

from absl import flags

from experiments import command, sections
from omniopd_jax.config import to_dict
from omniopd_jax.study import design, job

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "Where the studies are; running again goes on there.")
_ONLY = flags.DEFINE_list("only", [], "Arms to run, by name; empty: all of them.")
_WORKERS = flags.DEFINE_integer(
    "workers", 2, "Runs side by side, one thread each; 1: one, on all cores.", lower_bound=1
)
_RESULTS = flags.DEFINE_string("results", "", "Markdown file of the results; default: WORKDIR/results.md.")
flags.mark_flag_as_required("config")


def main() -> None:
    from omniopd_jax.study import results, schedule

    common = to_dict(command.read_config(_CONFIG))
    study = design.study_from(sections.of_config("get_study"))
    root = command.workdir(_WORKDIR.value, "runs/compare")
    folder = root / study.name
    chosen = design.only(study, _ONLY.value) if _ONLY.value else study
    schedule.check_settings(chosen, common, folder)
    job.write_record(folder, study, common)
    try:
        schedule.do_all(chosen, folder, workers=_WORKERS.value, report=lambda line: print(line, flush=True))
    finally:
        print(f"results  {results.write_results(root, Path(_RESULTS.value or root / 'results.md'))}")


if __name__ == "__main__":
    command.run(main)
