"""What sampling while the teacher works is worth on this machine: steps with and without it, next to their bound.

    python -m experiments.overlap

Seconds, medians over the steps after the warm-up. device: the student's own work in the same parts, without a teacher
to wait for. bound: 1.15 times the longer of device and teacher, and one micro-batch. teacher "delay" answers whatever
it is asked after that time, "pace" works off a batch's questions in that time.
"""

import json
from typing import Any

from absl import flags

from configs import base
from experiments import command
from omniopd_jax.bench import overlap

_BATCH = flags.DEFINE_integer("batch", 32, "Responses a step.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 128, "Tokens a response, at most.", lower_bound=16)
_WIDTH = flags.DEFINE_integer("width", 128, "Width of the student.", lower_bound=8)
_PARTS = flags.DEFINE_integer("micro_batches", 4, "Parts of the batch.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 5, "Steps measured.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File that the records are added to.")


def main() -> None:
    values: Any = base.get_config()  # its attributes are dynamic
    values.rollout.update(batch_size=_BATCH.value, max_new_tokens=_NEW.value)
    values.audit.update(num_chunks=2, chunk_tokens=8, num_continuations=2)
    values.world.student_width = _WIDTH.value
    columns = ("device", "teacher", "without", "step", "bound")
    print(f"{'teacher':<8}{'parts':>6}" + "".join(f"{name:>9}" for name in columns))
    for record in overlap.measure(values.to_dict(), micro_batches=_PARTS.value, steps=_STEPS.value):
        cells = "".join(f"{record[f'{name}_s']:>9.3f}" for name in columns)
        print(f"{record['teacher']:<8}{record['micro_batches']:>6}{cells}", flush=True)
        if _JSON.value:
            with open(_JSON.value, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    command.run(main)
