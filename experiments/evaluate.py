"""Measures a model on a benchmark's file.

    python -m experiments.evaluate --model=runs/gsm8k --task=gsm8k --data=test.jsonl
    python -m experiments.evaluate --model=runs/gsm8k --task=aime --data=aime.jsonl --temperature=0.6 --samples=32 --k=8
    python -m experiments.evaluate --model=runs/code --task=humaneval --data=HumanEval.jsonl.gz --sandbox=local

--model is a folder in Hugging Face layout or a work directory (its exported model is taken). A work directory's
config.json also says how its prompts were written in training (its section data); flags go before it. Greedy and
sampled figures differ by a lot after distillation; report both. Tasks and what the numbers mean: docs/evaluation.md.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from absl import flags

from experiments import command
from experiments.screen import Screen
from omniopd_jax.config import DataConfig, read_data
from omniopd_jax.types import InputError

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder, or a work directory.", required=True)
_DATA = flags.DEFINE_string("data", None, "The benchmark's rows: jsonl, jsonl.gz or parquet.", required=True)
_TASK = flags.DEFINE_string(
    "task", "math", "gsm8k, math, aime, amc, olympiad, humaneval, mbpp, livecodebench or world."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples a problem: avg@samples.", lower_bound=1)
_K = flags.DEFINE_integer("k", 0, "pass@k, estimated from the samples; 0: none.", lower_bound=0)
_PROBLEMS = flags.DEFINE_integer("problems", 0, "Take the first so many rows; 0: all.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Responses sampled together.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest response.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Names the draws.")
_RAW = flags.DEFINE_bool("raw", None, "Continue the prompt's text as it stands, without the chat template.")
_SYSTEM = flags.DEFINE_string("system_prompt", None, "Put before conversations that have none of their own.")
_INSTRUCTION = flags.DEFINE_string("instruction", "auto", "How to ask, a text with {problem}; auto: the task's own.")
_PROMPT_FIELD = flags.DEFINE_string("prompt_field", None, "Column of the prompt, in rows that have it.")
_ANSWER_FIELD = flags.DEFINE_string("answer_field", None, "Column of the answer, in rows that have it.")
_SANDBOX = flags.DEFINE_string("sandbox", "", "Where programs run: local, or the address of a service.")
_UNSANDBOXED = flags.DEFINE_bool("allow_unsandboxed", False, "local without a wall: resource limits alone.")
_TIMEOUT = flags.DEFINE_float(
    "timeout_s", 10.0, "Wall time of a program: all its unit tests, or each of LiveCodeBench's cases.", lower_bound=0.1
)
_MEMORY = flags.DEFINE_integer("memory_mb", 1024, "Address space of each process of a program.", lower_bound=1)
_OUT = flags.DEFINE_string("output", "", "jsonl file of every response, its verdict and the reason.")


def layout(workdir: Path, asked: Mapping[str, Any]) -> DataConfig:
    """How prompts are written: as `asked` (None: not so), else as in the run of `workdir`, else as in base.py."""
    from configs import base

    written = workdir / "config.json"
    is_run = (workdir / "model").is_dir() and written.is_file()
    data = read_data(written) if is_run else DataConfig(**base.get_config().to_dict()["data"])
    return dataclasses.replace(data, **{name: value for name, value in asked.items() if value is not None})


def main() -> None:
    from omniopd_jax.data.tokenizer import load_tokenizer
    from omniopd_jax.eval.evaluate import evaluate, get_judge
    from omniopd_jax.eval.tasks import read_task
    from omniopd_jax.models import load_model

    given = Path(_MODEL.value)
    folder = given / "model" if (given / "model").is_dir() else given
    if not folder.is_dir():
        raise InputError(f"No folder {str(folder)!r}: --model wants a Hugging Face folder or a work directory.")
    asked = {"prompt_field": _PROMPT_FIELD.value, "answer_field": _ANSWER_FIELD.value}
    asked |= {"use_chat_template": None if _RAW.value is None else not _RAW.value}
    asked |= {"system_prompt": "" if _RAW.value and _SYSTEM.value is None else _SYSTEM.value}  # a raw text has no turns
    data = layout(given, asked)
    prompts = read_task(
        _TASK.value, _DATA.value, prompt_field=data.prompt_field, answer_field=data.answer_field,
        instruction=_INSTRUCTION.value, system_prompt=data.system_prompt, is_raw=not data.use_chat_template,
    )[: _PROBLEMS.value or None]  # fmt: skip
    if _K.value > _SAMPLES.value:
        raise InputError(f"--k={_K.value} needs --samples={_K.value} or more, got --samples={_SAMPLES.value}.")
    judge = get_judge(
        _TASK.value, prompts, sandbox=_SANDBOX.value, allow_unsandboxed=_UNSANDBOXED.value,
        timeout_s=_TIMEOUT.value, memory_mb=_MEMORY.value,
    )  # fmt: skip
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with opened(_OUT.value) as lines, Screen() as bar:
        result = evaluate(
            model, tokenizer, prompts, judge,
            temperature=_TEMPERATURE.value, max_new_tokens=_TOKENS.value, batch_size=_BATCH.value,
            samples=_SAMPLES.value, seed=_SEED.value, template_args=data.template_args,
            use_chat_template=data.use_chat_template, progress=lambda done, total: bar("answers", done, total),
            on_item=lambda item: lines and print(json.dumps(dataclasses.asdict(item)), file=lines, flush=True),
        )  # fmt: skip
    print(result.table(_K.value))


def opened(path: str) -> contextlib.AbstractContextManager[IO[str] | None]:
    """The file of --output, to be opened before any answer is generated; None for ""."""
    try:
        return open(path, "w", encoding="utf-8") if path else contextlib.nullcontext()
    except OSError as error:
        raise InputError(f"--output={path} cannot be written: {error.strerror or error}.") from error


if __name__ == "__main__":
    command.run(main)
