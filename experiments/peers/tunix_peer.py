"""Tunix's contestants: its Sampler and its DistillationTrainer.

Runs in the virtual environment of tunix.txt; knows nothing of ours but the protocol.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params

from omniopd_jax.bench.protocol import Spec, Work, serve

_compiled = [0]


def _count(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


class _NumberedWords:
    """Token i is written "w<i>"; costs next to nothing, so that sampling is what is measured."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def _work(run: Any) -> Work:
    device = jax.devices()[0]

    def memory() -> tuple[int, int]:
        stats = device.memory_stats() or {}
        return stats.get("bytes_in_use", 0), stats.get("peak_bytes_in_use", 0)

    versions = {name: metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    about = {"versions": versions, "device": device.device_kind}
    return Work(run, about=about, counter=lambda: _compiled[0], memory=None if device.platform == "cpu" else memory)


def _model(spec: Spec) -> tuple[qwen3.ModelConfig, Any, jax.sharding.Mesh]:
    values = json.loads((Path(spec["folder"]) / "config.json").read_text())
    theta = values.get("rope_theta") or values["rope_parameters"]["rope_theta"]
    dtype = jnp.dtype(spec["dtype"])
    config = qwen3.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=int(theta),
        norm_eps=values["rms_norm_eps"],
        use_tied_embedding=values["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=jnp.dtype(spec.get("param_dtype", spec["dtype"])),
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = qwen3_params.create_model_from_safe_tensors(spec["folder"], config, mesh, dtype=config.param_dtype)
    return config, model, mesh


def _rollout(spec: Spec) -> Work:
    from tunix.generate import sampler as samplers

    config, model, mesh = _model(spec)
    cache = samplers.CacheConfig(
        cache_size=spec["prompt_tokens"] + spec["new_tokens"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = samplers.Sampler(model, _NumberedWords(), cache)
    shape = (spec["batch"], spec["prompt_tokens"])
    rows = np.random.default_rng(0).integers(2, config.vocab_size, shape)
    texts = [" ".join(f"w{token}" for token in row) for row in rows]

    def run() -> None:
        with mesh:
            out = sampler(
                texts,
                max_generation_steps=spec["new_tokens"],
                max_prompt_length=spec["prompt_tokens"],
                temperature=1.0,
                top_p=1.0,
                seed=0,
                forbidden_tokens=(0, 1),  # neither padding nor a stop: nothing ends early
            )
        assert min(len(tokens) for tokens in out.tokens) == spec["new_tokens"]

    return _work(run)


def _update(spec: Spec) -> Work:
    from tunix.distillation import distillation_trainer, strategies

    config, student, mesh = _model(spec)
    _, teacher, _ = _model(spec)
    width = spec["prompt_tokens"] + spec["new_tokens"]
    tokens = np.random.default_rng(0).integers(2, config.vocab_size, (spec["batch"], width)).astype(np.int32)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    causal = jnp.broadcast_to(jnp.tri(width, dtype=bool), (spec["batch"], width, width))

    def forward(model: Any, input_tokens: Any, input_mask: Any) -> Any:
        del input_mask
        logits, _ = model(input_tokens, positions, None, causal)
        return logits

    def labels(input_tokens: Any, input_mask: Any) -> Any:
        del input_mask
        return jax.nn.one_hot(input_tokens, config.vocab_size)

    strategy = strategies.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    with mesh:
        trainer = distillation_trainer.DistillationTrainer(
            student,
            teacher,
            strategy,
            optimizer,
            distillation_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=None),
        )
    batch = distillation_trainer.TrainingInput(input_tokens=jnp.asarray(tokens), input_mask=jnp.ones_like(tokens))
    # The trainer's own compiled step, without its progress bar and logs.
    compiled, _ = trainer.jit_train_and_eval_step()

    def run() -> None:
        with mesh:
            loss, *_ = compiled(trainer._prepare_inputs(batch))
        jax.block_until_ready(loss)
        jax.block_until_ready(jax.tree.leaves(jax.tree.map(lambda x: x, trainer.model.embedder.input_embedding[...])))

    return _work(run)


def prepare(spec: Spec) -> Work:
    jax.monitoring.register_event_duration_secs_listener(_count)
    return {"rollout": _rollout, "update": _update}[spec["work"]](spec)


if __name__ == "__main__":
    serve(prepare)
