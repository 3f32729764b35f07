"""Plain next-token training on (prompt, answer) texts, with the same jitted step: weight 1 on every answer token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from omniopd_jax.config import MeshConfig, OptimizerConfig
from omniopd_jax.data import Tokenizer
from omniopd_jax.models import Model
from omniopd_jax.train import batching, sharding
from omniopd_jax.train.optimizer import make_optimizer
from omniopd_jax.train.step import (
    StepOptions,
    init_state,
    make_step,
    state_shardings,
    with_trainable,
    without_trainable,
)
from omniopd_jax.train.stops import NotFinite
from omniopd_jax.types import InputError, Prompt, TokenTree

_LOGITS_A_BLOCK = 2**20  # float32: 4 MiB
_REPORT_EVERY = 50  # steps between looks at the loss: each look waits for the device


def adamw(learning_rate: float, *, warmup_steps: int = 50) -> OptimizerConfig:
    """AdamW with a warm-up and a cosine down to 0, clipped at norm 1: for training from scratch."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_steps=warmup_steps,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        state_dtype="float32",
    )


def train_on_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    optimizer: OptimizerConfig,
    seed: int,
    template_args: Mapping[str, Any] | None = None,
    use_chat_template: bool = True,
    progress: Callable[[int, float], None] | None = None,
) -> Model:
    """Maximum likelihood of the answers (stop token included), a mean over the answer tokens of each batch.

    All batches have one width, that of the longest text, so one program serves all steps.

    Args:
      model: where to start; left as it is.
      tokenizer: turns texts to tokens; its end-of-sequence token ends every answer.
      prompts: what comes before; not trained on.
      answers: one a prompt.
      steps: updates.
      batch_size: texts a step; a fresh shuffle an epoch.
      optimizer: see `adamw`.
      seed: names the order.
      template_args, use_chat_template: as in `data.*` of the config.
      progress: called every 50 steps and at the end with (steps done, nats a token of that batch).

    Returns:
      The trained model.

    Raises:
      InputError: fewer texts than a batch holds, or not one answer a prompt.
      NotFinite: the loss or its gradient overflowed.
    """
    if len(prompts) != len(answers) or len(prompts) < batch_size:
        raise InputError(f"{len(prompts)} prompts and {len(answers)} answers do not fill batches of {batch_size}.")
    stop: Any = tokenizer.hf.eos_token_id
    before, before_mask = _padded(tokenizer.encode_prompts(prompts, template_args, use_chat_template), left=True)
    after, after_mask = _padded([[*ids, stop] for ids in tokenizer.encode_batch(answers)], left=False)

    devices = jax.local_devices()
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), devices[: math.gcd(batch_size, len(devices))])
    transformation = make_optimizer(optimizer, steps)
    shardings = state_shardings(mesh, model, transformation)
    state = init_state(model, transformation, shardings)
    frozen = without_trainable(sharding.placed(model, mesh))
    step = make_step(
        frozen,
        None,
        transformation,
        mesh,
        shardings,
        StepOptions(
            has_trunk=True, has_anchor=False, block_tokens=max(512, _LOGITS_A_BLOCK // model.config.vocab_size)
        ),
    ).whole
    for number, chosen in enumerate(_batches(len(prompts), batch_size, steps, seed), start=1):
        mask_BxT = after_mask[chosen]
        tree = _tree(before[chosen], before_mask[chosen], after[chosen], mask_BxT)
        state, metrics = step(state, batching.to_devices(batching.micro_batches(tree, 1), mesh, axis=1))
        if number % _REPORT_EVERY == 0 or number == steps:
            seen = batching.to_host(metrics)
            if not seen["is_finite"]:
                raise NotFinite(number, "the loss or its gradient")
            if progress is not None:
                progress(number, float(seen["loss/total"]))
    return with_trainable(frozen, state.params)


def _batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each batch; the rows that do not fill the last batch of an epoch sit that epoch out."""
    epoch, place = 0, count
    order = np.arange(count)
    for _ in range(steps):
        if place + batch_size > count:
            order, place, epoch = np.random.default_rng([seed, epoch]).permutation(count), 0, epoch + 1
        yield order[place : place + batch_size]
        place += batch_size


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        place = slice(width - len(ids), width) if left else slice(0, len(ids))
        tokens[row, place] = ids
        mask[row, place] = True
    return tokens, mask


def _tree(before: np.ndarray, before_mask: np.ndarray, after: np.ndarray, after_mask: np.ndarray) -> TokenTree:
    rows = len(after)
    return TokenTree(
        prompt_tokens_BxP=before,
        prompt_mask_BxP=before_mask,
        tokens_BxT=after,
        mask_BxT=after_mask,
        weight_BxT=after_mask.astype(np.float32) / np.float32(after_mask.sum()),
        anchor_weight_BxT=np.zeros(after.shape, np.float32),
        branch_tokens_BxRxC=np.zeros((rows, 0, 1), np.int32),
        branch_mask_BxRxC=np.zeros((rows, 0, 1), bool),
        branch_weight_BxRxC=np.zeros((rows, 0, 1), np.float32),
        branch_start_BxR=np.zeros((rows, 0), np.int32),
    )
