"""One optimizer update: as published, or on merged branches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import models
from omniopd_jax.bench.programs import model_of, work
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.config import from_mapping
from omniopd_jax.train import batching, sharding
from omniopd_jax.train.compilation import CompileCounter
from omniopd_jax.train.optimizer import make_optimizer
from omniopd_jax.train.step import StepOptions, init_state, make_step, state_shardings, without_trainable
from omniopd_jax.types import TokenTree


def update(spec: Spec) -> Work:
    """Student forward and backward, reference forward, anchor KL, AdamW.

    `kind`: "verify" puts a weight on every response token; "branch" on `chunks` × `branches` continuations a response,
    drawn so that a share of them are equal, as short continuations of a trained student are. `has_anchor`: the KL
    anchor on every response token. `remat`: as in `train` of a config.
    """
    counter = CompileCounter()
    config = from_mapping(spec["config"])
    mesh = sharding.make_mesh(config.mesh)
    model = model_of(spec)
    dtype = jnp.dtype(spec["dtype"])
    kernel = models.kernel_of(config.student.attention, model.config, dtype, jax.devices()[0])
    model = models.with_kernel(sharding.placed(model, mesh), models.Kernel(kernel))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    shardings = state_shardings(mesh, model, optimizer)
    step = make_step(
        without_trainable(model),
        model if spec["has_anchor"] else None,
        optimizer,
        mesh,
        shardings,
        StepOptions(
            has_trunk=spec["kind"] == "verify",
            has_anchor=spec["has_anchor"],
            remat=spec["remat"],
            block_tokens=sharding.block_tokens(config, mesh),
        ),
    ).whole
    state = init_state(model, optimizer, shardings)
    tree = _tree(spec, model.config.vocab_size)
    holder: list[Any] = [state]

    def run() -> dict[str, Any]:
        packed = batching.pack(tree, groups=sharding.batch_shares(mesh), list_from=config.train.list_tokens_from)
        trees = batching.to_devices(batching.micro_batches(packed, 1), mesh, axis=1)
        holder[0], metrics = step(holder[0], trees)
        jax.block_until_ready((holder[0], metrics))
        return {"tokens": _weighted(packed), "packed_tokens": _positions(packed)}

    return work(run, counter)


def _positions(tree: TokenTree) -> int:
    """Tokens that the step reads."""
    if tree.read_UxJxW is not None:
        return tree.read_UxJxW.size
    return tree.prompt_tokens_BxP.size + tree.tokens_BxT.size + tree.branch_tokens_BxRxC[:, :, 1:].size


def _weighted(tree: TokenTree) -> int:
    """Tokens that are trained on; `pack` has merged equal branches."""
    return int((tree.weight_BxT != 0).sum()) + int((tree.branch_weight_BxRxC != 0).sum())


def _tree(spec: Spec, vocab_size: int) -> TokenTree:
    generator = np.random.default_rng(0)
    rows, prompt, length = spec["batch"], spec["prompt_tokens"], spec["new_tokens"]
    is_branch = spec["kind"] == "branch"
    chunks, count, width = (spec["chunks"], spec["branches"], spec["chunk_tokens"]) if is_branch else (0, 0, 1)
    tokens = generator.integers(2, vocab_size, (rows, prompt + length)).astype(np.int32)
    starts = np.sort(generator.permuted(np.tile(np.arange(length - width), (rows, 1)), axis=1)[:, :chunks], axis=1)
    branch_tokens = generator.integers(2, vocab_size, (rows, chunks, count, width)).astype(np.int32)
    if is_branch:
        # of the continuations of one start, each repeats an earlier one with this probability
        repeats = generator.random((rows, chunks, count)) < spec["repeats_share"]
        earlier = (generator.random((rows, chunks, count)) * np.arange(count)).astype(np.int64)
        for number in range(1, count):
            again = repeats[:, :, number]
            picked = np.take_along_axis(branch_tokens, earlier[:, :, number, None, None], axis=2)[:, :, 0]
            branch_tokens[:, :, number] = np.where(again[..., None], picked, branch_tokens[:, :, number])
    branch_weight = generator.normal(size=(rows, chunks, count, 1)).astype(np.float32) * np.ones(width, np.float32)
    trunk_weight = np.full((rows, length), 0.0 if is_branch else 0.5 / (rows * length), np.float32)
    return TokenTree(
        prompt_tokens_BxP=tokens[:, :prompt],
        prompt_mask_BxP=np.ones((rows, prompt), bool),
        tokens_BxT=tokens[:, prompt:],
        mask_BxT=np.ones((rows, length), bool),
        weight_BxT=trunk_weight,
        anchor_weight_BxT=np.full((rows, length), 0.1 * spec["has_anchor"] / (rows * length), np.float32),
        branch_tokens_BxRxC=branch_tokens.reshape(rows, chunks * count, width),
        branch_mask_BxRxC=np.ones((rows, chunks * count, width), bool),
        branch_weight_BxRxC=branch_weight.reshape(rows, chunks * count, width) / (rows * length),
        branch_start_BxR=np.repeat(starts, count, axis=1).astype(np.int32),
    )
