"""How good a model is at a task: sampled or greedy answers, judged one by one, with a standard error."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from omniopd_jax import gathering, prng
from omniopd_jax.data.prompts import bucket_width, pad_prompts
from omniopd_jax.data.tokenizer import Tokenizer
from omniopd_jax.models import Model
from omniopd_jax.rollout import sampler
from omniopd_jax.types import InputError, Prompt

_LOG = logging.getLogger(__name__)

Judge = Callable[[str, str], bool]  # (response, reference answer) → right or not


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """avg@k over a set of problems."""

    accuracy: float  # mean over problems of the share of right samples, 0 to 1
    standard_error: float  # of that mean over problems
    problems: int
    samples: int  # k, samples a problem
    truncated: float  # share of samples that hit the length limit
    mean_tokens: float  # response tokens, the stop token included
    responses: tuple[str, ...]  # problems · samples texts, the samples of a problem adjacent
    is_correct: tuple[bool, ...]  # the same order

    def summary(self) -> dict[str, float]:
        """What goes into result.json."""
        return {"accuracy": self.accuracy, "standard_error": self.standard_error}

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f} %"


def get_judge(task: str, prompts: Sequence[Prompt] = ()) -> Judge:
    """`math`: marked final answers (eval.math). `world`: the small worlds' own form.

    Args:
      task: one of them.
      prompts: what will be judged; told now, and not after all answers are generated, if that needs a package that is
        not installed.

    Raises:
      InputError: an unknown task, or reference answers that cannot be judged here.
    """
    if task == "world":
        from omniopd_jax.worlds import answers

        return answers.is_correct
    if task == "math":
        from omniopd_jax.eval import math

        for prompt in prompts:
            math.check_reference(prompt.answer, f"Prompt {prompt.id!r}")
        if not math.has_math_verify():
            _LOG.warning("math-verify is not installed: a given answer that is no plain number counts as wrong.")
        return math.is_correct
    raise InputError(f"Task {task!r} is not known; there are 'math' and 'world'.")


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    seed: int = 0,
    template_args: Mapping[str, Any] | None = None,
    use_chat_template: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answers every prompt and judges the answers.

    Args:
      model: the student.
      tokenizer: its tokenizer.
      prompts: problems with reference answers.
      judge: tells right from wrong.
      temperature: 0 is greedy; 1 is what training optimises.
      max_new_tokens: longest response.
      batch_size: responses sampled together; the last batch is padded so that nothing compiles twice.
      samples: k responses a problem, averaged.
      seed: names the draws; the draw of a problem does not depend on the batch size.
      template_args, use_chat_template: as in `data.*` of the config.
      progress: called with (samples done, samples in all).

    Raises:
      InputError: no prompts, or one without a reference answer.
    """
    if not prompts:
        raise InputError("There is nothing to evaluate: the set of prompts is empty.")
    for prompt in prompts:
        if not prompt.answer:
            raise InputError(f"Prompt {prompt.id!r} has no reference answer to judge by.")
    rows = [(prompt, ids) for prompt, ids in zip(
        prompts, tokenizer.encode_prompts(prompts, template_args, use_chat_template), strict=True
    ) for _ in range(samples)]  # fmt: skip
    width = bucket_width(max(len(ids) for _, ids in rows))
    batch_size = min(batch_size, len(rows))
    key = prng.named_key(seed, 0, "evaluation")
    responses, tokens, finished = [], 0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        filler = [rows[0]] * (batch_size - len(part))
        batch = pad_prompts(
            [prompt for prompt, _ in part + filler],
            [ids for _, ids in part + filler],
            range(start, start + batch_size),
            width=width,
            pad_id=tokenizer.pad_id,
        )
        rollout = sampler.sample(
            model,
            batch.tokens_BxP,
            batch.mask_BxP,
            prng.row_keys(key, batch.sample_index_B),
            max_new_tokens=max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            banned_tokens=tokenizer.banned_tokens(model.config.vocab_size),
            temperature=temperature,
        )
        tokens_BxT, mask_BxT, is_finished_B = gathering.whole(
            (rollout.tokens_BxT, rollout.mask_BxT, rollout.is_finished_B)
        )
        real = range(len(part))
        responses += tokenizer.decode_batch([tokens_BxT[b][mask_BxT[b]].tolist() for b in real])
        tokens += int(mask_BxT[: len(part)].sum())
        finished += int(is_finished_B[: len(part)].sum())
        if progress is not None:
            progress(len(responses), len(rows))
    is_correct = [judge(text, prompt.answer) for text, (prompt, _) in zip(responses, rows, strict=True)]
    per_problem = np.asarray(is_correct, np.float64).reshape(len(prompts), samples).mean(axis=1)
    return Evaluation(
        accuracy=float(per_problem.mean()),
        standard_error=float(per_problem.std(ddof=min(1, len(prompts) - 1)) / np.sqrt(len(prompts))),
        problems=len(prompts),
        samples=samples,
        truncated=1.0 - finished / len(rows),
        mean_tokens=tokens / len(rows),
        responses=tuple(responses),
        is_correct=tuple(is_correct),
    )
