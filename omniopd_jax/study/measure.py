"""What is measured of a student: right answers problem by problem, phrasing variety, divergence from the teacher."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import models, prng
from omniopd_jax.algo.divergences import teacher_divergence
from omniopd_jax.config import Config
from omniopd_jax.data import Tokenizer, load_tokenizer, read_prompts
from omniopd_jax.data.prompts import bucket_width, pad_prompts
from omniopd_jax.models import Model
from omniopd_jax.rollout import sampler
from omniopd_jax.train import evaluation
from omniopd_jax.train.evaluation import MODES
from omniopd_jax.types import Array, Prompt
from omniopd_jax.worlds import get_world, wording

SPLITS = ("validation", "eval")


def measure(config: Config, world: Path, model: Model, tokenizer: Tokenizer, *, kl_problems: int) -> dict[str, Any]:
    """Everything about one student, ready for JSON.

    Args:
      config: how answers are measured (`train.evaluation.measure`), world.
      world: the folder of the world, whose teacher is the one compared with.
      model, tokenizer: the student.
      kl_problems: prompts on which the divergences are measured, those of the validation split.

    Returns:
      "validation" and "eval", each with greedy and temperature_1: accuracy, and "right", a string of 0 and 1 in the
      order of the problems (the samples of one adjacent); "variety", effective number of phrasings at temperature 1 on
      held-out problems; "kl", nats a token: reverse (student first) on the student's samples and forward on the
      teacher's; None where the two have different tokenizers.
    """
    found: dict[str, Any] = {}
    responses: Sequence[str] = ()
    for split in SPLITS:
        prompts = read_prompts(str(world / f"{split}.jsonl"))
        found[split] = {}
        results = evaluation.measure(config, model, tokenizer, prompts, evaluation.judge_of(config, prompts))
        for mode, result in results.items():
            right = "".join("1" if is_right else "0" for is_right in result.is_correct)
            found[split][mode] = dict(accuracy=result.accuracy, right=right)
            responses = result.responses  # those at temperature 1 on held-out problems come last
    found["variety"] = wording.phrasing_variety(responses, get_world(config.world.kind).MARKS)
    found["kl"] = None
    teacher_tokenizer = load_tokenizer(world / "teacher")
    if teacher_tokenizer.has_same_vocabulary(tokenizer):
        teacher = models.load_model(world / "teacher", dtype=jnp.float32)
        prompts = read_prompts(str(world / "validation.jsonl"))[:kl_problems]
        found["kl"] = divergences(
            model, teacher, tokenizer, prompts, max_new_tokens=config.rollout.max_new_tokens, seed=config.train.seed
        )
    return found


def divergences(
    student: Model, teacher: Model, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int, seed: int
) -> dict[str, float]:
    """Nats a token at temperature 1: {"reverse": KL(student ‖ teacher) on the student's own samples, "forward":
    KL(teacher ‖ student) on the teacher's}. One sample a prompt; a mean over all tokens of the samples."""
    ids = tokenizer.encode_prompts(prompts)
    batch = pad_prompts(
        prompts, ids, range(len(prompts)), width=bucket_width(max(map(len, ids))), pad_id=tokenizer.pad_id
    )
    found = {}
    for name, writer in (("reverse", student), ("forward", teacher)):
        rollout = sampler.sample(
            writer,
            batch.tokens_BxP,
            batch.mask_BxP,
            prng.row_keys(prng.named_key(seed, 0, f"{name} divergence"), batch.sample_index_B),
            max_new_tokens=max_new_tokens,
            stop_tokens=tokenizer.stop_tokens,
            banned_tokens=tokenizer.banned_tokens(writer.config.vocab_size),
        )
        value_BxT = _divergence(student, teacher, *rollout.sequence(), f"{name}_kl", batch.tokens_BxP.shape[1])
        mask_BxT = np.asarray(rollout.mask_BxT)
        found[name] = float(np.asarray(value_BxT)[mask_BxT].mean())
    return found


@functools.partial(jax.jit, static_argnames=("kind", "prompt_width"))
def _divergence(
    student: Model, teacher: Model, tokens_BxS: Array, mask_BxS: Array, kind: str, prompt_width: int
) -> Array:
    sides = []
    for model in (teacher, student):
        hidden_BxSxD, _ = models.read(model, tokens_BxS, mask_BxS)
        sides += [hidden_BxSxD[:, prompt_width - 1 : -1], models.unembedding(model)]
    return teacher_divergence(*sides, kind=kind)


def right(measured: Mapping[str, Any], mode: str, split: str = "eval") -> np.ndarray:
    """bool, one entry a problem of a split."""
    return np.frombuffer(measured[split][mode]["right"].encode(), np.uint8) == ord("1")


def score(measured: Mapping[str, Any]) -> float:
    """What the search for a learning rate maximises: the mean of greedy and temperature-1 validation accuracy."""
    if measured.get("failed"):
        return -1.0
    return float(np.mean([measured["validation"][mode]["accuracy"] for mode in MODES]))
