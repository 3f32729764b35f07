"""Writes the report of a run, or of several side by side, from their files.

    python -m experiments.report --workdir=runs/gsm8k
    python -m experiments.report --workdir=runs/verify,runs/branch --out=comparison.html

It can be called while the run is going and after a crash. Folders are comma-separated; wildcards work: 'runs/branch_*'.
"""

import glob
from pathlib import Path

from absl import flags

from experiments import command
from omniopd_jax.types import InputError

_WORKDIR = flags.DEFINE_list("workdir", None, "Work directories; several give one comparison.")
_OUT = flags.DEFINE_string("out", None, "HTML file; default WORKDIR/report.html, or comparison.html for several.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    from configs import base
    from omniopd_jax import report

    folders = [folder for pattern in _WORKDIR.value or () for folder in _folders(pattern)]
    out = command.workdir(_OUT.value, "") if _OUT.value else None
    try:
        if len(folders) == 1:
            path = report.write_report(folders[0], out, defaults=base.get_config().to_dict())
        else:
            path = report.write_comparison(folders, out or Path("comparison.html").absolute())
    except FileNotFoundError as error:
        raise InputError(f"--workdir: {error}") from error
    print(f"report   {path} ({path.stat().st_size / 2**20:.1f} MB)")


def _folders(pattern: str) -> list[Path]:
    path = command.workdir(pattern, "")
    found = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_dir())
    return found or [path]


if __name__ == "__main__":
    command.run(main)
