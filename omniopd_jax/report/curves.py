"""Which metrics share a chart, in which order, and what a reader should know about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from omniopd_jax.report.text import number
from omniopd_jax.report.workdir import WorkDir


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: metrics of the same unit."""

    group: str
    title: str
    unit: str  # "share" (0 to 1, shown in %), "s", "$", or a word that is shown as it is
    lines: tuple[tuple[str, str], ...]  # (metric, label)
    about: str = ""  # one sentence
    band: tuple[str, str] | None = None  # metrics of the lower and upper edge around the first line
    is_noisy: bool = True  # a running mean helps the eye
    has_legend: bool = False  # the title alone does not say what the only line is


CHARTS = (
    Chart(
        "Learning",
        "Similarity to the teacher",
        "",
        (
            ("audit/similarity", "chunks"),
            ("audit/branch_score_mean", "branches"),
            ("audit/agreement_mean", "teacher with itself (ceiling)"),
        ),
        "Mean over audited chunks; the band holds the middle 80\u00a0% of them.",
        ("audit/similarity_low", "audit/similarity_high"),
    ),
    Chart(
        "Learning",
        "Reward",
        "",
        (("reward/mean", "mean"), ("reward/std", "spread")),
        "Of the responses, judged by the reference answers; the spread is the standard deviation over responses.",
    ),
    Chart(
        "Learning",
        "Prompts with a signal",
        "share",
        (("reward/informative", "prompts"),),
        "Where all responses of a prompt have one reward, there is nothing to compare.",
    ),
    Chart(
        "Learning",
        "Divergence from the teacher",
        "nats",
        (("opd/divergence", "a token"),),
        "Between the teacher's distribution and the student's, over the tokens of the student's responses.",
    ),
    Chart(
        "Learning",
        "Target and prior",
        "",
        (("audit/target", "target π̂"), ("audit/prior", "prior π̄")),
        "What a chunk is trained towards, and the student's own confidence that is mixed into it.",
    ),
    Chart(
        "Learning",
        "Loss",
        "",
        (
            ("loss/total", "total"),
            ("loss/trunk", "responses"),
            ("loss/branch", "branches"),
            ("loss/divergence", "divergence"),
            ("loss/ratio", "ratio"),
            ("loss/anchor", "anchor"),
        ),
        "What the update minimises. Its value is no measure of quality.",
    ),
    Chart(
        "Learning",
        "Advantage",
        "",
        (("audit/advantage", "mean size"),),
        "Mean absolute weight of chunks or branches. Near 0 there is nothing left to learn from.",
    ),
    Chart(
        "Learning",
        "Clipped ratios",
        "share",
        (("update/clip_fraction", "tokens"),),
        "Tokens whose ratio was clipped in the last update of a batch.",
    ),
    Chart("Learning", "Gradient norm", "", (("optimizer/grad_norm", "gradient"),), "Before clipping."),
    Chart("Learning", "Learning rate", "", (("optimizer/learning_rate", "learning rate"),), is_noisy=False),
    Chart(
        "The student",
        "Entropy",
        "nats",
        (("rollout/entropy", "all tokens"), ("audit/entropy", "audited forks")),
        "How unsure the student is. A fall at the forks means that it has settled on one wording.",
    ),
    Chart(
        "The student",
        "KL to the base model",
        "nats",
        (("anchor/kl", "anchored tokens"),),
        "How far the student has moved, a token, where it carries the anchor.",
    ),
    Chart("The student", "Response length", "tokens", (("rollout/tokens", "mean"),)),
    Chart(
        "The student",
        "How responses end",
        "share",
        (("rollout/finished", "with a stop token"), ("rollout/truncated", "at the length limit")),
    ),
    Chart(
        "The student",
        "Repetition",
        "share",
        (("rollout/repetition", "runs of four tokens"),),
        "Share of four-token runs that stood in the same response before.",
    ),
    Chart(
        "The student",
        "Distinct branches",
        "share",
        (("audit/branch_distinct_share", "branches"),),
        "Where all branches of a chunk are the same text, there is nothing to choose between.",
    ),
    Chart("The student", "Log-probability", "nats", (("rollout/logprob", "a token"),), "Of what the student sampled."),
    Chart(
        "The teacher",
        "Audited and anchored",
        "share",
        (("audit/fraction", "audited"), ("anchor/fraction", "anchored")),
        "Share of response tokens. What is audited does not carry the anchor unless all tokens do.",
    ),
    Chart("The teacher", "Length of its answers", "tokens", (("sft/answer_tokens", "mean"),)),
    Chart(
        "The teacher",
        "Missing samples",
        "share",
        (("teacher/missing_share", "missing"), ("teacher/refused_share", "refused")),
        "Continuations that were asked for and did not arrive.",
    ),
    Chart(
        "The teacher",
        "Unanimous answers",
        "share",
        (("audit/identical_share", "chunks"),),
        "Chunks whose continuations are all the same text: the teacher leaves no choice there, or cannot sample.",
    ),
    Chart(
        "The teacher",
        "Tokens so far",
        "tokens",
        (("teacher/total_tokens", "written"), ("teacher/total_prompt_tokens", "read")),
        is_noisy=False,
    ),
    Chart("The teacher", "Calls so far", "calls", (("teacher/total_calls", "calls"),), is_noisy=False),
    Chart("The teacher", "Spend so far", "$", (("teacher/total_dollars", "spend"),), is_noisy=False),
    Chart(
        "Time",
        "Seconds by phase",
        "s",
        (
            ("time/sample_s", "sample"),
            ("time/score_s", "score"),
            ("time/audit_s", "audit"),
            ("time/update_s", "update"),
            ("time/evaluate_s", "evaluate"),
            ("time/checkpoint_s", "checkpoint"),
        ),
    ),
    Chart("Time", "A whole step", "s", (("time/step_s", "step"),)),
)


