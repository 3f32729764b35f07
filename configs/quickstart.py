"""The small world of `make quickstart`: three-digit additions, a student that forgets carries, a teacher that does not.

    python -m experiments.train --config=configs/quickstart.py:recommended --workdir=runs/recommended
    python -m experiments.train --config=configs/quickstart.py:published   --workdir=runs/published
    python -m experiments.train --config=configs/quickstart.py:branch      --workdir=runs/branch

`published` is OmniOPD as in the paper, with chunks of 8 tokens because a response has about 35, and with three
responses an update because N = 10 continuations a chunk cost what 32 responses cost otherwise. `recommended` is what
does best on the same teacher tokens (docs/results.md), `branch` the arm that scores the student's own continuations.
2 CPU cores, a few minutes; expected figures stand in README.md.
"""

from ml_collections import ConfigDict

from configs import base

SETTINGS = ("recommended", "published", "branch")


def get_config(setting: str = "recommended") -> ConfigDict:
    config = base.get_config()
    config.world.kind = "arithmetic"
    config.teacher.token_slack = 1.0  # teacher and student have one tokenizer: a token asked for is a token used
    config.rollout.update(batch_size=32, max_new_tokens=48)
    config.audit.update(num_chunks=4, chunk_tokens=8, num_continuations=1, max_fraction=1.0)
    config.optimizer.update(warmup_steps=5, clip_norm=1.0, learning_rate=2e-4)
    config.train.update(steps=120, checkpoint_every=40)
    config.eval.update(problems=1000, batch_size=500, task="world")
    if setting == "recommended":
        # Tokens that the student finds unlikely count less: what it could not have written does not pull it.
        config.objective.update(arm="imitate", confidence_power=0.5, anchor_weight=0.0)
        config.audit.positions = "random"
    elif setting == "published":
        config.objective.arm = "verify"
        config.rollout.batch_size = 3
        config.audit.update(num_continuations=10, similarity="edit", positions="peak")
        config.optimizer.learning_rate = 5e-5  # the best of four (docs/results.md)
    elif setting == "branch":
        # Repulsion keeps all phrasings in use; without it the student settles on the teacher's favourite one.
        config.objective.update(arm="branch", num_branches=8, repulsion=0.25, anchor_weight=0.0)
        config.audit.update(similarity="edit_words", positions="entropy_weighted")
    else:
        raise ValueError(f"{setting!r} is not a setting of the quickstart: expected one of {', '.join(SETTINGS)}.")
    return config
