"""What models compute before the step: the student's responses, the choice of chunks, branches off them; and what a
white-box teacher thinks of the sampled tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omniopd_jax import prng
from omniopd_jax.algo.anchors import select_anchors
from omniopd_jax.algo.entropy import token_logprob
from omniopd_jax.config import Config
from omniopd_jax.models import Model, decoder
from omniopd_jax.rollout.branches import read_trunk, sample_branches
from omniopd_jax.rollout.rescoring import rescore
from omniopd_jax.rollout.sampler import sample
from omniopd_jax.train.sharding import batch_sharding, block_tokens
from omniopd_jax.types import Anchors, Array, Branches, Rollout


class Student(NamedTuple):
    """The student's side of a step, each function compiled once a shape. Arrays in and out are on the devices."""

    respond: Callable[[Model, Array, Array, Array, Array], Rollout]  # (model, tokens_BxP, mask_BxP, index_B, step)
    choose: Callable[[Rollout, Array, Array], Anchors]  # (rollout, index_B, step)
    branch: Callable[[Model, Rollout, Anchors, Array, Array], Branches]  # (model, rollout, anchors, index_B, step)


def make_student(
    config: Config, mesh: Mesh, *, stop_tokens: tuple[int, ...], banned_tokens: tuple[int, ...]
) -> Student:
    """The three functions under `config`.

    Entropy and log-probability come from the decode loop itself; they are those of a full forward pass, and
    `audit.entropy_source = "rescore"` takes the entropy from one. Only branches need the response read again beside
    that, and that once for all of them.
    """
    audit, rollout_config, seed = config.audit, config.rollout, config.train.seed
    rule: dict[str, Any] = dict(
        stop_tokens=stop_tokens,
        banned_tokens=banned_tokens,
        temperature=rollout_config.temperature,
        top_k=rollout_config.top_k,
        top_p=rollout_config.top_p,
        min_p=rollout_config.min_p,
    )

    def keys(purpose: str, step: Array, index_B: Array) -> jax.Array:
        return prng.row_keys(prng.named_key(seed, step, purpose), index_B)

    def respond(model: Model, tokens_BxP: Array, mask_BxP: Array, index_B: Array, step: Array) -> Rollout:
        rollout = sample(
            model,
            tokens_BxP,
            mask_BxP,
            keys("rollout", step, index_B),
            max_new_tokens=rollout_config.max_new_tokens,
            slots=rollout_config.slots,
            **rule,
        )
        if audit.entropy_source == "rescore":
            rollout = rescore(model, rollout, block_tokens=block_tokens(config, mesh))
        return rollout

    def choose(rollout: Rollout, index_B: Array, step: Array) -> Anchors:
        return select_anchors(
            rollout.entropy_BxT,
            rollout.mask_BxT,
            num_chunks=audit.num_chunks,
            chunk_tokens=audit.chunk_tokens,
            max_fraction=audit.max_fraction,
            positions=audit.positions,
            keys_B=keys("positions", step, index_B),
        )

    def branch(model: Model, rollout: Rollout, anchors: Anchors, index_B: Array, step: Array) -> Branches:
        return sample_branches(
            model,
            read_trunk(model, *rollout.sequence()),
            anchors.start_BxM,
            anchors.is_valid_BxM,
            keys("branches", step, index_B),
            prompt_width=rollout.prompt_tokens_BxP.shape[1],
            num_branches=config.objective.num_branches,
            length=audit.chunk_tokens,
            **rule,
        )

    compiled = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))
    # `sample` compiles its own parts and looks between them whether every response has ended, so it is not traced.
    return Student(respond, compiled(choose), compiled(branch))


def make_scorer(mesh: Mesh, *, block_tokens: int) -> Callable[[Model, Rollout], Array]:
    """Compiles (teacher, rollout) → logprob_BxT, float32, nats: log π_T of the sampled tokens; 0 on padding."""

    def score(teacher: Model, rollout: Rollout) -> Array:
        hidden_BxSxD, _ = decoder.read(teacher, *rollout.sequence())
        first = rollout.prompt_tokens_BxP.shape[1] - 1
        logprob_BxT = token_logprob(
            hidden_BxSxD[:, first:-1],
            decoder.unembedding(teacher),
            rollout.tokens_BxT,
            block_tokens=block_tokens,
            logit_softcap=teacher.config.final_logit_softcap,
        )
        return jnp.where(rollout.mask_BxT, logprob_BxT, 0.0)

    return jax.jit(score, out_shardings=batch_sharding(mesh))
