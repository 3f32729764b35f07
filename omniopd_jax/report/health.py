"""What goes wrong in distillation, looked for in the metrics and said in plain sentences.

A check compares the end of the run (the mean over its last tenth, at least three steps) with its beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from omniopd_jax.report.workdir import WorkDir

FEW_STEPS = 6  # no beginning and end can be told apart before


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    level: Literal["alarm", "fine", "unknown"]
    title: str
    sentence: str


def findings(workdir: WorkDir) -> list[Finding]:
    """Every check that means something for the run's arm, alarms first."""
    meaningless = _MEANINGLESS.get(str(workdir.setting("objective.arm")), ())
    found = [(check, check(workdir)) for check in CHECKS]
    found = [finding for check, finding in found if finding.level != "unknown" or check not in meaningless]
    order = {"alarm": 0, "fine": 1, "unknown": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _ends(workdir: WorkDir, name: str) -> tuple[float, float] | None:
    """(mean over the first tenth, mean over the last tenth) of a metric; None where there are too few values."""
    _, values = workdir.series(name)
    if len(values) < FEW_STEPS:
        return None
    width = max(3, len(values) // 10)
    return sum(values[:width]) / width, sum(values[-width:]) / width


def _end(workdir: WorkDir, name: str) -> float | None:
    """Mean over the last tenth, at least three values; of fewer, over all."""
    _, values = workdir.series(name)
    width = max(3, len(values) // 10)
    return sum(values[-width:]) / len(values[-width:]) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%" if share >= 0.1 or share == 0 else f"{100 * share:.1f}\u00a0%"


def _not_finite(workdir: WorkDir) -> Finding:
    fatal = {name: steps for name, steps in workdir.not_finite.items() if name.startswith(("loss/", "optimizer/"))}
    if fatal:
        name, steps = min(fatal.items(), key=lambda item: item[1][0])
        return Finding(
            "alarm",
            "A number was not finite",
            f"{name} was NaN or infinite at step {steps[0]}. Nothing after that step can be trusted; a lower learning "
            "rate or optimizer.clip_norm usually cures it.",
        )
    others = sorted(workdir.not_finite)
    if others:
        return Finding("fine", "Loss and gradient are finite", f"Not so, at some steps: {', '.join(others[:6])}.")
    return Finding("fine", "All numbers are finite", "No metric was NaN or infinite.")


def _length(workdir: WorkDir) -> Finding:
    ends = _ends(workdir, "rollout/tokens")
    if ends is None:
        return Finding("unknown", "Length of responses", f"This needs rollout/tokens over at least {FEW_STEPS} steps.")
    first, last = ends
    truncated = _end(workdir, "rollout/truncated") or 0.0
    if last > 1.5 * first or (truncated > 0.5 and last > 1.1 * first):
        return Finding(
            "alarm",
            "Responses are getting longer and longer",
            f"They grew from {first:.0f} to {last:.0f} tokens on average, and {_percent(truncated)} now hit the length "
            "limit. The usual causes are a stop token that the teacher never writes, a chat template that does not "
            "fit, or too weak an anchor.",
        )
    return Finding("fine", "Length of responses", f"From {first:.0f} to {last:.0f} tokens on average.")


def _stopping(workdir: WorkDir) -> Finding:
    ends = _ends(workdir, "rollout/finished")
    if ends is None:
        return Finding("unknown", "Stop tokens", f"This needs rollout/finished over at least {FEW_STEPS} steps.")
    first, last = ends
    if last < 0.5 * first or last < 0.1:
        return Finding(
            "alarm",
            "The student stops no more",
            f"{_percent(last)} of the responses end with a stop token, {_percent(first)} did at first. Look whether "
            "the student's stop tokens and the teacher's are the same, and whether rollout.max_new_tokens is enough.",
        )
    return Finding(
        "fine", "Stop tokens", f"{_percent(last)} of the responses end with one, {_percent(first)} at first."
    )


def _repetition(workdir: WorkDir) -> Finding:
    ends = _ends(workdir, "rollout/repetition")
    if ends is None:
        return Finding("unknown", "Repetition", f"This needs rollouts.jsonl over at least {FEW_STEPS} steps.")
    first, last = ends
    if last > 0.3 and last > 2 * first:
        return Finding(
            "alarm",
            "The student repeats itself",
            f"{_percent(last)} of all four-token runs stood in the same response before, {_percent(first)} did at "
            "first. Loops like these pay where the teacher, too, would go round; look at the longest responses.",
        )
    return Finding("fine", "Repetition", f"From {_percent(first)} to {_percent(last)} of four-token runs.")


def _entropy(workdir: WorkDir) -> Finding:
    name = "rollout/entropy"
    ends = _ends(workdir, name)
    if ends is None:
        return Finding("unknown", "Entropy", f"This needs {name} over at least {FEW_STEPS} steps.")
    first, last = ends
    forks = _ends(workdir, "audit/entropy")
    at_forks = f" At audited forks it went from {forks[0]:.2f} to {forks[1]:.2f} nats." if forks else ""
    if last < 0.25 * first:
        return Finding(
            "alarm",
            "Entropy has collapsed",
            f"It fell from {first:.3f} to {last:.3f} nats a token, so the student hardly varies its answers any more "
            f"and has little left to learn from.{at_forks} A lower learning rate, a stronger anchor, or repulsion "
            "between branches keeps variety.",
        )
    return Finding("fine", "Entropy", f"From {first:.3f} to {last:.3f} nats a token.{at_forks}")


def _unanimous(workdir: WorkDir) -> Finding:
    share = _end(workdir, "audit/identical_share")
    if share is None:
        return Finding("unknown", "Variety of the teacher", "This needs at least two continuations a chunk.")
    if share > 0.9:
        return Finding(
            "alarm",
            "The teacher gives one answer only",
            f"At {_percent(share)} of the chunks all its continuations are the same text. A server that ignores the "
            "temperature looks like this: similarity is then all or nothing, and all samples but one are wasted.",
        )
    return Finding("fine", "Variety of the teacher", f"It is unanimous at {_percent(share)} of the chunks.")


def _silence(workdir: WorkDir) -> Finding:
    missing, audited = _end(workdir, "teacher/missing_share"), _end(workdir, "audit/audited")
    if missing is None and audited is None:
        return Finding("unknown", "Answers of the teacher", "This needs teacher/missing_share or audit/audited.")
    missing = 1 - audited if missing is None and audited is not None else missing or 0.0
    if missing > 0.9:
        return Finding(
            "alarm",
            "The teacher is dead",
            f"{_percent(missing)} of the continuations asked for are missing at the end of the log. Without answers "
            "the student follows the anchor alone.",
        )
    if missing > 0.2:
        return Finding(
            "alarm",
            "The teacher answers unreliably",
            f"{_percent(missing)} of the continuations asked for are missing at the end of the log. They count as "
            "missing, not as disagreement, but the evidence is thinner than it was paid for.",
        )
    return Finding("fine", "Answers of the teacher", f"{_percent(missing)} of the continuations asked for are missing.")


def _anchor(workdir: WorkDir) -> Finding:
    weight = workdir.setting("objective.anchor_weight")
    if weight == 0:
        return Finding("fine", "Anchor", "It is switched off (objective.anchor_weight=0).")
    anchored, audited = _end(workdir, "anchor/fraction"), _end(workdir, "audit/fraction")
    if anchored is None and audited is None:
        return Finding("unknown", "Anchor", "This needs anchor/fraction or audit/fraction.")
    if anchored is None:
        anchored = 1.0 if workdir.setting("objective.anchor_tokens") == "all" else 1 - (audited or 0.0)
    if anchored < 0.2:
        return Finding(
            "alarm",
            "The anchor is starving",
            f"Only {_percent(anchored)} of the response tokens carry the KL to the base model. Short responses and "
            "many chunks leave it nothing to hold, and runs without it collapse: lower audit.max_fraction, or set "
            "objective.anchor_tokens=all.",
        )
    return Finding("fine", "Anchor", f"{_percent(anchored)} of the response tokens carry it.")


def _advantage(workdir: WorkDir) -> Finding:
    informative = _end(workdir, "reward/informative")
    if informative is not None and informative < 0.05:
        return Finding(
            "alarm",
            "There is no signal left",
            f"At {_percent(1 - informative)} of the prompts all responses have one reward, so there is nothing to "
            "compare: easier or harder prompts, or more rollout.samples_per_prompt, bring the difference back.",
        )
    if informative is not None:
        return Finding("fine", "Signal", f"At {_percent(informative)} of the prompts the responses differ in reward.")
    ends = _ends(workdir, "audit/advantage")
    if ends is None:
        return Finding("unknown", "Signal", f"This needs audit/advantage over at least {FEW_STEPS} steps.")
    first, last = ends
    if last < 0.05 * first:
        return Finding(
            "alarm",
            "There is no signal left",
            f"The mean size of the weights fell from {first:.3g} to {last:.3g}: all chunks or branches are now alike "
            "to the teacher, and further steps change little.",
        )
    return Finding("fine", "Signal", f"The mean size of the weights went from {first:.3g} to {last:.3g}.")


CHECKS: tuple[Callable[[WorkDir], Finding], ...] = (
    _not_finite,
    _length,
    _stopping,
    _repetition,
    _entropy,
    _unanimous,
    _silence,
    _anchor,
    _advantage,
)

# Checks for which an arm writes no metrics: the student does not respond, or no chunk is audited.
_MEANINGLESS: dict[str, tuple[Callable[[WorkDir], Finding], ...]] = {
    "sft": (_length, _stopping, _repetition, _entropy, _unanimous, _advantage),
    "opd": (_unanimous, _silence, _advantage),
    "grpo": (_unanimous, _silence),
    "anchor": (_unanimous, _silence, _advantage),
}
