"""Eight steps of everything in under a minute, compilation included. Needs no file and no network.

    python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny
    python -m experiments.train --config=configs/tiny.py:grpo --workdir=runs/tiny_grpo    # any arm of docs/arms.md

A world of one-digit additions is made in the work directory, a teacher and a student of a few thousand parameters are
trained on it for seconds, and the student is distilled for eight steps. Good for trying knobs and for tests; the
student learns next to nothing in so few steps.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("verify", "branch", "imitate", "sft", "opd", "grpo", "anchor", "mixture")


def get_config(arm: str = "verify") -> ConfigDict:
    config = base.get_config()
    config.world.update(
        kind="arithmetic",
        size=1,
        train_problems=60,
        eval_problems=40,
        teacher_width=32,
        teacher_layers=2,
        teacher_steps=60,
        student_width=32,
        student_layers=2,
        student_steps=40,
        batch_size=32,
    )
    config.rollout.update(batch_size=8, max_new_tokens=24)
    config.teacher.token_slack = 1.0  # teacher and student have one tokenizer: a token asked for is a token used
    config.audit.update(num_chunks=2, chunk_tokens=4, num_continuations=2)
    config.optimizer.learning_rate = 1e-4
    config.train.update(steps=8, checkpoint_every=4)
    config.eval.update(problems=40, batch_size=40)
    config.objective.arm = arm
    config.objective.num_branches = 4
    if arm == "sft":
        config.objective.anchor_weight = 0.0
    if arm == "grpo":
        config.rollout.samples_per_prompt = 4
        config.objective.update(normalise="response", anchor_estimator="k3", anchor_weight=0.04)
        config.train.updates_per_batch = 2
    if arm == "mixture":
        config.objective.weights.update(branch=0.5, imitate=0.5)
    return config
