"""Measures a model on a file of problems.

    python -m experiments.evaluate --model=runs/gsm8k --task=math --data=test.jsonl --temperature=0

--model is a folder in Hugging Face layout or a work directory (its exported model is taken). Greedy and sampled
figures differ by a lot after distillation; report both.
"""

import json
from pathlib import Path

from absl import flags

from experiments import command
from omniopd_jax.types import InputError

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder, or a work directory.", required=True)
_DATA = flags.DEFINE_string("data", None, "Problems with reference answers: jsonl or parquet.", required=True)
_TASK = flags.DEFINE_enum("task", "math", ["math", "world"], "How answers are judged.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Samples a problem, averaged (avg@k).", lower_bound=1)
_PROBLEMS = flags.DEFINE_integer("problems", 0, "Take the first so many rows; 0: all.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Responses sampled together.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest response.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Names the draws.")
_RAW = flags.DEFINE_bool("raw", False, "Continue the prompt's text as it stands, without the chat template.")
_SYSTEM = flags.DEFINE_string("system_prompt", "", "Put before conversations that have none of their own.")
_OUT = flags.DEFINE_string("out", "", "jsonl file of every answer and its verdict.")


def main() -> None:
    from omniopd_jax.data.prompts import read_prompts
    from omniopd_jax.data.tokenizer import load_tokenizer
    from omniopd_jax.eval.evaluate import evaluate, get_judge
    from omniopd_jax.models import load_model

    folder = Path(_MODEL.value)
    if (folder / "model").is_dir():
        folder = folder / "model"
    if not folder.is_dir():
        raise InputError(f"No folder {str(folder)!r}: --model wants a Hugging Face folder or a work directory.")
    prompts = read_prompts(_DATA.value, system_prompt=_SYSTEM.value, is_raw=_RAW.value)
    prompts = prompts[: _PROBLEMS.value or None]
    with command.bars() as bar:
        result = evaluate(
            load_model(folder),
            load_tokenizer(folder),
            prompts,
            get_judge(_TASK.value),
            temperature=_TEMPERATURE.value,
            max_new_tokens=_TOKENS.value,
            batch_size=_BATCH.value,
            samples=_SAMPLES.value,
            seed=_SEED.value,
            template_args={"enable_thinking": False},
            use_chat_template=not _RAW.value,
            progress=lambda done, total: bar("answers", done, total),
        )
    if _OUT.value:
        with open(_OUT.value, "w", encoding="utf-8") as lines:
            for i, (text, is_right) in enumerate(zip(result.responses, result.is_correct, strict=True)):
                row = {"id": prompts[i // result.samples].id, "response": text, "is_correct": is_right}
                lines.write(json.dumps(row) + "\n")
    print(f"accuracy   {result}   ({result.problems} problems, {result.samples} samples each)")
    print(f"truncated  {100 * result.truncated:.1f} %   mean length {result.mean_tokens:.1f} tokens")


if __name__ == "__main__":
    command.run(main)
