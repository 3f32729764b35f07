"""Compiles a run for machines that are not there, and says what it would need: before anything is paid.

    python -m experiments.plan --config=configs/qwen3_1p7b_math.py --topology=v5e:8x8
    python -m experiments.plan --config=configs/tiny.py --topology=cpu:8 --json=plan.json
    python -m experiments.plan --table=plans             # a folder of such files as one table

TPU slices need libtpu (pip install 'omniopd_jax[plan]') and no TPU.
"""

import json
import sys
from pathlib import Path

from absl import flags

from experiments import command
from omniopd_jax.plan.topology import check_name, set_environment, topology
from omniopd_jax.types import InputError

_CONFIG = command.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "", "cpu:N, or a TPU slice: v5e:8x8, v5p:2x2x2, v6e:8x8.")
_STUDENT = flags.DEFINE_string("student", "", "A published model, e.g. qwen3-1.7b, instead of config.student.path.")
_MICRO_BATCH = flags.DEFINE_enum("micro_batch", "", ["", "search"], "search: the largest micro-batch that fits.")
_JSON = flags.DEFINE_string("json", "", "File that gets the same as JSON.")
_TABLE = flags.DEFINE_string("table", "", "Folder of plans in JSON, printed as one table; nothing is compiled.")


def main() -> None:
    if _TABLE.value:
        from omniopd_jax.plan.report import table

        print(table(Path(_TABLE.value)))
        return
    if not _TOPOLOGY.value or _CONFIG.value is None:
        raise InputError("--config names the run and --topology what to plan it for, e.g. v5e:8x8 or cpu:8.")
    check_name(_TOPOLOGY.value)
    config = command.read_config(_CONFIG)
    out = Path(_JSON.value) if _JSON.value else None
    if out is not None:
        try:  # before minutes of compilation
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--json={out} cannot be written: {error.strerror or error}.") from error
    set_environment(_TOPOLOGY.value)  # before jax looks for devices
    from omniopd_jax.plan.planner import make_plan, to_json
    from omniopd_jax.plan.report import render

    found = make_plan(
        config,
        topology(_TOPOLOGY.value),
        student=_STUDENT.value,
        search=_MICRO_BATCH.value == "search",
        progress=lambda what: print(f"compiling {what} …", file=sys.stderr, flush=True),
    )
    print(render(found))
    if out is not None:
        out.write_text(json.dumps(to_json(found), indent=1) + "\n", encoding="utf-8")
    if found.fits is False:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
