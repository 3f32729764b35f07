"""Which work each suite holds, at which shapes, against whom, and what was promised.

The shapes and bars are those of docs/benchmarks.md; flags replace them for other models and machines.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.bench import products, shapes
from omniopd_jax.bench.contest import Contest, Entrant
from omniopd_jax.train.cache_home import cache_home
from omniopd_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's flags. 0 leaves a size as the suite has it."""

    models: tuple[str, ...]  # (): the suite's own
    batch: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    config: Mapping[str, Any]  # every knob, for the suites that train
    folder: Callable[[str], str]  # model name → a checkpoint that every contestant reads; "" without rivals
    rivals: Mapping[str, tuple[str, ...]]  # rival library → its command; empty without --peers


def _size(flag: int, default: int) -> int:
    return flag or default


def _spec(options: Options, model: str, work: str, **values: Any) -> dict[str, Any]:
    return dict(work=work, model=model, dtype=options.dtype, folder=options.folder(model)) | values


def _itemsize(options: Options) -> int:
    return {"float32": 4, "bfloat16": 2}[options.dtype]


def _rivals(options: Options, work: str, names: tuple[str, ...], spec: Mapping[str, Any]) -> list[Entrant]:
    return [
        Entrant(name, dict(spec, work=work, engine=name), options.rivals[name])
        for name in names
        if name in options.rivals
    ]


def rollout(options: Options) -> Iterator[Contest]:
    """Whole responses of one length; then responses of many lengths, with slots refilled and without."""
    for model in options.models or ("A", "B"):
        batch = _size(options.batch, {"B": 4}.get(model, 8))
        shape = dict(
            batch=batch, prompt_tokens=_size(options.prompt_tokens, 32), new_tokens=_size(options.new_tokens, 96)
        )
        spec = _spec(options, model, "rollout", **shape)
        names = ("transformers", "trl", "tunix")
        yield Contest(
            "rollout", model, shape, [Entrant("ours", spec), *_rivals(options, "rollout", names, spec)],
            tokens=batch * shape["new_tokens"],
            cost=shapes.rollout_cost(
                shapes.read_shape(model), batch, shape["prompt_tokens"], shape["new_tokens"], _itemsize(options)
            ),
            bar={"A": 2.0, "B": 1.3}.get(model, 0.0) if options.rivals else 0.0,
        )  # fmt: skip


