"""From nothing to a distilled student on a laptop's CPU, in minutes.

    make quickstart            or: python -m experiments.quickstart --workdir=runs/quickstart --seed=0

Builds a small world of written-out additions, trains a teacher and a student that forgets carries, then distils the
student with the teacher as text only: with OmniOPD as published and with the project's recommended setting, from the
same start and at the same teacher tokens. Running it again goes on where it was stopped.
"""

import json
import time
from pathlib import Path
from typing import Any

from absl import flags

from configs import quickstart as configs
from experiments import command
from experiments.screen import RunWatch, Screen
from omniopd_jax.config import Config, from_mapping
from omniopd_jax.types import InputError

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the world, of the models and of every draw.")
_FAST = flags.DEFINE_bool("fast", False, "A few updates and problems: shows that everything works, learns little.")


def main() -> None:
    began = time.perf_counter()
    workdir = command.workdir(_WORKDIR.value, "runs/quickstart")
    _claim(workdir)
    recommended = _config("recommended", workdir)
    world = recommended.world

    from omniopd_jax.train import loop
    from omniopd_jax.train.small_world import build_world

    with Screen() as bar:
        build_world(world, Path(world.path), progress=lambda name, done, total: bar(f"train the {name}", done, total))
        before, variety_before = _measure(recommended, Path(world.path) / "student", "before", bar)
        results = {}
        tokens = 0
        for name in ("recommended", "published"):
            config = _config(name, workdir, max_teacher_tokens=tokens)
            folder = workdir / name
            done = loop.run(config, folder, progress=RunWatch(bar, f"distil: {name}", config))
            tokens = tokens or done.teacher_tokens
            after, variety = _measure(config, done.model_path, name, bar)
            results[name] = dict(
                before=before,
                after=after,
                problems=config.eval.problems,
                teacher_tokens=done.teacher_tokens,
                updates=done.updates,
                seconds=_seconds(folder),
                phrasings=dict(before=variety_before, after=variety),
            )
            (folder / "result.json").write_text(json.dumps(results[name], indent=2) + "\n", encoding="utf-8")
            command.write_report(folder)
    seconds = round(time.perf_counter() - began, 1)
    summary = results["recommended"] | dict(published=results["published"], seed=_SEED.value, total_seconds=seconds)
    (workdir / "result.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(workdir, summary)


def _claim(workdir: Path) -> None:
    marker = workdir / "quickstart.json"
    wanted = dict(seed=_SEED.value, fast=_FAST.value)
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != wanted:
        raise InputError(f"{workdir} holds a quickstart with other settings: delete it or name another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def _config(name: str, workdir: Path, *, max_teacher_tokens: int = 0) -> Config:
    config: Any = configs.get_config(name)  # its attributes are dynamic
    config.train.seed = config.world.seed = _SEED.value
    config.world.path = str(workdir / "world")
    if max_teacher_tokens:
        # Equal teacher tokens decide when this one ends, not a number of updates.
        config.train.steps = 10**6
        config.train.max_teacher_tokens = max_teacher_tokens
    if _FAST.value:
        config.world.update(teacher_steps=100, student_steps=100)
        config.train.steps = 4
        config.eval.update(problems=100, batch_size=100)
    return from_mapping(config)


def _seconds(folder: Path) -> float:
    """Time of all steps of a run, those before a resume included."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return round(sum(json.loads(line)["time/step_s"] for line in lines), 1)


def _measure(config: Config, folder: Path, name: str, bar: Screen) -> tuple[dict, float]:
    """({greedy, temperature_1}, effective number of phrasings at temperature 1) of a model folder."""
    from omniopd_jax.data import load_tokenizer, read_prompts
    from omniopd_jax.models import load_model
    from omniopd_jax.train.evaluation import judge_of, measure
    from omniopd_jax.worlds import arithmetic, wording

    prompts = read_prompts(Path(config.world.path) / "eval.jsonl")[: config.eval.problems]
    found = measure(
        config, load_model(folder), load_tokenizer(folder), prompts, judge_of(config, prompts),
        progress=lambda done, total: bar(f"evaluate {name}", done, total),
    )  # fmt: skip
    summary = {mode: result.summary() for mode, result in found.items()}
    return summary, wording.phrasing_variety(found["temperature_1"].responses, arithmetic.MARKS)


def _print(workdir: Path, summary: dict) -> None:
    def cell(figures: dict) -> str:
        return f"{100 * figures['accuracy']:5.1f} ± {100 * figures['standard_error']:.1f}"

    published = summary["published"]
    rows = [
        ("before", summary["before"], summary["phrasings"]["before"], "", "", ""),
        *(
            (title, part["after"], part["phrasings"]["after"], part["teacher_tokens"], part["updates"], part["seconds"])
            for title, part in (("OmniOPD as published", published), ("recommended", summary))
        ),
    ]
    problems = summary["problems"]
    print(f"\nAccuracy on {problems} held-out additions, % ± standard error (seed {summary['seed']})\n")
    head = ("", "greedy", "temperature 1", "phrasings", "teacher tokens", "updates", "seconds")
    print("{:<22}{:>13}{:>15}{:>11}{:>16}{:>9}{:>9}".format(*head))
    for title, figures, variety, *rest in rows:
        line = (title, cell(figures["greedy"]), cell(figures["temperature_1"]), f"{variety:.2f} of 3", *rest)
        print("{:<22}{:>13}{:>15}{:>11}{:>16}{:>9}{:>9}".format(*line))
    here = workdir.relative_to(Path.cwd()) if workdir.is_relative_to(Path.cwd()) else workdir
    print(
        f"""
student   {here / "recommended" / "model"}   (transformers opens it)
report    {here / "recommended" / "report.html"}
audits    {here / "recommended" / "audits.jsonl"}
figures   {here / "result.json"}
published {here / "published"}

{summary["total_seconds"]:.0f} seconds in all"""
    )


if __name__ == "__main__":
    command.run(main)
