"""From what was measured to results.md: every number, sentence and figure in it comes from the studies' files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omniopd_jax.study import design, figure, job, schedule
from omniopd_jax.study.design import Arm, Run
from omniopd_jax.study.measure import right
from omniopd_jax.study.run import read_measured
from omniopd_jax.study.statistics import Difference, difference, estimate
from omniopd_jax.train.evaluation import MODES

_MODE_TITLES = {"greedy": "greedy", "temperature_1": "temperature 1"}
_HEAD = """# Results

Written by this command (and once more for each section, see [comparison](comparison.md)) from the files of its runs;
nothing here was typed by hand:

    python -m experiments.compare --config=configs/compare_small.py --workdir=runs/compare --results=docs/results.md

Accuracy in % on held-out problems, mean over seeds ± standard error over seeds. A difference is paired (same seeds,
same problems); its interval is Student's t over the seeds, 95 %, and its p is McNemar's exact test over the problems of
these very runs. *holds* and *reversed*: the interval leaves out 0; *undecided*: it does not. No interval is widened for
the number of comparisons: of twenty differences that are none, about one looks like one. Phrasings: the effective
number in use at temperature 1. KL: nats a token at temperature 1 against the teacher, reverse on the student's samples,
forward on the teacher's; – where the two have no common vocabulary. Teacher tokens are those that it wrote, which are
what is held equal; read: those that it read before, a response once for all of its chunks (an API reads it for each).
CPU s: seconds of one update, the median, of this process alone. Seeds: those that the row is a mean of; a run that
overflowed is named there and is in no mean. Arms with more seeds than the others got them after the first three were
in, to narrow the intervals between those that lie closest; a difference is over the seeds that both arms have.
"""


class _Finished:
    """A study's folder, read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.study, self.common = job.read_record(folder)
        self.scores = schedule.finished(self.study, folder)
        self.runs = design.final_runs(self.study, self.scores)
        self.measured = {run: read_measured(folder / run.path) or {} for runs in self.runs.values() for run in runs}
        worlds = {seed: read_measured(design.world_path(folder, seed)) for seed in self.study.all_seeds}
        self.worlds = {seed: world for seed, world in worlds.items() if world is not None}

    def of(self, name: str) -> dict[int, Mapping[str, Any]]:
        """What was measured, by seed; "before" is the student as it was, "teacher" the teacher. No failed runs."""
        if name in ("before", "teacher"):
            return {seed: world["student" if name == "before" else name] for seed, world in self.worlds.items()}
        found = {run.seed: self.measured[run] for run in self.runs.get(name, ())}
        return {seed: measured for seed, measured in found.items() if not measured.get("failed")}

    def compare(self, better: str, worse: str, mode: str) -> Difference | None:
        """Paired over the seeds that both have; None where there is none."""
        first, second = self.of(better), self.of(worse)
        seeds = [seed for seed in self.study.all_seeds if seed in first and seed in second]
        if not seeds:
            return None
        return difference(
            np.stack([right(first[seed], mode) for seed in seeds]),
            np.stack([right(second[seed], mode) for seed in seeds]),
        )