def refill(options: Options) -> Iterator[Contest]:
    """64 responses whose lengths vary from 16 to 512 tokens."""
    for model in options.models or ("A",):
        shape = dict(
            batch=_size(options.batch, 64),
            prompt_tokens=_size(options.prompt_tokens, 32),
            new_tokens=_size(options.new_tokens, 512),
        )
        for lengths in ("logarithmic", "even"):
            spec = _spec(options, model, "refill", **shape, lengths=lengths, slots=max(1, shape["batch"] // 4))
            small = dict(spec, slots=max(1, shape["batch"] // 8))
            yield Contest(
                f"refill, lengths {lengths}", model, shape,
                [
                    Entrant("ours", dict(spec, kind="refill")),
                    Entrant("all at once", dict(spec, kind="at once")),
                    Entrant("batches of 8" if shape["batch"] == 64 else "batches", dict(small, kind="batches")),
                ],
                tokens=0, cost=None, bar=2.0 if lengths == "logarithmic" else 0.0,
            )  # fmt: skip


def audit(options: Options) -> Iterator[Contest]:
    """A teacher's continuations of one long response."""
    for model in options.models or ("A",):
        shape = dict(
            prompt_tokens=_size(options.prompt_tokens, 32),
            response_tokens=_size(options.new_tokens, 1024),
            chunks=10, continuations=10, chunk_tokens=50,
        )  # fmt: skip
        spec = _spec(options, model, "audit", **shape)
        yield Contest(
            "audit", model, shape,
            [
                Entrant("ours", dict(spec, kind="branches")),
                Entrant("each prefix read again", dict(spec, kind="prefixes")),
                Entrant("each sample's prefix read again", dict(spec, kind="samples")),
            ],
            tokens=10 * 10 * 50,
            cost=shapes.audit_cost(
                shapes.read_shape(model), shape["prompt_tokens"], shape["response_tokens"], 10, 10, 50,
                _itemsize(options),
            ),
            bar=5.0,
        )  # fmt: skip


def anchors(options: Options) -> Iterator[Contest]:
    """How often rounding moves a chunk: entropies of the decode loop against those of a pass of its own."""
    for model in options.models or ("A",):
        shape = dict(batch=16, prompt_tokens=32, new_tokens=_size(options.new_tokens, 128), chunks=4, chunk_tokens=8)
        for dtype in ("float32", "bfloat16"):
            spec = dict(work="anchors", model=model, dtype=dtype, **shape)
            yield Contest(f"chunks, {dtype}", model, shape, [Entrant("ours", spec)], tokens=0, cost=None)


def score(options: Options) -> Iterator[Contest]:
    """Exact entropy and log-probability over a vocabulary of 151,936."""
    shape = dict(
        batch=_size(options.batch, 4), new_tokens=_size(options.new_tokens, 2048), width=256, vocabulary=151936
    )
    spec = dict(work="score", dtype=options.dtype, **shape)
    head = dataclasses.replace(shapes.read_shape("A"), hidden_size=shape["width"], vocab_size=shape["vocabulary"])
    # One at a time: each holds the logits several times over, and together they would need 24 GiB.
    dense = [Entrant("dense jax", dict(spec, kind="dense")), *_rivals(options, "score", ("torch",), spec)]
    for other in dense:
        yield Contest(
            f"score, {other.name}", "D=256 V=151936", shape, [Entrant("ours", dict(spec, kind="blocks")), other],
            tokens=shape["batch"] * shape["new_tokens"],
            cost=shapes.score_cost(head, shape["batch"], shape["new_tokens"], _itemsize(options)),
            bar=1.0,
        )  # fmt: skip


def update(options: Options) -> Iterator[Contest]:
    """One optimizer update, against distillation trainers with the same arithmetic; then its products alone."""
    for model in options.models or ("A", "B"):
        batch = _size(options.batch, {"B": 4}.get(model, 8))
        # One prompt token, so that trainers that read the head on every position do no more than the others.
        shape = dict(
            batch=batch, prompt_tokens=_size(options.prompt_tokens, 1), new_tokens=_size(options.new_tokens, 127)
        )
        settings = _update_settings(options)
        if model == "B":  # which would be faster with more memory (docs/benchmarks.md)
            train = dict(options.config["train"], block_tokens=128)
            settings |= {"config": dict(options.config, train=train)}
        spec = _spec(options, model, "update", **shape, kind="verify", **settings)
        width = shape["prompt_tokens"] + shape["new_tokens"]
        yield Contest(
            "update", model, shape, [Entrant("ours", spec), *_rivals(options, "update", ("trl", "tunix"), spec)],
            tokens=batch * shape["new_tokens"],
            cost=shapes.update_cost(shapes.read_shape(model), batch, width, shape["new_tokens"], _itemsize(options)),
            bar={"A": 1.5, "B": 1.2}.get(model, 0.0) if options.rivals else 0.0,
        )  # fmt: skip
        decoder = shapes.read_shape(model)
        listed = products.of_update(decoder, batch * width, batch * shape["new_tokens"])
        spec = dict(work="products", model=model, dtype=options.dtype, products=listed)
        yield Contest(
            "products of an update", model, shape,
            [Entrant("ours", spec), *_rivals(options, "products", ("torch",), spec)],
            tokens=batch * shape["new_tokens"], cost=shapes.products_cost(listed),
        )  # fmt: skip


def _update_settings(options: Options) -> dict[str, Any]:
    """Of every update measured here."""
    return dict(has_anchor=True, remat="dots", config=options.config, param_dtype="float32")


def branch(options: Options) -> Iterator[Contest]:
    """An update on merged branches, a distinct trained token, against one on the same responses."""
    for model in options.models or ("A",):
        shape = dict(
            batch=_size(options.batch, 32),
            prompt_tokens=_size(options.prompt_tokens, 32),
            new_tokens=_size(options.new_tokens, 96),
            chunks=4, branches=8, chunk_tokens=8,
        )  # fmt: skip
        spec = _spec(options, model, "update", **shape, repeats_share=0.5, **_update_settings(options))
        for name, has_anchor in (("branch update", False), ("branch update, anchored", True)):
            yield Contest(
                name, model, shape,
                [
                    Entrant("ours", dict(spec, kind="branch", has_anchor=has_anchor)),
                    Entrant("verify update", dict(spec, kind="verify", has_anchor=has_anchor)),
                ],
                tokens=0, cost=None, bar=1 / 1.2,
            )  # fmt: skip


def step(options: Options) -> Iterator[Contest]:
    """Whole steps of a run beside a teacher that is as slow as the devices."""
    for model in options.models or ("A",):
        shape = dict(
            batch=_size(options.batch, 32), prompt_tokens=12, new_tokens=_size(options.new_tokens, 64),
            chunks=4, chunk_tokens=8,
        )  # fmt: skip

        def spec(
            micro_batches: int, rollouts: int, shape: dict[str, int] = shape, model: str = model
        ) -> dict[str, Any]:
            config = _run_config(options, shape, cache="auto")
            config["pipeline"] |= dict(micro_batches=micro_batches, rollouts=rollouts)
            return _spec(options, model, "step", config=config)

        entrants = [
            Entrant("ours", spec(8, 0)),
            Entrant("each part sampled alone", spec(8, 8)),
            Entrant("no overlap", spec(1, 1)),
        ]
        yield Contest("step, slow teacher", model, shape, entrants, tokens=0, cost=None)


def start(options: Options) -> Iterator[Contest]:
    """The first and the second start of one run: what the persistent compilation cache saves."""
    for model in options.models or ("A",):
        shape = dict(batch=_size(options.batch, 8), prompt_tokens=12, new_tokens=_size(options.new_tokens, 32))
        shape |= dict(chunks=2, chunk_tokens=8)
        with tempfile.TemporaryDirectory() as cache:
            spec = _spec(options, model, "start", config=_run_config(options, shape, cache=cache))
            yield Contest(
                "second start, compile time", model, shape,
                [Entrant("first start", spec), Entrant("ours", spec)], tokens=0, cost=None, bar=5.0,
            )  # fmt: skip


def _run_config(options: Options, shape: Mapping[str, int], *, cache: str) -> dict[str, Any]:
    config = {name: dict(value) if isinstance(value, Mapping) else value for name, value in options.config.items()}
    config["rollout"] |= dict(batch_size=shape["batch"], max_new_tokens=shape["new_tokens"])
    config["audit"] |= dict(num_chunks=shape["chunks"], chunk_tokens=shape["chunk_tokens"], num_continuations=4)
    config["train"] |= dict(checkpoint_every=0, audit_log_every=0, compilation_cache=cache)
    config["data"] |= dict(use_chat_template=False)
    return config


def similarity(options: Options) -> Iterator[Contest]:
    """The similarities of one step."""
    shape = dict(batch=_size(options.batch, 32), chunks=10, continuations=10, chunk_tokens=50)
    for name in ("edit", "rouge1"):
        spec = dict(work="similarity", name=name, **shape)
        yield Contest(
            f"similarity {name}", "", shape,
            [Entrant("ours", dict(spec, kind="batch")), Entrant("a pair a call", dict(spec, kind="pairs"))],
            tokens=0, cost=None,
        )  # fmt: skip


SUITES: dict[str, tuple[Callable[[Options], Iterator[Contest]], ...]] = {
    "rollout": (rollout, refill),
    "audit": (audit, anchors),
    "score": (score,),
    "update": (update, branch),
    "step": (step, start),
    "similarity": (similarity,),
}


def contests(suite: str, options: Options) -> Iterator[Contest]:
    """The contests of one suite, or of all.

    Raises:
      InputError: no such suite.
    """
    if suite != "all" and suite not in SUITES:
        raise InputError(f"--suite={suite} is none of {', '.join(SUITES)}, all.")
    for name, parts in SUITES.items():
        if suite in ("all", name):
            for part in parts:
                yield from part(options)


def cache_folder() -> Path:
    """Where rivals' environments and checkpoints are kept."""
    return cache_home() / "bench"
