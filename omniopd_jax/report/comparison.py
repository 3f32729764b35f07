"""Several runs side by side: runs that differ in nothing but seeds and paths are one arm, its spread a band."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.report.curves import charts_of
from omniopd_jax.report.derived import with_derived
from omniopd_jax.report.page import write_page
from omniopd_jax.report.result import Measure, measures
from omniopd_jax.report.run import as_row, footer
from omniopd_jax.report.settings import differences, flatten, shown
from omniopd_jax.report.text import number
from omniopd_jax.report.workdir import WorkDir, read_workdir

Cell = str | list[str]  # a text, or [text, small text below it]
_MOST_IN_A_LABEL = 3  # settings that name an arm; with more, the folders do
_FINAL = (  # columns of the final table beside the accuracies: (title, metric, shown as)
    ("Steps", "", lambda value: f"{value:,.0f}"),
    ("Similarity", "audit/similarity", lambda value: f"{value:.3f}"),
    ("Entropy", "rollout/entropy", lambda value: f"{value:.3f}"),
    ("KL to base", "anchor/kl", lambda value: f"{value:.4f}"),
    ("Teacher tokens", "teacher/total_tokens", lambda value: f"{value:,.0f}"),
    ("Spend", "teacher/total_dollars", lambda value: f"${value:,.2f}"),
    ("Seconds", "time/step_s", lambda value: f"{value:,.0f}"),
)
_SUMMED = ("time/step_s",)  # over the steps; of the other metrics, the mean of the last tenth
_TOTALS = ("teacher/total_tokens", "teacher/total_dollars")  # their last value counts


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but seeds and paths."""

    label: str
    runs: tuple[WorkDir, ...]


def write_comparison(workdirs: Sequence[Path | str], path: Path | str) -> Path:
    """Writes the report that compares runs: final table, what differs, curves with a band over the seeds.

    Args:
      workdirs: work directories, in the order in which they are shown.
      path: the HTML file.

    Returns:
      The path written.

    Raises:
      FileNotFoundError: one of them is no work directory.
    """
    runs = [with_derived(read_workdir(workdir)) for workdir in workdirs]
    arms = group(runs)
    rows = [(arm, _arm_measures(arm)) for arm in arms]
    tables = [_final_table(arms)]
    differing = differences([arm.runs[0].config for arm in arms], _unimportant(arms))
    if differing:
        tables.append(
            {
                "id": "differences",
                "title": "What differs",
                "note": "Seeds and paths are left out.",
                "columns": ["Setting", *(arm.label for arm in arms)],
                "rows": [[name, *values] for name, values in differing.items()],
                "numeric": len(arms) + 1,
            }
        )
    head = {
        "name": "Comparison",
        "kicker": f"Comparison of {len(runs)} runs in {len(arms)} arms",
        "headline": _headline(rows),
        "lead": "Runs that differ in nothing but seeds and paths are one arm.",
        "interval": "",
        "measures": _measure_rows(rows),
        "facts": [],
        "tables": tables,
        "findings": None,
        "curves": comparison_curves(arms),
        "band": "Lines are means over the seeds of an arm; bands run from the smallest seed to the largest.",
        "audits": None,
        "settings": None,
        "named": {},
        "footer": footer([f"{run.name}: {remark}" for run in runs for remark in run.remarks]),
    }
    return write_page(Path(path), "Comparison of runs", head)


