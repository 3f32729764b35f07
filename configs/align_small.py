"""Which way each estimator's gradient points, before anything is trained: arms and settings on the small world.

    python -m experiments.align --config=configs/align_small.py --workdir=runs/align --results=docs/alignment.md
    python -m experiments.align --config=configs/align_small.py:fast --workdir=runs/align_fast

`get_config` is the run that all estimators share, `get_estimators` names them. A free estimator (white-box, GRPO) has
one batch of responses a cosine; the others as many batches as the budget of teacher tokens pays for.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import compare_small


def get_config(argument: str = "arithmetic") -> ConfigDict:
    return compare_small.get_config(argument)


def get_estimators(argument: str = "arithmetic") -> dict[str, Any]:
    """{"batches", "reference_batches", "budget" (teacher tokens), "estimators": [{name, title, settings}]}."""
    study = compare_small.get_study(argument)
    verify, branch = compare_small.VERIFY, compare_small.BRANCH
    arms = [dict(name=arm["name"], title=arm["title"], settings=arm["settings"]) for arm in study["arms"]]
    more = [
        _estimator("verify_exact", "`verify`, φ = exact", verify, "audit.similarity", "exact"),
        _estimator("verify_rouge1", "`verify`, φ = rouge1", verify, "audit.similarity", "rouge1"),
        _estimator("verify_m1", "`verify`, M = 1", verify, "audit.num_chunks", 1),
        _estimator("verify_c4", "`verify`, C = 4", verify, "audit.chunk_tokens", 4),
        _estimator("verify_c16", "`verify`, C = 16", verify, "audit.chunk_tokens", 16),
        _estimator("verify_n4", "`verify`, N = 4", verify, "audit.num_continuations", 4),
        _estimator("branch_g4", "`branch`, G = 4", branch, "objective.num_branches", 4),
        _estimator("branch_g16", "`branch`, G = 16", branch, "objective.num_branches", 16),
        _estimator("branch_full", "`branch`, repulsion 1", branch, "objective.repulsion", 1.0),
        _estimator("branch_peak", "`branch`, peaks of entropy", branch, "audit.positions", "peak"),
    ]
    is_fast = "fast" in argument
    return dict(
        batches=2 if is_fast else 16,
        reference_batches=2 if is_fast else 32,
        budget=6_500,
        estimators=arms if is_fast else arms + more,
    )


def _estimator(name: str, title: str, settings: dict[str, Any], knob: str, value: Any) -> dict[str, Any]:
    return dict(name=name, title=title, settings=settings | {knob: value})
