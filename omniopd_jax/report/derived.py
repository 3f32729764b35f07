"""Figures of a step that its responses and audits tell and that no metric holds."""

from __future__ import annotations

from collections.abc import Iterable

from omniopd_jax.report.workdir import Response, WorkDir


def with_derived(workdir: WorkDir) -> WorkDir:
    """Adds to `workdir.metrics`, where the name is not taken:

    - audit/similarity, audit/similarity_low, audit/similarity_high: mean, 10th and 90th percentile over the chunks of
      a step of their mean similarity to the teacher's texts
    - audit/identical_share: share of chunks whose continuations are all the same text
    - rollout/repetition: mean share of runs of four tokens that stood in the response before
    - rollout/truncated: share of responses that hit the length limit, 1 − rollout/finished
    """
    for row in workdir.metrics.values():
        if "rollout/finished" in row:
            row.setdefault("rollout/truncated", 1 - row["rollout/finished"])
    by_step: dict[int, list[Response]] = {}
    for response in workdir.responses.values():
        by_step.setdefault(response.step, []).append(response)
    for step, responses in by_step.items():
        if step in workdir.metrics:
            for name, value in _figures(responses).items():
                workdir.metrics[step].setdefault(name, value)
    return workdir


def _figures(responses: list[Response]) -> dict[str, float]:
    audits = [audit for response in responses for audit in response.audits.values()]
    similarity = sorted(audit.similarity for audit in audits if audit.similarity is not None)
    figures = {
        "audit/similarity": _mean(similarity),
        "audit/identical_share": _mean([audit.is_unanimous for audit in audits if audit.is_unanimous is not None]),
        "rollout/repetition": _mean([each.repetition for each in responses if each.repetition is not None]),
    }
    if similarity:
        figures["audit/similarity_low"] = similarity[int(0.1 * (len(similarity) - 1))]
        figures["audit/similarity_high"] = similarity[round(0.9 * (len(similarity) - 1))]
    return {name: value for name, value in figures.items() if value is not None}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