def group(runs: Sequence[WorkDir]) -> list[Arm]:
    """Arms in the order of their first runs, named by the settings in which they differ."""
    members: dict[tuple[tuple[str, str], ...] | str, list[WorkDir]] = {}
    for run in runs:
        settings = flatten(run.config)
        key = tuple((name, shown(value)) for name, value in sorted(settings.items()) if not _is_incidental(name))
        members.setdefault(key if settings else run.name, []).append(run)
    groups = list(members.values())
    differing = differences([group[0].config for group in groups])
    names = [name for name in differing if not _is_incidental(name)]
    labels = []
    for place, group in enumerate(groups):
        if 0 < len(names) <= _MOST_IN_A_LABEL:
            label = ", ".join(_named(name, differing[name][place]) for name in names)
        else:
            label = group[0].name
        labels.append(label if label not in labels else f"{label} ({place + 1})")
    return [Arm(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def _named(setting: str, value: str) -> str:
    """ "branch" for objective.arm, "anchor_weight 0.1" for other settings."""
    return value if setting == "objective.arm" else f"{setting.rpartition('.')[2]} {value}"


def comparison_curves(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One chart a metric, one line an arm, its band from the smallest seed to the largest."""
    steps = sorted({step for arm in arms for run in arm.runs for step in run.metrics})
    found = []
    for chart in charts_of([run for arm in arms for run in arm.runs]):
        for metric, label in chart.lines:
            lines = [
                {"label": arm.label, "color": index} | band
                for index, arm in enumerate(arms)
                if (band := _band(arm, metric, steps)) is not None
            ]
            if lines:
                found.append(
                    {
                        "group": chart.group,
                        "title": chart.title if len(chart.lines) == 1 else f"{chart.title}: {label}",
                        "unit": chart.unit,
                        "about": chart.about if len(chart.lines) == 1 else "",
                        "x": steps,
                        "lines": lines,
                        "noisy": chart.is_noisy,
                        "legend": True,
                    }
                )
    return found


def _band(arm: Arm, metric: str, steps: Sequence[int]) -> dict[str, Any] | None:
    """Mean and range over the runs of an arm, at the steps where all those that know the metric have a value."""
    columns = [dict(zip(*run.series(metric), strict=True)) for run in arm.runs]
    columns = [column for column in columns if column]
    if not columns:
        return None
    values = [
        [column[step] for column in columns] if all(step in column for column in columns) else [] for step in steps
    ]
    band = {"values": [number(sum(each) / len(each)) if each else None for each in values]}
    if len(columns) > 1:
        band["low"] = [number(min(each)) if each else None for each in values]
        band["high"] = [number(max(each)) if each else None for each in values]
    return band


def _is_incidental(name: str) -> bool:
    """Whether two runs that differ in this setting are still repetitions of the same thing."""
    last = name.rpartition(".")[2]
    return last in ("seed", "path", "cache_path", "compilation_cache") or name.startswith(
        ("logging.", "train.checkpoint")
    )


def _unimportant(arms: Iterable[Arm]) -> frozenset[str]:
    return frozenset(name for arm in arms for name in flatten(arm.runs[0].config) if _is_incidental(name))


def _arm_measures(arm: Arm) -> dict[str, list[Measure]]:
    """Label of an accuracy → that of each run."""
    found: dict[str, list[Measure]] = {}
    for run in arm.runs:
        for measure in measures(run):
            found.setdefault(measure.label, []).append(measure)
    return found


def _measure_rows(rows: Sequence[tuple[Arm, dict[str, list[Measure]]]]) -> list[dict[str, Any]]:
    """One row an accuracy and arm: mean over the seeds, and their range instead of an interval."""
    found = []
    for label in dict.fromkeys(label for _, measured in rows for label in measured):
        for index, (arm, measured) in enumerate(rows):
            if label not in measured:
                continue
            each = measured[label]
            values = [measure.value for measure in each]
            befores = [measure.before for measure in each if measure.before is not None]
            mean = dataclasses.replace(
                each[0], value=sum(values) / len(values), before=sum(befores) / len(befores) if befores else None
            )
            row = as_row(mean) | {"label": f"{arm.label}, {label}", "color": index}
            if len(values) > 1:
                row |= {"low": number(min(values)), "high": number(max(values))}
                row["about"] = f"mean and range of {len(values)} seeds"
            found.append(row)
    return found


def _headline(rows: Sequence[tuple[Arm, dict[str, list[Measure]]]]) -> str:
    labels = [label for _, found in rows for label in found]
    if not labels:
        return f"{len(rows)} arms; nothing has been measured on held-out problems yet"
    label = labels[0]
    means = [
        (sum(measure.value for measure in found[label]) / len(found[label]), arm.label)
        for arm, found in rows
        if label in found
    ]
    return f"{label[:1].upper() + label[1:]} accuracy: " + ", ".join(
        f"{name} {100 * mean:.1f}\u00a0%" for mean, name in sorted(means, reverse=True)
    )


def _final_table(arms: Sequence[Arm]) -> dict[str, Any]:
    found = [_arm_measures(arm) for arm in arms]
    labels = list(dict.fromkeys(label for each in found for label in each))
    columns: list[tuple[str, list[Cell]]] = [
        (f"{label[:1].upper() + label[1:]} %", [_accuracy(each.get(label, [])) for each in found]) for label in labels
    ]
    if any(measure.before is not None for each in found for of_label in each.values() for measure in of_label):
        columns.append(("Before %", [_before(each) for each in found]))
    for title, metric, show in _FINAL:
        cells = [
            _spread([value for run in arm.runs if (value := _at_end(run, metric)) is not None], show) for arm in arms
        ]
        if any(cell != "–" for cell in cells):
            columns.append((title, cells))
    return {
        "id": "table",
        "title": "Final table",
        "note": (
            "Mean over the seeds, below it the smallest and the largest; for a single seed the 95\u00a0% interval over "
            "the problems."
        ),
        "columns": ["Arm", "Seeds", *(title for title, _ in columns)],
        "rows": [
            [arm.label, str(len(arm.runs)), *(cells[place] for _, cells in columns)] for place, arm in enumerate(arms)
        ],
        "numeric": 1,
    }


def _at_end(run: WorkDir, metric: str) -> float | None:
    if not metric:
        return float(run.last_step)
    _, values = run.series(metric)
    if not values:
        return None
    if metric in _SUMMED:
        return sum(values)
    width = 1 if metric in _TOTALS else max(1, len(values) // 10)
    return sum(values[-width:]) / width


def _spread(values: list[float], show: Callable[[float], str]) -> Cell:
    """The mean, and below it the range where there is one."""
    if not values:
        return "–"
    mean, low, high = show(sum(values) / len(values)), show(min(values)), show(max(values))
    return mean if low == high else [mean, f"{low} to {high}"]


def _accuracy(each: list[Measure]) -> Cell:
    if len(each) == 1 and (interval := each[0].interval) is not None:
        return [f"{100 * each[0].value:.1f}", f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"]
    return _spread([100 * measure.value for measure in each], lambda value: f"{value:.1f}")


def _before(found: dict[str, list[Measure]]) -> Cell:
    first = next(iter(found.values()), [])
    return _spread(
        [100 * measure.before for measure in first if measure.before is not None], lambda value: f"{value:.1f}"
    )
