"""How fast the pieces are on this machine, next to its bounds and to what a user would pick instead.

    python -m experiments.benchmark --suite=all --json=bench.jsonl
    python -m experiments.benchmark --suite=rollout --model=A,B --cores=0 --peers --json=bench.jsonl
    python -m experiments.benchmark --tables=bench.jsonl --into=docs/benchmarks.md

One JSON object a line and contestant: median seconds over the repeats after warm-up, tokens a second, the bound (least
arithmetic at the best matrix product measured in the same run, least bytes at the read bandwidth measured beside it)
and the multiple of it, memory beside weights and optimizer state, compilations after the warm-up (0 is right) and
versions. Contestants take turns, so that a change of the machine's mood hits all of them (on a TPU, and with --apart,
they come one after the other). --peers makes virtual environments for transformers with TRL, and for Tunix, and has
them do the same work on the same weights.
"""

import json
import sys
from pathlib import Path

from absl import flags

from configs import base
from experiments import command
from omniopd_jax.bench import checkpoint, contest, machine, peers, suites, tables
from omniopd_jax.types import InputError

_SUITE = flags.DEFINE_string("suite", "all", f"One of {', '.join(suites.SUITES)}, or all.")
_MODEL = flags.DEFINE_list("model", [], "Shapes by name (A, B, qwen3-1.7b, …) or folders; none: the suite's own.")
_BATCH = flags.DEFINE_integer("batch", 0, "Responses; 0: the suite's own.", lower_bound=0)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 0, "Tokens a prompt; 0: the suite's own.", lower_bound=0)
_NEW = flags.DEFINE_integer("new_tokens", 0, "Tokens a response; 0: the suite's own.", lower_bound=0)
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Auto: float32 on a CPU, else bfloat16.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of each contestant after the warm-up.", lower_bound=1)
_CORES = flags.DEFINE_list("cores", [], "Cores to which every contestant is pinned, e.g. 1 or 0,1; none: no pinning.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "cpu: seconds of the process itself, where others use the machine as well."
)
_APART = flags.DEFINE_bool(
    "apart", False, "Contestants one after the other, not in turns; always so on a TPU, which serves one process."
)
_PEERS = flags.DEFINE_bool("peers", False, "Have transformers, TRL and Tunix do the same work.")
_JSON = flags.DEFINE_string("json", None, "File that the records are added to.")
_TABLES = flags.DEFINE_string("tables", None, "Print the tables of such a file, measure nothing.")
_INTO = flags.DEFINE_string("into", None, "With --tables: a document whose tables are replaced, between its marks.")


def main() -> None:
    if _TABLES.value:
        text = tables.markdown(tables.read(Path(_TABLES.value)))
        if _INTO.value:
            tables.put_into(Path(_INTO.value), text)
        else:
            print(text)
        return
    settings = contest.Settings(repeats=_REPEATS.value, cores=_cores(), clock=_CLOCK.value, is_apart=_APART.value)
    contest.pin(settings.cores)
    cache, scripts = suites.cache_folder(), Path(__file__).parent / "peers"
    rates = contest.Machine(contest.Entrant("machine", {"work": "machine", "dtype": _DTYPE.value}), settings)
    dtype = rates.about["dtype"]
    options = suites.Options(
        models=tuple(_MODEL.value),
        batch=_BATCH.value,
        prompt_tokens=_PROMPT.value,
        new_tokens=_NEW.value,
        dtype=dtype,
        config=base.get_config().to_dict(),
        folder=lambda name: str(checkpoint.ensure_checkpoint(cache / "models", name, dtype)) if _PEERS.value else "",
        rivals=peers.commands(scripts, cache, _say) if _PEERS.value else {},
    )
    about = machine.describe(rates.about["device"])
    try:
        for work in suites.contests(_SUITE.value, options):
            records = [record | about for record in contest.hold(work, rates, _say)]
            print(tables.summary(records), flush=True)
            if _JSON.value:
                with open(_JSON.value, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in records)
    finally:
        rates.close()


def _cores() -> tuple[int, ...]:
    try:
        return tuple(int(core) for core in _CORES.value)
    except ValueError as error:
        raise InputError(f"--cores={','.join(_CORES.value)} must be numbers of cores, e.g. 0 or 0,1.") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command.run(main)