def write_results(root: Path, path: Path) -> Path:
    """Writes `path` and figures/*.svg beside it from all studies below `root`, in the order of their names' files.

    Studies without a finished run are left out.
    """
    found = [_Finished(record.parent) for record in sorted(root.glob(f"*/{job.RECORD}"))]
    sections = [_HEAD]
    for finished in found:
        if finished.runs:
            picture = path.parent / "figures" / f"{finished.study.name}.svg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_text(_figure(finished), encoding="utf-8")
            sections.append(_section(finished, f"figures/{picture.name}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sections), encoding="utf-8")
    return path


def _section(finished: _Finished, picture: str) -> str:
    study = finished.study
    return "\n".join(
        [
            f"## {study.title}\n",
            study.about + "\n",
            _facts(finished),
            "",
            *_table(finished),
            "",
            f"![Held-out accuracy against updates, teacher tokens and CPU seconds]({picture})\n",
            "Curves on validation problems; bands from the lowest seed to the highest.\n",
            *_claims(finished),
            *_references(finished),
            *_search(finished),
        ]
    )


def _facts(finished: _Finished) -> str:
    study, common = finished.study, finished.common
    planned, done = sum(len(study.seeds_of(arm)) for arm in study.arms), sum(map(len, finished.runs.values()))
    updates, budget = common["train"]["steps"], common["train"]["max_teacher_tokens"]
    problems = {len(right(world["student"], "greedy")) for world in finished.worlds.values()}
    validation = {len(right(world["student"], "greedy", "validation")) for world in finished.worlds.values()}
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    cap = f" or, before that, once the teacher has written {budget:,} tokens" if budget else ""
    text = (
        f"{len(study.seeds)} seeds{_more(study)} (each with a world, a teacher and a student of its own), "
        f"{_join(problems)} held-out problems each. A run ends after {updates} updates{cap}. "
        f"Learning rates: the best of {rates} and at most {study.extensions} beyond the grid where the best "
        "lies at its edge, by the mean of greedy and temperature-1 accuracy on "
        f"{_join(validation)} validation problems, on seed {study.seeds[0]}; controls take the rate of the arm that "
        f"they belong to. {done} of {planned} runs at chosen rates are finished."
    )
    missing = [arm.name for arm in study.arms if len(finished.runs.get(arm.name, ())) < len(study.seeds_of(arm))]
    if missing:
        text += f" Not complete: {', '.join(missing)}."
    return text + "\n"


def _more(study: design.Study) -> str:
    counts = {len(study.seeds_of(arm)) for arm in study.arms} - {len(study.seeds)}
    return f", of some arms {_join(counts)}" if counts else ""


def _join(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def _table(finished: _Finished) -> list[str]:
    columns = (
        "", "learning rate", "greedy", "temperature 1", "phrasings", "reverse KL", "forward KL", "teacher tokens",
        "read", "updates", "ended by", "CPU s", "seeds",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, title in (("teacher", "*the teacher*"), ("before", "*the student before*")):
        if measured := list(finished.of(name).values()):
            lines.append(_row(title, measured, ["–", *_quality(measured), *["–"] * 5]))
    for is_control in (False, True):
        arms = [arm for arm in finished.study.arms if arm.is_control == is_control and arm.name in finished.runs]
        if is_control and arms:
            lines.append("| **controls** " + "| " * (len(columns) - 1) + "|")
        lines += [_arm_row(finished, arm) for arm in arms]
    return lines


def _row(title: str, measured: Sequence[Mapping[str, Any]], cells: Sequence[str], overflowed: int = 0) -> str:
    seeds = f"{len(measured)} ({overflowed} not finite)" if overflowed else str(len(measured))
    return "| " + " | ".join([title, *cells, seeds]) + " |"


def _quality(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    accuracies = [_spread([100 * one["eval"][mode]["accuracy"] for one in measured], 1) for mode in MODES]
    has_kl = all(one["kl"] is not None for one in measured)
    divergences = [_spread([one["kl"][kind] for one in measured], 3) if has_kl else "–" for kind in _KINDS]
    return [*accuracies, _spread([one["variety"] for one in measured], 2), *divergences]


_KINDS = ("reverse", "forward")


def _arm_row(finished: _Finished, arm: Arm) -> str:
    measured = list(finished.of(arm.name).values())
    rate = finished.runs[arm.name][0].learning_rate
    overflowed = len(finished.runs[arm.name]) - len(measured)
    if not measured:
        return _row(arm.title, measured, [f"{rate:.2g}", *["–"] * 10], overflowed)
    steps = arm.settings.get("train.steps", finished.common["train"]["steps"])
    tokens = [one["teacher_tokens"] for one in measured]
    ended = {"updates" if one["updates"] >= steps else "tokens" for one in measured}
    cpu = [one["cpu_seconds_an_update"] for one in measured if one["cpu_seconds_an_update"] is not None]
    cells = [
        f"{rate:.2g}",
        *_quality(measured),
        f"{np.mean(tokens):,.0f}",
        f"{np.mean([one['teacher_tokens_read'] for one in measured]):,.0f}",
        f"{np.mean([one['updates'] for one in measured]):.0f}",
        " and ".join(sorted(ended)),
        f"{np.mean(cpu):.2f}" if cpu else "–",
    ]
    return _row(arm.title, measured, cells, overflowed)


def _spread(values: Sequence[float], digits: int) -> str:
    found = estimate(values)
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}"


def _claims(finished: _Finished) -> list[str]:
    lines = []
    for claim in finished.study.claims:
        found = {mode: finished.compare(claim.better, claim.worse, mode) for mode in MODES}
        if all(found.values()):
            parts = [f"{_MODE_TITLES[mode]} {_verdict(one)}" for mode, one in found.items() if one]
            lines.append(f"- {claim.text}: {'; '.join(parts)}.")
    return ["### Orderings\n", *lines, ""] if lines else []


def _verdict(found: Difference) -> str:
    return f"**{found.verdict}** ({_points(found)}, p {_p(found.p_problems)})"


def _points(found: Difference) -> str:
    if found.seeds < 2:
        return f"{100 * found.mean:+.1f}, one seed"
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _references(finished: _Finished) -> list[str]:
    names = [name for name in finished.study.references if finished.of(name)]
    if not names:
        return []
    titles = {arm.name: arm.title for arm in finished.study.arms} | {"before": "the student before"}
    heads = [*(f"− {titles[name]}" for name in names), "− the same, the student its own teacher"]
    lines = ["### Each arm against the references\n", "Points of accuracy, greedy and at temperature 1.\n"]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in finished.study.arms:
        if arm.name not in finished.runs:
            continue
        cells, sharpened = [], finished.study.self_of(arm)
        for name in (*names, sharpened.name if sharpened else arm.name):
            found = [finished.compare(arm.name, name, mode) for mode in MODES] if name != arm.name else []
            cells.append("<br>".join(_points(one) for one in found if one) or "–")
        lines.append("| " + " | ".join([arm.title, *cells]) + " |")
    return [*lines, ""]


def _search(finished: _Finished) -> list[str]:
    study = finished.study
    lines = []
    for arm in study.arms:
        runs = sorted(run for run in finished.scores if run.arm == arm.name and run.seed == study.seeds[0])
        if not arm.rate_of and runs:
            cells = [f"{run.learning_rate:.2g}: {100 * finished.scores[run]:.1f}" for run in runs]
            chosen = design.rate(study, arm, finished.scores)
            lines.append(f"| {arm.title} | {' · '.join(cells)} | {'–' if chosen is None else f'{chosen:.2g}'} |")
    head = ["### The searches\n", "| | learning rate: validation score, % | chosen |", "|---|---|---|"]
    return [*head, *lines, ""] if lines else []


def _figure(finished: _Finished) -> str:
    axes = (("updates", "updates"), ("tokens", "teacher tokens written"), ("cpu", "CPU seconds (no compilation)"))
    panels = []
    for mode, title in _MODE_TITLES.items():
        for axis, label in axes:
            lines = []
            for name in finished.study.curves:
                curves = [
                    curve
                    for run in finished.runs.get(name, ())
                    if (curve := _curve(finished, run, mode, axis)) is not None
                ]
                if curves:
                    lines.append(_mean_line(finished.study.arm(name).title.replace("`", ""), curves))
            panels.append(figure.Panel(f"Accuracy, {title}, %", label, lines, (0.0, 100.0)))
    return figure.svg(panels, columns=len(axes), title=f"{finished.study.title}: accuracy while training")


def _curve(finished: _Finished, run: Run, mode: str, axis: str) -> tuple[list[float], list[float]] | None:
    """(x, accuracy in %) of one run; None where it has no such axis."""
    measured = finished.measured[run]
    file = finished.folder / run.path / "metrics.jsonl"
    if measured.get("failed") or not file.is_file():
        return None
    cpu = measured["cpu_seconds_an_update"]
    if axis == "cpu" and cpu is None:
        return None
    x, y = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get(f"eval/{mode}_accuracy") is not None:
            places = {
                "updates": row["step"],
                "tokens": row.get("teacher/total_tokens", 0),
                "cpu": row["step"] * (cpu or 0),
            }
            x.append(float(places[axis]))
            y.append(100 * row[f"eval/{mode}_accuracy"])
    if axis == "tokens" and x and x[-1] == 0:
        return None  # a teacher that writes nothing
    return x, y


def _mean_line(label: str, curves: Sequence[tuple[list[float], list[float]]]) -> figure.Line:
    length = min(len(x) for x, _ in curves)
    x = np.mean([x[:length] for x, _ in curves], axis=0)
    y_SxN = np.array([y[:length] for _, y in curves])
    return figure.Line(
        label, x.tolist(), y_SxN.mean(axis=0).tolist(), y_SxN.min(axis=0).tolist(), y_SxN.max(axis=0).tolist()
    )
