"""The teacher's own full answers to the prompts, asked for like every other text: an empty prefix, one sample."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

import numpy as np

from omniopd_jax.data.tokenizer import Tokenizer
from omniopd_jax.prng import stable_seed
from omniopd_jax.teacher.protocol import ContinuationRequest, Teacher, TeacherStopped
from omniopd_jax.teacher.verify import VerifySettings, stop_if_silent, usable, usage_metrics
from omniopd_jax.types import Answers, PromptBatch


def ask_answers(
    batch: PromptBatch,
    rows: Iterable[int],
    *,
    tokenizer: Tokenizer,
    teacher: Teacher,
    settings: VerifySettings,
    max_new_tokens: int,
    seed: int,
    step: int,
) -> tuple[Answers, dict[str, float]]:
    """One answer a row, re-tokenised by the student's tokenizer and cut to T tokens.

    An answer that the teacher ended within them carries the student's stop token. A row that gets none (refused,
    lost) is empty; a prompt that comes again in a later epoch is answered anew.

    Args:
      batch: the prompts.
      rows: those asked about; the others stay empty.
      tokenizer: the student's.
      teacher: who is asked.
      settings: temperature and the like; the number of continuations does not matter.
      max_new_tokens: T.
      seed: the run's; with the prompt and the sample's number it names the request's seed.
      step: for messages.

    Raises:
      TeacherStopped: more answers are missing or refused than the settings allow.
    """
    rows = list(rows)
    settings = dataclasses.replace(settings, num_continuations=1)
    requests = [
        ContinuationRequest(
            messages=batch.prompts[row].messages,
            prefix="",
            n=1,
            max_tokens=math.ceil(max_new_tokens * settings.token_slack),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=stable_seed(seed, batch.prompts[row].id, int(batch.sample_index_B[row]), 0),
            is_raw=batch.prompts[row].is_raw,
        )
        for row in rows
    ]
    began = time.perf_counter()
    results = list(teacher.continue_texts(requests)) if requests else []
    seconds = time.perf_counter() - began
    if len(results) != len(requests):
        raise TeacherStopped(f"{teacher.name} answered {len(results)} of {len(requests)} requests in step {step}.")
    received = [usable(result, 1) for result in results]
    stop_if_silent(received, results, settings, teacher.name, step)
    tokens_BxT = np.zeros((len(batch.prompts), max_new_tokens), np.int32)
    mask_BxT = np.zeros(tokens_BxT.shape, bool)
    answered = [(row, found[0]) for row, found in zip(rows, received, strict=True) if found]
    for (row, answer), ids in zip(answered, tokenizer.encode_batch([found.text for _, found in answered]), strict=True):
        ids = ([*ids, tokenizer.end_token] if answer.finish_reason == "stop" else ids)[:max_new_tokens]
        tokens_BxT[row, : len(ids)] = ids
        mask_BxT[row, : len(ids)] = True
    metrics = usage_metrics(results, len(requests), len(answered)) | {"teacher/seconds": seconds}
    return Answers(tokens_BxT, mask_BxT), metrics
