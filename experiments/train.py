"""Distils a student.

    python -m experiments.train --config=configs/gsm8k.py --workdir=runs/gsm8k \\
        --config.student.path=STUDENT --config.teacher.path=TEACHER --config.data.train=train.jsonl

Running the same command again resumes the run.
"""

from absl import flags

from experiments import command
from experiments.screen import RunWatch, Screen
from omniopd_jax.teacher.budget import API_KINDS, projected_cost

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; running again with the same one resumes it.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    is_first = command.join_processes()
    config = command.read_config(_CONFIG)
    if config.teacher.kind in API_KINDS and is_first:
        print(projected_cost(config))
    if config.teacher.kind in API_KINDS and config.teacher.dry_run:
        return
    from omniopd_jax.train import distributed, loop

    workdir = command.workdir(_WORKDIR.value, "")
    with Screen() as bar:
        result = loop.run(config, workdir, progress=RunWatch(bar, "distil", config))

    def conclude() -> None:
        print(result)
        print(f"report   {command.write_report(result.workdir)}")
        result.mirror.push()

    distributed.first_only(conclude)  # the others wait: at exit jax would not give them the time for a long report


if __name__ == "__main__":
    command.run(main)
