"""Evaluation while a run goes on, and of what it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omniopd_jax.config import Config, ConfigError, DataConfig
from omniopd_jax.data import Tokenizer, read_prompts
from omniopd_jax.eval.evaluate import evaluate, get_judge
from omniopd_jax.models import Model
from omniopd_jax.types import Prompt

Evaluator = Callable[[Model], dict[str, float]]  # names as in metrics.jsonl: "eval/greedy_accuracy", …

MODES = {"greedy": 0.0, "temperature_1": 1.0}


def rows_of(path: str, data: DataConfig) -> list[Prompt]:
    """The prompts of a file of rows, read as `data.*` says: the same for training and for held-out rows."""
    return read_prompts(
        path,
        data.prompt_field,
        data.answer_field,
        system_prompt=data.system_prompt,
        is_raw=not data.use_chat_template,
    )


def make_evaluator(config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt] | None = None) -> Evaluator:
    """Accuracy, greedy and at temperature 1, on the first `eval.problems` rows of `data.eval` (or of `prompts`).

    Raises:
      InputError: no such file, or rows that cannot be judged.
    """
    data, settings = config.data, config.eval
    if prompts is None:
        if not data.eval:
            raise ConfigError("config.eval.every is set, but config.data.eval names no file of held-out rows.")
        prompts = rows_of(data.eval, data)
    prompts = prompts[: settings.problems]
    task = settings.task if settings.task != "auto" else ("world" if config.world.kind else "math")
    judge = get_judge(task, prompts)

    def run(model: Model) -> dict[str, float]:
        found = {}
        for name, temperature in MODES.items():
            result = evaluate(
                model,
                tokenizer,
                prompts,
                judge,
                temperature=temperature,
                max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
                batch_size=settings.batch_size,
                seed=config.train.seed,
                template_args=data.template_args,
                use_chat_template=data.use_chat_template,
            )
            found[f"eval/{name}_accuracy"] = result.accuracy
            found[f"eval/{name}_standard_error"] = result.standard_error
        return found

    return run
