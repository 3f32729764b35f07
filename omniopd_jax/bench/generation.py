"""Rollouts, refilled slots and audits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import models, prng
from omniopd_jax.algo.anchors import select_anchors
from omniopd_jax.bench.programs import model_of, work
from omniopd_jax.bench.protocol import Spec, Work
from omniopd_jax.rollout.branches import branch_keys, read_trunk, sample_branches
from omniopd_jax.rollout.rescoring import rescore
from omniopd_jax.rollout.sampler import sample
from omniopd_jax.train.compilation import CompileCounter

_BANNED = (0, 1)  # what a tokenizer would have: padding and a start token


def _prompts(spec: Spec, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (spec["batch"], spec["prompt_tokens"])
    return np.random.default_rng(0).integers(2, vocab_size, shape).astype(np.int32), np.ones(shape, bool)


def rollout(spec: Spec) -> Work:
    """Whole responses, none of which stops early."""
    counter = CompileCounter()
    model = model_of(spec)
    tokens_BxP, mask_BxP = _prompts(spec, model.config.vocab_size)
    keys_B = prng.row_keys(jax.random.key(1), np.arange(spec["batch"]))

    def run() -> Any:
        return sample(model, tokens_BxP, mask_BxP, keys_B, max_new_tokens=spec["new_tokens"], banned_tokens=_BANNED)

    return work(run, counter)


def refill(spec: Spec) -> Work:
    """Responses of 16 to 512 tokens: in slots that are refilled, in batches of as many, or all of them at once.

    Random weights stop at random, so more responses are drawn than needed and those kept whose lengths come closest
    to the wanted ones; every contestant keeps the same.
    """
    counter = CompileCounter()
    model = model_of(spec)
    vocab_size, wanted = model.config.vocab_size, _wanted_lengths(spec)
    limit, candidates = int(wanted.max()), 4 * len(wanted)
    tokens, mask = _prompts(dict(spec, batch=candidates), vocab_size)
    keys = prng.row_keys(jax.random.key(1), np.arange(candidates))
    # one stop token in so many draws that lengths spread over the whole range
    stop_tokens = tuple(range(2, 2 + max(1, round(vocab_size / (0.6 * float(wanted.mean()) + 60)))))
    options: dict[str, Any] = dict(max_new_tokens=limit, stop_tokens=stop_tokens, banned_tokens=_BANNED)
    drawn = sample(model, tokens, mask, keys, slots=len(wanted), **options)
    kept = _closest(np.asarray(drawn.mask_BxT).sum(axis=1), wanted)
    tokens, mask, keys = tokens[kept], mask[kept], keys[kept]
    size = {"refill": len(wanted), "batches": spec["slots"], "at once": len(wanted)}[spec["kind"]]

    def run() -> dict[str, Any]:
        slots = spec["slots"] if spec["kind"] == "refill" else 0
        parts = [
            sample(model, tokens[i : i + size], mask[i : i + size], keys[i : i + size], slots=slots, **options)
            for i in range(0, len(wanted), size)
        ]
        lengths = np.concatenate([np.asarray(part.mask_BxT).sum(axis=1) for part in parts])
        return {
            "tokens": int(lengths.sum()),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
            "mean_length": float(lengths.mean()),
        }

    return work(run, counter)


def _wanted_lengths(spec: Spec) -> np.ndarray:
    """Quantiles of lengths between 16 and `new_tokens`: evenly spread, or evenly in their logarithm (few long ones)."""
    quantiles = (np.arange(spec["batch"]) + 0.5) / spec["batch"]
    lowest, highest = 16.0, float(spec["new_tokens"])
    if spec["lengths"] == "even":
        lengths = lowest + quantiles * (highest - lowest)
    else:
        lengths = lowest * (highest / lowest) ** quantiles
    lengths[-1] = highest
    return np.random.default_rng(1).permutation(lengths.round().astype(np.int64))


def _closest(lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row numbers, one for each wanted length, none twice."""
    free = np.ones(len(lengths), bool)
    kept = np.zeros(len(wanted), np.int64)
    for i in np.argsort(-wanted):  # long ones are rare: they choose first
        kept[i] = int(np.argmin(np.where(free, np.abs(lengths - wanted[i]), np.inf)))
        free[kept[i]] = False
    return kept


