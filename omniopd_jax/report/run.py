"""The report of one run."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.report.audits import Audits, read_audits
from omniopd_jax.report.curves import run_curves
from omniopd_jax.report.derived import with_derived
from omniopd_jax.report.health import findings
from omniopd_jax.report.page import write_page
from omniopd_jax.report.result import Measure, measures
from omniopd_jax.report.settings import settings
from omniopd_jax.report.text import number
from omniopd_jax.report.workdir import WorkDir, read_workdir


def write_report(
    workdir: Path | str, path: Path | str | None = None, *, defaults: Mapping[str, Any] | None = None
) -> Path:
    """Writes a run's report from the files of its work directory alone: also while it runs and after a crash.

    Args:
      workdir: the work directory.
      path: the HTML file; None: WORKDIR/report.html.
      defaults: the nested mapping of default settings, to show what differs; None: all settings alike.

    Returns:
      The path written.

    Raises:
      FileNotFoundError: `workdir` is no work directory.
    """
    run = with_derived(read_workdir(workdir))
    audits = read_audits(run)
    found = measures(run)
    headline, interval = _headline(run, found)
    head = {
        "name": run.name,
        "kicker": " · ".join(part for part in _kicker(run) if part),
        "headline": headline,
        "interval": interval,
        "lead": _state(run) if found else "Nothing has been measured on held-out problems yet.",
        "measures": [as_row(measure) for measure in found],
        "facts": _facts(run, audits.num_audits),
        "tables": [],
        "findings": [vars(finding) for finding in findings(run)],
        "curves": run_curves(run),
        "audits": {
            "responses": audits.num_responses,
            "chunks": audits.num_audits,
            "remark": audits.remark,
            "none": _without_audits(run, audits),
        },
        "settings": settings(run.config, defaults),
        "named": {"objective.prior_strength": number(run.setting("objective.prior_strength"))},
        "footer": footer(run.remarks),
    }
    return write_page(Path(path) if path else run.path / "report.html", f"{run.name} – run report", head, audits.pieces)


def as_row(measure: Measure) -> dict[str, Any]:
    """A measure as the page draws it."""
    interval = measure.interval
    about = [f"{measure.problems:,} held-out problems" if measure.problems else ""]
    about += [f"after step {measure.step:,}" if measure.step is not None else ""]
    if measure.before is not None:
        about.append(f"{100 * (measure.value - measure.before):+.1f} points".replace("-", "−"))
    return {
        "label": measure.label[:1].upper() + measure.label[1:],
        "about": " · ".join(part for part in about if part),
        "value": number(measure.value),
        "low": number(interval[0]) if interval else None,
        "high": number(interval[1]) if interval else None,
        "before": number(measure.before),
    }


def footer(remarks: list[str]) -> str:
    """When the page was made, and what could not be read."""
    made = datetime.datetime.now().astimezone()
    return " ".join([f"Made on {made.day} {made:%B %Y, %H:%M}.", *remarks])


def _kicker(run: WorkDir) -> list[str]:
    teacher = run.setting("teacher.model") or Path(str(run.setting("teacher.path") or "")).name
    student = Path(str(run.setting("student.path") or "")).name
    return [
        run.name,
        f"arm {run.setting('objective.arm')}" if run.setting("objective.arm") else "",
        f"student {student}" if student else "",
        f"teacher {teacher}" if teacher else "",
        f"seed {run.setting('train.seed')}" if run.setting("train.seed") is not None else "",
    ]


def _headline(run: WorkDir, found: list[Measure]) -> tuple[str, str]:
    """(the result in one sentence, its interval)."""
    if not found:
        return _state(run).rstrip("."), ""
    first = found[0]
    interval = first.interval
    between = f"95\u00a0% interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    if first.before is None:
        return f"{100 * first.value:.1f}\u00a0% of held-out problems solved", between
    verb = "rose" if first.value > first.before else "fell" if first.value < first.before else "stayed"
    return (
        f"{first.label[:1].upper() + first.label[1:]} accuracy {verb} from {100 * first.before:.1f}\u00a0% to "
        f"{100 * first.value:.1f}\u00a0%",
        between,
    )


def _state(run: WorkDir) -> str:
    steps, last = run.setting("train.steps"), run.last_step
    if not last:
        return "No step has been finished yet."
    if not isinstance(steps, int) or isinstance(steps, bool):
        return f"{last:,} steps done."
    if last >= steps:
        return f"All {steps:,} steps are done."
    age = time.time() - run.modified
    when = f"{age:.0f} seconds" if age < 120 else f"{age / 60:.0f} minutes" if age < 7200 else f"{age / 3600:.0f} hours"
    return f"Step {last:,} of {steps:,}; the log was last written {when} before this page was made."


_LEARNS_FROM = {
    "sft": "the teacher's whole answers",
    "opd": "the teacher's probabilities at the student's tokens",
    "grpo": "rewards of whole responses",
    "anchor": "nothing but the KL to the base model",
}


def _without_audits(run: WorkDir, audits: Audits) -> str:
    """Why nothing was audited, "" where something was."""
    if audits.num_audits:
        return ""
    arm = str(run.setting("objective.arm"))
    learns_from = _LEARNS_FROM.get(arm)
    if learns_from is not None:
        seen = " These are the student's responses." if audits.num_responses else ""
        return f"The arm {arm} audits no chunks: it learns from {learns_from}.{seen}"
    if not run.last_step:
        return ""
    if run.setting("train.audit_log_every") == 0:
        return "No audits are logged: train.audit_log_every is 0."
    return "No chunk was audited: responses are shorter than audit.chunk_tokens, or audit.max_fraction leaves no room."


def _facts(run: WorkDir, num_audits: int) -> list[list[str]]:
    def last(name: str) -> float | None:
        _, values = run.series(name)
        return values[-1] if values else None

    facts = [["Steps", f"{run.last_step:,}"]] if run.last_step else []
    batch = run.setting("rollout.batch_size")
    if run.last_step and isinstance(batch, int):
        facts.append(["Responses", f"{run.last_step * batch:,}"])
    if num_audits:
        facts.append(["Audited chunks logged", f"{num_audits:,}"])
    if (tokens := last("teacher/total_tokens")) is not None:
        facts.append(["Teacher tokens written", f"{tokens:,.0f}"])
    if (calls := last("teacher/total_calls")) is not None:
        facts.append(["Teacher calls", f"{calls:,.0f}"])
    if dollars := last("teacher/total_dollars"):
        facts.append(["Spend", f"${dollars:,.2f}"])
    _, seconds = run.series("time/step_s")
    if seconds:
        total = sum(seconds)
        shown = (
            f"{total:.0f} s" if total < 120 else f"{total / 60:.1f} min" if total < 7200 else f"{total / 3600:.1f} h"
        )
        facts.append(["Time in steps", shown])
    return facts
