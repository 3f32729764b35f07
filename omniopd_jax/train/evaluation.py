"""Evaluation while a run goes on, and of what it made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from omniopd_jax.config import Config, ConfigError, DataConfig
from omniopd_jax.data import Tokenizer, read_prompts
from omniopd_jax.eval.evaluate import Evaluation, Judge, evaluate, get_judge
from omniopd_jax.eval.sandbox import SandboxError
from omniopd_jax.eval.tasks import read_task
from omniopd_jax.eval.verdict import Verdict
from omniopd_jax.models import Model
from omniopd_jax.train import distributed
from omniopd_jax.train.pipeline import rows_decoded
from omniopd_jax.train.stops import RunStopped
from omniopd_jax.types import Prompt

Evaluator = Callable[[Model], dict[str, float]]  # names as in metrics.jsonl: "eval/greedy_accuracy", …

MODES = {"greedy": 0.0, "temperature_1": 1.0}
MAIN_METRIC = "eval/greedy_accuracy"  # what one number says best; for train.checkpoint_best


def rows_of(path: str, data: DataConfig) -> list[Prompt]:
    """The prompts of a file of rows, read as `data.*` says."""
    if data.task:
        return read_task(
            data.task,
            path,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            system_prompt=data.system_prompt,
            is_raw=not data.use_chat_template,
        )
    return read_prompts(
        path,
        data.prompt_field,
        data.answer_field,
        system_prompt=data.system_prompt,
        is_raw=not data.use_chat_template,
    )


def task_of(config: Config) -> str:
    """The task that answers are judged as: `eval.task`, or what "auto" stands for."""
    if config.eval.task != "auto":
        return config.eval.task
    return "world" if config.world.kind else "math"


def held_out(config: Config) -> list[Prompt]:
    """The first `eval.problems` rows of `data.eval`, in the layout of `eval.task`, else as the training rows are."""
    data, settings = config.data, config.eval
    if not data.eval:
        raise ConfigError("config.eval.every is set, but config.data.eval names no file of held-out rows.")
    if settings.task == "auto":
        prompts = rows_of(data.eval, data)
    else:
        prompts = read_task(
            settings.task,
            data.eval,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            instruction=settings.instruction,
            system_prompt=data.system_prompt,
            is_raw=not data.use_chat_template,
        )
    return prompts[: settings.problems]


class EvaluationStopped(RunStopped):
    """Answers can no longer be judged; the finished steps are in the checkpoint."""

    exit_code = 3


@dataclasses.dataclass(frozen=True)
class SharedJudge(Judge):
    """A judge whose work the processes of a run share out: each answer is judged once, and all have all verdicts."""

    def all(self, responses: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """The verdicts in the order of the responses, the same on every process.

        Raises:
          EvaluationStopped: programs cannot be run any more; on the process that noticed.
          PeerStopped, PeerFailed: on the others.
        """

        def own() -> list[Verdict]:
            rows = distributed.share(len(responses))
            try:
                return Judge.all(self, responses[rows.start : rows.stop], answers[rows.start : rows.stop])
            except SandboxError as error:
                raise EvaluationStopped(str(error)) from error

        return [verdict for part in distributed.collect(own) for verdict in part]


def judge_of(config: Config, prompts: Sequence[Prompt]) -> SharedJudge:
    """The judge that `eval.*` describes, for the references of these prompts.

    Raises:
      InputError: they cannot be judged here.
    """
    settings = config.eval
    judge = get_judge(
        task_of(config),
        prompts,
        sandbox=settings.sandbox,
        allow_unsandboxed=settings.allow_unsandboxed,
        timeout_s=settings.timeout_s,
        memory_mb=settings.memory_mb,
    )
    return SharedJudge(judge.verdict, judge.workers)


def measure(
    config: Config,
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    judge: Judge,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Greedy and at temperature 1 (there `eval.samples` a problem), by the names of MODES."""
    return {
        name: evaluate(
            model,
            tokenizer,
            prompts,
            judge,
            temperature=temperature,
            max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
            batch_size=config.eval.batch_size or rows_decoded(config),
            samples=config.eval.samples if temperature else 1,
            seed=config.train.seed,
            template_args=config.data.template_args,
            use_chat_template=config.data.use_chat_template,
            progress=progress,
        )
        for name, temperature in MODES.items()
    }


def make_evaluator(config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt] | None = None) -> Evaluator:
    """Accuracy, greedy and at temperature 1, on the held-out rows (or on the first of `prompts`).

    Raises:
      InputError: no such file, or rows that cannot be judged.
    """
    prompts = held_out(config) if prompts is None else prompts[: config.eval.problems]
    judge = judge_of(config, prompts)

    def run(model: Model) -> dict[str, float]:
        found = {}
        for name, result in measure(config, model, tokenizer, prompts, judge).items():
            found[f"eval/{name}_accuracy"] = result.accuracy
            found[f"eval/{name}_standard_error"] = result.standard_error
            found[f"eval/{name}_truncated"] = result.truncated
            found[f"eval/{name}_no_answer"] = result.no_answer
            if result.samples > 1:
                found[f"eval/{name}_pass_at_{result.samples}"] = result.pass_at(result.samples)[0]
        return found

    return run
