"""OmniOPD as published, on GSM8K, with a student and a teacher from local folders in Hugging Face layout.

    python -m experiments.train --config=configs/gsm8k.py --workdir=runs/gsm8k \\
        --config.student.path=Qwen3-1.7B --config.teacher.path=Qwen3-8B --config.data.train=train.jsonl

Rows: `question` and `answer` (the worked solution, its last line `#### number`), as OpenAI published them. The paper
trains on DAPO-Math-17K with longer responses; this is the same method on a set that everybody has at hand. Devices: one
accelerator with 80 GB holds both models; for a teacher behind an API set `teacher.kind` (docs/teachers.md). Expected
numbers: none yet, it has not been run at this size.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.update(
        prompt_field="question",
        answer_field="answer",
        system_prompt="Solve the problem step by step. End with a line '#### ' and the answer as a number.",
        max_prompt_tokens=512,
    )
    config.rollout.update(batch_size=64, samples_per_prompt=2, max_new_tokens=512)
    config.audit.update(num_chunks=5, chunk_tokens=50, num_continuations=10)
    config.optimizer.learning_rate = 1e-6  # published neighbours: 5e-7 to 1e-6 for full-parameter updates
    config.train.update(steps=200, micro_batch_size=8, remat="full")
    config.eval.task = "math"
    return config
