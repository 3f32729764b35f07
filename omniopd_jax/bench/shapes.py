"""The models and the work that is measured, and how much arithmetic and reading each of them takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.models import DecoderConfig, decoder_config
from omniopd_jax.types import InputError


def _qwen3(hidden: int, layers: int, heads: tuple[int, int, int], mlp: int, vocab: int, *, tied: bool = True) -> dict:
    return dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        intermediate_size=mlp,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _qwen3(64, 2, (4, 2, 16), 128, 512),
    "A": _qwen3(256, 4, (4, 2, 64), 768, 8192),
    "B": _qwen3(512, 8, (8, 4, 64), 1536, 32768),
    "qwen3-0.6b": _qwen3(1024, 28, (16, 8, 128), 3072, 151936),
    "qwen3-1.7b": _qwen3(2048, 28, (16, 8, 128), 6144, 151936),
    "qwen3-4b": _qwen3(2560, 36, (32, 8, 128), 9728, 151936),
    "qwen3-8b": _qwen3(4096, 36, (32, 8, 128), 12288, 151936, tied=False),
}


def read_shape(name: str) -> DecoderConfig:
    """A row of SHAPES, or the config.json of a folder.

    Raises:
      InputError: neither.
    """
    if name in SHAPES:
        return decoder_config(dict(SHAPES[name]))
    path = Path(name) / "config.json"
    if not path.is_file():
        raise InputError(f"--model={name} is neither one of {', '.join(SHAPES)} nor a folder with a config.json.")
    return decoder_config(json.loads(path.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Least arithmetic and memory traffic of a piece of work. Phases follow one another; each has its own bound."""

    phases: tuple[tuple[float, float], ...]  # (floating-point operations, bytes)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.phases)

    def bound_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds below which this machine cannot do it."""
        return sum(max(flops / flops_per_s, size / bytes_per_s) for flops, size in self.phases)


def layer_weights(c: DecoderConfig) -> int:
    """Weights that every token is multiplied with, the output head left out."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    experts = max(c.experts_per_token, 1)
    return c.num_layers * (attention + 3 * experts * c.hidden_size * c.mlp_dim)


def head_weights(c: DecoderConfig) -> int:
    return c.hidden_size * c.vocab_size


def _attention_flops(c: DecoderConfig, keys: float) -> float:
    """Of one query: scores and mix over `keys` keys, all layers."""
    return 4.0 * c.num_layers * c.num_heads * c.head_dim * keys


def rollout_cost(c: DecoderConfig, batch: int, prompt: int, new: int, itemsize: int) -> Cost:
    """Prompts read at once, then one token a row and step; every step reads all weights and the cache so far."""
    weights, head = layer_weights(c), head_weights(c)
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim * itemsize  # bytes a token and row
    prefill = (
        batch * (prompt * (2.0 * weights + _attention_flops(c, prompt / 2)) + 2.0 * head),
        float((weights + head) * itemsize),
    )
    keys = prompt + new / 2
    step = (
        batch * (2.0 * (weights + head) + _attention_flops(c, keys)),
        (weights + head) * itemsize + batch * keys * cached,
    )
    return Cost((prefill, *[step] * (new - 1)))


def update_cost(c: DecoderConfig, batch: int, tokens: int, predicted: int, itemsize: int) -> Cost:
    """Student forward and backward, reference forward, and AdamW over float32 parameters."""
    forward = batch * (
        tokens * (2.0 * layer_weights(c) + _attention_flops(c, tokens / 2)) + predicted * 2.0 * head_weights(c)
    )
    parameters = layer_weights(c) + head_weights(c) * (1 if c.is_tied else 2)
    adamw = (0.0, 7.0 * 4 * parameters)  # gradient, two moments and parameter read; three of them written
    return Cost(((4.0 * forward, float(parameters * itemsize)), adamw))


def products_cost(products: Sequence[Sequence[int]]) -> Cost:
    """Of `products.of_update`: four products a weight."""
    flops = sum(4.0 * 2.0 * rows * inputs * outputs * count for rows, inputs, outputs, count, _ in products)
    return Cost(((flops, 0.0),))


def score_cost(c: DecoderConfig, batch: int, tokens: int, itemsize: int) -> Cost:
    """One product with the output head."""
    return Cost(((2.0 * batch * tokens * head_weights(c), float(head_weights(c) * itemsize)),))


def audit_cost(c: DecoderConfig, prompt: int, response: int, chunks: int, samples: int, length: int, itemsize: int):
    """The response read once, then chunks × samples continuations off its cache."""
    weights, head = layer_weights(c), head_weights(c)
    tokens, rows = prompt + response, chunks * samples
    read = (tokens * (2.0 * weights + _attention_flops(c, tokens / 2)), float(weights * itemsize))
    step = (
        rows * (2.0 * (weights + head) + _attention_flops(c, tokens / 2)),
        float((weights + head) * itemsize),
    )
    return Cost((read, *[step] * length))
