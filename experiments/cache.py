"""Looks into a teacher cache: counts its answers, exports and imports them.

python -m experiments.cache --cache=WORKDIR/teacher_cache.sqlite                         # what is in it
python -m experiments.cache --cache=WORKDIR/teacher_cache.sqlite --export=answers.jsonl  # "-" is standard output
python -m experiments.cache --cache=other.sqlite --import=answers.jsonl                  # made where absent
"""

from pathlib import Path

from absl import flags

from experiments import command
from omniopd_jax.teacher.budget import find_price
from omniopd_jax.teacher.cache import Cache
from omniopd_jax.types import InputError

_CACHE = flags.DEFINE_string("cache", None, "sqlite file of a teacher cache.", required=True)
_EXPORT = flags.DEFINE_string("export", "", "jsonl file to write, - for standard output.")
_IMPORT = flags.DEFINE_string("import", "", "jsonl file to read, - for standard input.")


def main() -> None:
    path = Path(_CACHE.value)
    if not _IMPORT.value and not path.is_file():
        raise InputError(f"There is no teacher cache {path}.")
    try:
        cache = Cache(path)
        try:
            if _IMPORT.value:
                with open(
                    _stream(_IMPORT.value, 0), encoding="utf-8", newline="\n", closefd=_IMPORT.value != "-"
                ) as lines:
                    print(f"{cache.import_lines(lines, _IMPORT.value)} samples read into {path}.")
            elif _EXPORT.value:
                with open(_stream(_EXPORT.value, 1), "w", encoding="utf-8", closefd=_EXPORT.value != "-") as file:
                    file.writelines(line + "\n" for line in cache.export_lines())
            else:
                print(stats(cache))
        finally:
            cache.close()
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def _stream(name: str, standard: int) -> str | int:
    return standard if name == "-" else name


def stats(cache: Cache) -> str:
    """A table: one line a teacher, mode, answered model and way of ending."""
    lines = [
        f"{'teacher':32} {'mode':12} {'answered as':32} {'ended':9} {'samples':>9} {'prompt':>12} {'completion':>12}"
    ]
    dollars = 0.0
    for entry in cache.stats():
        lines.append(
            f"{entry['teacher']:32} {entry['mode']:12} {entry['model']:32} {entry['finish']:9} {entry['samples']:9,} "
            f"{entry['prompt_tokens']:12,.0f} {entry['completion_tokens']:12,.0f}"
        )
        price = find_price(entry["teacher"].partition(":")[2])
        dollars += price.dollars(entry["prompt_tokens"], entry["completion_tokens"]) if price else 0.0
    lines.append(f"Tokens as counted by the teachers; about ${dollars:,.2f} at our prices, where we know them.")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
