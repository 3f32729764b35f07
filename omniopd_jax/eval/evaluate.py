"""How good a model is at a task: sampled or greedy answers, judged one by one, with intervals over problems."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from omniopd_jax import gathering, prng
from omniopd_jax.data.prompts import bucket_width, pad_prompts
from omniopd_jax.data.tokenizer import Tokenizer
from omniopd_jax.eval import statistics
from omniopd_jax.eval.tasks import get_task
from omniopd_jax.eval.verdict import NO_ANSWER, Verdict
from omniopd_jax.models import Model
from omniopd_jax.models.layout import full_rows
from omniopd_jax.rollout import sampler
from omniopd_jax.types import InputError, Prompt

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Tells right from wrong: judge(response, reference answer) → bool."""

    verdict: Callable[[str, str], Verdict]  # the same, with the reason
    workers: int = 1  # threads that may judge at once

    def __call__(self, response: str, answer: str) -> bool:
        return self.verdict(response, answer).passed

    def all(self, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """The verdicts in the order of the responses."""
        if self.workers == 1:
            return list(map(self.verdict, responses, answers))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.verdict, responses, answers))


@dataclasses.dataclass(frozen=True)
class Item:
    """One judged response."""

    id: str  # of the prompt
    sample: int  # 0 .. k−1
    response: str
    is_correct: bool
    reason: str  # of the verdict
    tokens: int  # of the response, the stop token included
    is_finished: bool  # it ended by itself, within the length limit


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """avg@k over a set of problems."""

    accuracy: float  # mean over problems of the share of right samples, 0 to 1
    standard_error: float  # of that mean over problems
    problems: int
    samples: int  # k, samples a problem
    items: tuple[Item, ...]  # problems · samples, the samples of a problem adjacent

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(item.response for item in self.items)

    @property
    def is_correct(self) -> tuple[bool, ...]:
        return tuple(item.is_correct for item in self.items)

    @property
    def correct_PxN(self) -> np.ndarray:
        """bool [problems, samples]."""
        return np.array(self.is_correct, bool).reshape(self.problems, self.samples)

    @property
    def truncated(self) -> float:
        """Share of samples that hit the length limit."""
        return float(np.mean([not item.is_finished for item in self.items]))

    @property
    def no_answer(self) -> float:
        """Share of samples that hold nothing to judge: no marked answer, no program."""
        return float(np.mean([item.reason == NO_ANSWER for item in self.items]))

    @property
    def mean_tokens(self) -> float:
        """Response tokens, the stop token included."""
        return float(np.mean([item.tokens for item in self.items]))

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the accuracy, over problems."""
        return statistics.bootstrap_interval(statistics.average(self.correct_PxN))

    def pass_at(self, k: int) -> tuple[float, float, float]:
        """(pass@k, low, high): the unbiased estimate and its 95 % bootstrap interval over problems.

        Raises:
          InputError: k is larger than the number of samples.
        """
        if k > self.samples:
            raise InputError(f"pass@{k} needs at least {k} samples a problem; there are {self.samples}.")
        per_problem = statistics.pass_at_k(self.correct_PxN, k)
        return float(per_problem.mean()), *statistics.bootstrap_interval(per_problem)

    def summary(self) -> dict[str, float]:
        """What goes into result.json."""
        return {"accuracy": self.accuracy, "standard_error": self.standard_error}

    def table(self, k: int = 0) -> str:
        """What a command prints: accuracy, its interval, pass@k where k > 0, and what was cut or empty."""
        low, high = self.interval()
        rows = [
            f"accuracy   {self}   ({self.problems} problems, {self.samples} samples each)",
            f"interval   {100 * low:.1f} to {100 * high:.1f} %   (95 %, bootstrap over problems)",
        ]
        if k:
            value, low, high = self.pass_at(k)
            rows.append(f"pass@{k:<5} {100 * value:.1f} %   ({100 * low:.1f} to {100 * high:.1f})")
        rows.append(
            f"truncated  {100 * self.truncated:.1f} %   no answer {100 * self.no_answer:.1f} %   "
            f"mean length {self.mean_tokens:.1f} tokens"
        )
        return "\n".join(rows)

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f} %"


def get_judge(
    task: str,
    prompts: Sequence[Prompt] = (),
    *,
    sandbox: str = "",
    allow_unsandboxed: bool = False,
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
) -> Judge:
    """How the answers of a task (eval.tasks.TASKS) are judged: marked final answers, programs, a small world's form.

    Args:
      task: one of them.
      prompts: what will be judged; told now, and not after all answers are generated, if that needs a package that is
        not installed, or if a reference is none.
      sandbox, allow_unsandboxed, timeout_s, memory_mb: where and within what programs run, as `eval.*` of the config.

    Raises:
      InputError: an unknown task, reference answers that cannot be judged here, or programs without a sandbox.
    """
    kind = get_task(task).judge
    if kind == "world":
        from omniopd_jax.worlds import answers

        return Judge(lambda response, answer: _plain_verdict(answers.is_correct(response, answer)))
    if kind == "code":
        from omniopd_jax.eval import code

        place = code.make_sandbox(sandbox, allow_unsandboxed=allow_unsandboxed)
        for prompt in prompts:
            code.CodeReference.loads(prompt.answer, f"Prompt {prompt.id!r}")
        judge = functools.partial(code.judge_program, sandbox=place, timeout_s=timeout_s, memory_mb=memory_mb)
        return Judge(judge, workers=os.cpu_count() or 1)
    from omniopd_jax.eval import math

    for prompt in prompts:
        math.check_reference(prompt.answer, f"Prompt {prompt.id!r}")
    if not math.has_math_verify():
        _LOG.warning("math-verify is not installed: a given answer that is no plain number counts as wrong.")
    return Judge(math.judge)


def _plain_verdict(is_right: bool) -> Verdict:
    return Verdict(is_right, "passed" if is_right else "wrong")


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    judge: Judge | Callable[[str, str], bool],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    samples: int = 1,
    seed: int = 0,
    template_args: Mapping[str, Any] | None = None,
    use_chat_template: bool = True,
    progress: Callable[[int, int], None] | None = None,
    on_item: Callable[[Item], None] | None = None,
) -> Evaluation:
    """Answers every prompt and judges the answers.

    Args:
      model: the student.
      tokenizer: its tokenizer.
      prompts: problems with reference answers.
      judge: tells right from wrong, with several processes the same on each (train.evaluation.SharedJudge).
      temperature: 0 is greedy; 1 is what training optimises.
      max_new_tokens: longest response.
      batch_size: responses sampled together, rounded up to what the model's mesh divides; the last batch is padded
        so that nothing compiles twice.
      samples: k responses a problem, averaged.
      seed: names the draws; the draw of a problem does not depend on the batch size.
      template_args, use_chat_template: as in `data.*` of the config.
      progress: called with (samples done, samples in all).
      on_item: called with each judged response, batch by batch.

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
    batch_size = full_rows(model.module.layout, min(batch_size, len(rows)))
    key = prng.named_key(seed, 0, "evaluation")
    judge = judge if isinstance(judge, Judge) else _as_judge(judge)
    items: list[Item] = []
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
        texts = tokenizer.decode_batch([tokens_BxT[b][mask_BxT[b]].tolist() for b in real])
        verdicts = judge.all(texts, [prompt.answer for prompt, _ in part])
        for b, text, verdict in zip(real, texts, verdicts, strict=True):
            item = Item(
                id=part[b][0].id,
                sample=(start + b) % samples,
                response=text,
                is_correct=verdict.passed,
                reason=verdict.reason,
                tokens=int(mask_BxT[b].sum()),
                is_finished=bool(is_finished_B[b]),
            )
            items.append(item)
            if on_item is not None:
                on_item(item)
        if progress is not None:
            progress(len(items), len(rows))
    per_problem = statistics.average(np.array([item.is_correct for item in items]).reshape(len(prompts), samples))
    return Evaluation(
        accuracy=float(per_problem.mean()),
        standard_error=statistics.standard_error(per_problem),
        problems=len(prompts),
        samples=samples,
        items=tuple(items),
    )


def _as_judge(judge: Callable[[str, str], bool]) -> Judge:
    return Judge(lambda response, answer: _plain_verdict(bool(judge(response, answer))))