def run_curves(workdir: WorkDir) -> list[dict[str, Any]]:
    """The charts of one run as the page draws them; metrics without a chart of their own come last, group ""."""
    steps = list(workdir.metrics)
    return [
        {
            "group": chart.group,
            "title": chart.title,
            "unit": chart.unit,
            "about": chart.about,
            "noisy": chart.is_noisy,
            "legend": chart.has_legend,
            "x": steps,
            "lines": [_line(workdir, chart, place) for place in range(len(chart.lines))],
        }
        for chart in charts_of([workdir])
    ]


def _line(workdir: WorkDir, chart: Chart, place: int) -> dict[str, Any]:
    metric, label = chart.lines[place]
    line: dict[str, Any] = {"label": label, "values": _values(workdir, metric)}
    if place == 0 and chart.band:
        line |= {"low": _values(workdir, chart.band[0]), "high": _values(workdir, chart.band[1])}
    return line


def _values(workdir: WorkDir, metric: str) -> list[float | None]:
    return [number(row.get(metric)) for row in workdir.metrics.values()]


def charts_of(workdirs: Iterable[WorkDir]) -> list[Chart]:
    """The charts, and of each the lines, for which at least one run has values. Every metric is on one of them.

    A loss term that is 0 throughout is no part of the loss, and what costs nothing has no bill: they go to the charts
    at the end.
    """
    workdirs = list(workdirs)
    present = {name for workdir in workdirs for row in workdir.metrics.values() for name in row}
    charts = _evaluation_charts(present)
    for chart in CHARTS:
        lines = tuple(line for line in chart.lines if line[0] in present and not _is_idle_term(line[0], workdirs))
        band = chart.band if chart.band and lines[:1] == chart.lines[:1] and present >= set(chart.band) else None
        if lines:
            charts.append(dataclasses.replace(chart, lines=lines, band=band, has_legend=len(chart.lines) > 1))
    shown = {name for chart in charts for name, _ in chart.lines} | {
        name for chart in charts for name in chart.band or ()
    }
    charts += [Chart("", name, "", ((name, name),)) for name in sorted(present - shown)]
    return charts


def _is_idle_term(name: str, workdirs: Iterable[WorkDir]) -> bool:
    return name.startswith(("loss/", "teacher/total_dollars")) and not any(
        any(workdir.series(name)[1]) for workdir in workdirs
    )


def _evaluation_charts(present: set[str]) -> list[Chart]:
    """One chart for the accuracies among eval/*, which are shares; the rest of them is left to "everything else"."""
    lines = tuple((name, label) for name in sorted(present) if (label := accuracy_label(name)) is not None)
    return [Chart("Learning", "Held-out accuracy", "share", lines, is_noisy=False, has_legend=True)] if lines else []


def accuracy_label(name: str) -> str | None:
    """ "greedy" for eval/greedy_accuracy, eval/greedy/accuracy or eval/greedy; None for what is no accuracy."""
    section, _, rest = name.partition("/")
    if section != "eval" or rest.endswith(
        ("standard_error", "tokens", "truncated", "no_answer", "problems", "seconds", "_s")
    ):
        return None
    return rest.removesuffix("accuracy").strip("/_").replace("_", " ") or "accuracy"
