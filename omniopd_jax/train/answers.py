"""The teacher's answers to one batch, asked for by all processes, each for its own share of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omniopd_jax.teacher.answers import ask_answers
from omniopd_jax.train import distributed
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.types import Answers, PromptBatch

_LEDGER = "teacher/total_dollars"  # each process's own ledger, at the end of the part
_MEANS = ("teacher/missing_share", "teacher/refused_share", "teacher/latency_seconds")  # over samples; the rest adds up


def answers_of(
    experiment: Experiment, batch: PromptBatch, *, step: int, interrupts: Interrupts
) -> tuple[Answers, dict[str, float]]:
    """(answers, metrics), whole on every process.

    Raises:
      TeacherStopped, Interrupted: on this process.
      PeerStopped, PeerFailed: on another one.
    """

    def own() -> tuple[Answers, dict[str, float]]:
        with interrupts.abandonable():
            answers, metrics = ask_answers(
                batch,
                distributed.share(len(batch.prompts)),
                tokenizer=experiment.tokenizer,
                teacher=experiment.teacher,
                settings=experiment.verify_settings,
                max_new_tokens=experiment.config.rollout.max_new_tokens,
                seed=experiment.config.train.seed,
                step=step,
            )
        paid = getattr(experiment.teacher, "paid", None)
        return answers, metrics if paid is None else metrics | {_LEDGER: paid.dollars}

    parts = distributed.collect(own)
    # 0 and False in the rows of others
    tokens_BxT = np.max(np.stack([answers.tokens_BxT for answers, _ in parts]), axis=0)
    mask_BxT = np.max(np.stack([answers.mask_BxT for answers, _ in parts]), axis=0)
    metrics = merged([metrics for _, metrics in parts])
    if _LEDGER in metrics:
        metrics[_LEDGER] = sum(found[_LEDGER] for _, found in parts)
    return Answers(tokens_BxT, mask_BxT), metrics


def merged(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of the teacher over several calls: what is asked in turn, or by several processes."""
    if len(parts) <= 1:
        return dict(parts[0]) if parts else {}
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [part[name] for part in having]
        if name == _LEDGER:
            found[name] = values[-1]
        elif name in _MEANS:
            found[name] = float(np.average(values, weights=[part["teacher/requested"] for part in having]))
        elif len(values) == 1:
            found[name] = values[0]
        else:
            found[name] = float(sum(values))
    return found
