"""Every row of the paper's main table: a Qwen3 student, a domain, an arm, a teacher.

    python -m experiments.train --config=configs/qwen3.py:1p7b,math,omniopd,qwen3_32b --workdir=runs/row \\
        --config.student.path=Qwen3-1.7B --config.teacher.path=Qwen3-32B --config.data.train=dapo.parquet

configs/qwen3_{1p7b,4b}_{math,code}.py are this file with the first two chosen; their headers hold the paper's numbers,
the devices, the hours and the costs. Nothing here has been run at this size.

ARM      base      the student as it is: measured at step 0; then one step of the KL anchor alone, whose gradient is 0
                   at the initial student, so that the exported model is the student
         grpo      reinforcement learning with the task's judge as reward; no teacher is asked
         sft       the teacher's own answers to the same prompts
         opd       white-box reverse KL; a local teacher only, for no API shows logits
         omniopd   the method, as published
         branch    ours, from the very calls of omniopd
TEACHER  qwen3_32b, qwen3_30b_a3b   served by vLLM: `vllm serve Qwen/Qwen3-32B` at teacher.base_url, with the folder of
                   its tokenizer in teacher.path; for opd that folder's model is loaded into this process
         claude    Claude Haiku 4.5, the paper's; it continues a prefix exactly, no later Claude does
         gemini    Gemini 2.5 Flash, the paper's; switched off on 2026-12-01, and calls for it are then answered by
                   another model, which the run notices and stops at
         gemini_successor   Gemini 3.5 Flash, the next that continues a prefix; it has no price in our table

From the paper or a reader of it: students and teachers, M=10, C=50, N=10, α=1, β=0.1, prompts of DAPO-Math-17K. Our
guess, for the paper does not say or we could not read it: everything else, above all the steps, the batch (32 prompts ×
4 responses, as published neighbours have it), responses of 4096 tokens, learning rates, all of grpo's, sft's and opd's
settings, and every training set for code (here rows in MBPP's layout).
"""

from ml_collections import ConfigDict

from configs import base

STUDENTS = {"1p7b": "Qwen3-1.7B", "4b": "Qwen3-4B"}
DOMAINS = ("math", "code")
ARMS = ("base", "grpo", "sft", "opd", "omniopd", "branch")
SERVED = {"qwen3_32b": "Qwen/Qwen3-32B", "qwen3_30b_a3b": "Qwen/Qwen3-30B-A3B-Instruct-2507"}
PAID = {
    "claude": ("anthropic", "claude-haiku-4-5"),
    "gemini": ("gemini", "gemini-2.5-flash"),
    "gemini_successor": ("gemini", "gemini-3.5-flash"),
}
TEACHERS = (*SERVED, *PAID)


def get_config(row: str = "1p7b,math,omniopd,qwen3_32b") -> ConfigDict:
    parts = row.split(",")
    choices = (tuple(STUDENTS), DOMAINS, ARMS, TEACHERS)
    if len(parts) != 4 or any(part not in known for part, known in zip(parts, choices, strict=True)):
        raise ValueError(f"{row!r} is no row: expected " + ",".join("{" + "|".join(known) + "}" for known in choices))
    size, domain, arm, teacher = parts
    if arm == "opd" and teacher in PAID:
        raise ValueError(f"{row!r}: white-box distillation reads logits, which {teacher} does not show.")
    config = base.get_config()
    config.student.path = STUDENTS[size]
    config.data.max_prompt_tokens = 1024
    config.rollout.update(batch_size=128, samples_per_prompt=4, max_new_tokens=4096)
    config.train.update(steps=200, micro_batch_size=64, remat="full", checkpoint_best="eval/greedy_accuracy")
    config.reference.dtype = "bfloat16"
    config.eval.update(every=20, problems=500, batch_size=0)
    if domain == "math":
        config.eval.task = "math"
    else:
        config.data.task = "mbpp"
        config.eval.update(task="humaneval", sandbox="local")
    _set_teacher(config, teacher, arm)
    _set_arm(config, arm)
    return config


def _set_teacher(config: ConfigDict, teacher: str, arm: str) -> None:
    if arm in ("base", "grpo"):
        config.teacher.kind = "self"  # nobody is asked
    elif arm == "opd":
        config.teacher.update(kind="local", path=SERVED[teacher].removeprefix("Qwen/"))
    elif teacher in SERVED:
        folder = SERVED[teacher].removeprefix("Qwen/")
        config.teacher.update(
            kind="openai", base_url="http://127.0.0.1:8000/v1", model=SERVED[teacher], path=folder, max_concurrency=256
        )
    else:
        kind, model = PAID[teacher]
        config.teacher.update(kind=kind, model=model, max_concurrency=64)
        # A cap, so that nobody spends the whole sum by accident: raise it and run the same command to go on.
        if teacher == "gemini_successor":
            config.teacher.max_calls = 20_000
        else:
            config.teacher.max_dollars = 100.0


def _set_arm(config: ConfigDict, arm: str) -> None:
    if arm == "base":
        config.objective.arm = "anchor"
        config.train.update(steps=1, checkpoint_best="")
        config.eval.every = 2  # at step 0 and, for want of a step 2, never again
        config.rollout.update(batch_size=64, samples_per_prompt=1, max_new_tokens=512)
        config.eval.max_new_tokens = 4096
    elif arm == "grpo":
        config.objective.update(arm="grpo", anchor_weight=0.001, anchor_tokens="all", anchor_estimator="k3")
        config.objective.normalise = "response"
        config.rollout.samples_per_prompt = 8
    elif arm == "sft":
        config.objective.update(arm="sft", anchor_weight=0.0)
        config.rollout.samples_per_prompt = 1
        config.optimizer.learning_rate = 1e-5
    elif arm == "opd":
        config.objective.update(arm="opd", divergence="reverse_kl", anchor_weight=0.0)
    elif arm == "omniopd":
        config.objective.arm = "verify"
    elif arm == "branch":
        config.objective.update(arm="branch", num_branches=8, repulsion=0.25, anchor_weight=0.0)
        config.audit.update(similarity="edit_words", positions="entropy_weighted")
