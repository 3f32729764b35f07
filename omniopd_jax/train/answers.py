"""The teacher's answers to one batch, asked for by all processes, each for its own share of the rows."""

from __future__ import annotations

import numpy as np

from omniopd_jax.teacher.answers import ask_answers
from omniopd_jax.train import distributed, tally
from omniopd_jax.train.experiment import Experiment
from omniopd_jax.train.stops import Interrupts
from omniopd_jax.train.tally import Tally
from omniopd_jax.types import Answers, PromptBatch


def answers_of(
    experiment: Experiment, batch: PromptBatch, *, step: int, interrupts: Interrupts
) -> tuple[Answers, Tally]:
    """(answers, what was asked), whole on every process.

    Raises:
      TeacherStopped, Interrupted: on this process.
      PeerStopped, PeerFailed: on another one.
    """
    rows = distributed.share(len(batch.prompts))

    def own() -> tuple[Answers, Tally]:
        with interrupts.abandonable():
            answers, metrics = ask_answers(
                batch,
                rows,
                tokenizer=experiment.tokenizer,
                teacher=experiment.teacher,
                settings=experiment.verify_settings,
                max_new_tokens=experiment.config.rollout.max_new_tokens,
                seed=experiment.config.train.seed,
                step=step,
            )
        return answers, tally.taken(metrics, experiment.teacher, requests=len(rows))

    parts = distributed.collect(own)
    # 0 and False in the rows of others
    tokens_BxT = np.max(np.stack([answers.tokens_BxT for answers, _ in parts]), axis=0)
    mask_BxT = np.max(np.stack([answers.mask_BxT for answers, _ in parts]), axis=0)
    return Answers(tokens_BxT, mask_BxT), tally.at_once([asked for _, asked in parts])