def audit(spec: Spec) -> Work:
    """M·N continuations of one response: off one cache, or with every prefix read again.

    `kind`: "branches" (ours), "prefixes" (each of the M prefixes read once, for its N samples), "samples" (each sample
    a request of its own, as a server without a prefix cache would have it).
    """
    counter = CompileCounter()
    model = model_of(spec)
    width, response = spec["prompt_tokens"], spec["response_tokens"]
    chunks, count, length = spec["chunks"], spec["continuations"], spec["chunk_tokens"]
    generator = np.random.default_rng(0)
    tokens_BxS = generator.integers(2, model.config.vocab_size, (1, width + response)).astype(np.int32)
    mask_BxS = np.ones_like(tokens_BxS, bool)
    places = generator.choice(response // length, chunks, replace=False)
    start_BxM = np.sort(places * length)[None].astype(np.int32)
    is_valid_BxM = np.ones_like(start_BxM, bool)
    keys_B = prng.row_keys(jax.random.key(1), np.arange(1))
    said = {"tokens": chunks * count * length}

    if spec["kind"] == "branches":

        def run() -> Any:
            trunk = read_trunk(model, tokens_BxS, mask_BxS)
            drawn = sample_branches(
                model,
                trunk,
                start_BxM,
                is_valid_BxM,
                keys_B,
                prompt_width=width,
                num_branches=count,
                length=length,
                banned_tokens=_BANNED,
            )
            jax.block_until_ready(drawn)
            return said

        return work(run, counter)

    keys_R = branch_keys(keys_B, jnp.asarray(start_BxM), count).reshape(-1)
    ends_R = np.repeat(width + start_BxM[0], count)
    prefixes = np.zeros((len(ends_R), width + response), np.int32)
    masks = np.zeros_like(prefixes, bool)
    for row, end in enumerate(ends_R):
        prefixes[row, width + response - end :] = tokens_BxS[0, :end]
        masks[row, width + response - end :] = True
    group = count if spec["kind"] == "prefixes" else 1

    def run_naive() -> Any:
        if group > 1:
            return _continue_prefixes(model, prefixes[::group], masks[::group], keys_R, count, length) | said
        jax.block_until_ready(sample(model, prefixes, masks, keys_R, max_new_tokens=length, banned_tokens=_BANNED))
        return said

    return work(run_naive, counter)


def _continue_prefixes(
    model: models.Model, prefix_MxS: np.ndarray, mask_MxS: np.ndarray, keys_R: Any, count: int, length: int
) -> dict[str, Any]:
    """Every prefix is read as a row of its own and continued `count` times off its own cache."""
    rows = len(prefix_MxS)
    trunk = read_trunk(model, np.pad(prefix_MxS, ((0, 0), (0, 1))), np.pad(mask_MxS, ((0, 0), (0, 1))))
    drawn = sample_branches(
        model,
        trunk,
        np.zeros((rows, 1), np.int32),
        np.ones((rows, 1), bool),
        keys_R[::count],
        prompt_width=prefix_MxS.shape[1],
        num_branches=count,
        length=length,
        banned_tokens=_BANNED,
    )
    jax.block_until_ready(drawn)
    return {}


def anchors(spec: Spec) -> Work:
    """Chunks chosen by the decode loop's entropies against those chosen by a pass of its own.

    Says same_chunks and same_responses: the share of chunks that both choose, and of responses where all agree.
    """
    counter = CompileCounter()
    model = model_of(spec)
    tokens_BxP, mask_BxP = _prompts(spec, model.config.vocab_size)
    keys_B = prng.row_keys(jax.random.key(1), np.arange(spec["batch"]))
    sizes = dict(num_chunks=spec["chunks"], chunk_tokens=spec["chunk_tokens"], max_fraction=0.5)
    choose = jax.jit(functools.partial(select_anchors, **sizes))

    def run() -> dict[str, Any]:
        drawn = sample(model, tokens_BxP, mask_BxP, keys_B, max_new_tokens=spec["new_tokens"], banned_tokens=_BANNED)
        chosen = [choose(one.entropy_BxT, one.mask_BxT) for one in (drawn, rescore(model, drawn))]
        starts = [np.where(one.is_valid_BxM, one.start_BxM, -1) for one in chosen]
        common = [len(set(a[a >= 0]) & set(b[b >= 0])) for a, b in zip(*starts, strict=True)]
        return {
            "tokens": int(drawn.mask_BxT.sum()),
            "same_chunks": sum(common) / max(int((starts[0] >= 0).sum()), 1),
            "same_responses": float((starts[0] == starts[1]).all(axis=1).mean()),
        }

    return work(run, counter)
