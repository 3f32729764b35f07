"""config.json of the families we know → one frozen decoder config.

A family is a row of `FAMILIES`: the values that transformers takes when config.json does not name them, and how its
fields map to the decoder's. Everything else (weights' names too) follows from the decoder config.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omniopd_jax.models.rope import KINDS, Rope, yarn_attention_factor
from omniopd_jax.types import InputError


class ModelError(InputError):
    """A model folder or config that cannot be used; the message says what is wrong and what would be right."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes the computation of a decoder-only transformer. Hashable: a jit constant.

    Tuples suffixed `_L` hold one entry a layer.
    """

    architecture: str  # name in config.json, e.g. Qwen3ForCausalLM
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    mlp_dim: int  # width of the feed-forward layer, or of one expert
    norm_eps: float
    activation: str  # silu | gelu_tanh
    is_tied: bool  # the output head is the embedding
    ropes: tuple[Rope, ...]
    rope_index_L: tuple[int, ...]  # which of `ropes` a layer uses
    window_L: tuple[int, ...]  # tokens that a query sees, itself included; 0: all before it
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    qk_norm: str = "none"  # none | head (each head apart) | full (all heads together)
    norm_placement: str = "pre"  # pre | post | both: norms around attention and feed-forward
    norm_offset: float = 0.0  # added to the norms' scales (Gemma stores scale − 1)
    embedding_scale: float = 1.0
    attention_scale: float = 0.0  # multiplies q·k
    attention_softcap: float | None = None
    final_logit_softcap: float | None = None
    num_experts: int = 0  # 0: a plain feed-forward layer
    experts_per_token: int = 0
    is_topk_normalised: bool = False  # expert weights of a token sum to 1
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    max_positions: int = 0  # length that the model was made for, tokens
    source: str = dataclasses.field(default="{}", repr=False)  # config.json as it was read, JSON text


@dataclasses.dataclass(frozen=True)
class Family:
    model_type: str
    defaults: Mapping[str, Any]  # what transformers assumes where config.json is silent
    fields: Callable[[dict[str, Any]], dict[str, Any]]  # values of the decoder config beyond the common ones


def _window_pattern(values: dict[str, Any]) -> tuple[int, ...]:
    """Windows from `layer_types`, with 0 on full-attention layers."""
    window = values["sliding_window"] or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in values["layer_types"])


def _late_windows(values: dict[str, Any]) -> tuple[int, ...]:
    """Qwen2 and Qwen3: windows only if asked for, and then from layer `max_window_layers` on."""
    if not values["use_sliding_window"] or not values["sliding_window"]:
        return (0,) * values["num_hidden_layers"]
    if values.get("layer_types") is None:
        first = values["max_window_layers"]
        values["layer_types"] = [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(values["num_hidden_layers"])
        ]
    return _window_pattern(values)


def _qwen2(values: dict[str, Any]) -> dict[str, Any]:
    return dict(has_qkv_bias=True, window_L=_late_windows(values))


def _qwen3(values: dict[str, Any]) -> dict[str, Any]:
    bias = values["attention_bias"]
    return dict(has_qkv_bias=bias, has_o_bias=bias, qk_norm="head", window_L=_late_windows(values))


def _qwen3_moe(values: dict[str, Any]) -> dict[str, Any]:
    if values["mlp_only_layers"] or values["decoder_sparse_step"] != 1:
        raise ModelError(
            "config.json mixes dense and routed layers (mlp_only_layers, decoder_sparse_step); "
            "only models whose layers are all routed can be read."
        )
    bias = values["attention_bias"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    return dict(
        has_qkv_bias=bias,
        has_o_bias=bias,
        qk_norm="head",
        window_L=(window or 0,) * values["num_hidden_layers"],
        mlp_dim=values["moe_intermediate_size"],
        num_experts=values.get("num_experts") or values.get("num_local_experts") or 128,
        experts_per_token=values["num_experts_per_tok"],
        is_topk_normalised=values["norm_topk_prob"],
    )


def _llama(values: dict[str, Any]) -> dict[str, Any]:
    bias = values["attention_bias"]
    return dict(has_qkv_bias=bias, has_o_bias=bias, has_mlp_bias=values["mlp_bias"])


def _mistral(values: dict[str, Any]) -> dict[str, Any]:
    return dict(window_L=(values["sliding_window"] or 0,) * values["num_hidden_layers"])


def _smollm3(values: dict[str, Any]) -> dict[str, Any]:
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    has_rope = values.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    if values.get("layer_types") is None:
        values["layer_types"] = ["full_attention" if flag else "sliding_attention" for flag in has_rope]
    windows = _window_pattern(values) if values["use_sliding_window"] else (0,) * layers
    bias = values["attention_bias"]
    return dict(
        has_qkv_bias=bias,
        has_o_bias=bias,
        has_mlp_bias=values["mlp_bias"],
        window_L=windows,
        ropes=(_rope(values, values), Rope(kind="none")),
        rope_index_L=tuple(0 if flag else 1 for flag in has_rope[:layers]),
    )


def _gemma(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        raise ModelError("config.json asks for bidirectional attention; only causal models can be read.")
    bias = values["attention_bias"]
    return dict(
        has_qkv_bias=bias,
        has_o_bias=bias,
        norm_placement="both",
        norm_offset=1.0,
        embedding_scale=values["hidden_size"] ** 0.5,
        attention_scale=values["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=values["attn_logit_softcapping"],
        final_logit_softcap=values["final_logit_softcapping"],
    )


def _gemma2(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("layer_types") is None:
        values["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in _layers(values)]
    return _gemma(values) | dict(window_L=_window_pattern(values))


def _gemma3(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("layer_types") is None:
        every = values["sliding_window_pattern"]
        values["layer_types"] = [
            "sliding_attention" if (layer + 1) % every else "full_attention" for layer in _layers(values)
        ]
    nested = values.get("rope_parameters") or {}
    # the older spelling: rope_theta and rope_scaling are the full layers', rope_local_base_freq the sliding ones'
    full = (
        {"rope_theta": values["rope_theta"]} | (values.get("rope_scaling") or {}) | (nested.get("full_attention") or {})
    )
    local = {"rope_theta": values["rope_local_base_freq"]} | (nested.get("sliding_attention") or {})
    return _gemma(values) | dict(
        qk_norm="head",
        window_L=_window_pattern(values),
        ropes=(_rope(full, values), _rope(local, values)),
        rope_index_L=tuple(int(kind == "sliding_attention") for kind in values["layer_types"]),
    )


def _olmo2(values: dict[str, Any]) -> dict[str, Any]:
    bias = values["attention_bias"]
    return dict(has_qkv_bias=bias, has_o_bias=bias, qk_norm="full", norm_placement="post")


def _layers(values: dict[str, Any]) -> range:
    return range(values["num_hidden_layers"])


_COMMON = dict(
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_theta=10_000.0,
    max_position_embeddings=32_768,
    attention_bias=False,
    mlp_bias=False,
)
_QWEN = _COMMON | dict(num_key_value_heads=32, use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_GEMMA = _COMMON | dict(
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
FAMILIES = {
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, _qwen2),
    "Qwen3ForCausalLM": Family("qwen3", _QWEN | dict(head_dim=128), _qwen3),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        _QWEN
        | dict(
            num_key_value_heads=4,
            mlp_only_layers=(),
            decoder_sparse_step=1,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        _qwen3_moe,
    ),
    "LlamaForCausalLM": Family("llama", _COMMON | dict(max_position_embeddings=2048), _llama),
    "MistralForCausalLM": Family(
        "mistral",
        _COMMON | dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072),
        _mistral,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        _COMMON
        | dict(
            rope_theta=2_000_000.0,
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layer_interval=4,
            num_key_value_heads=4,
        ),
        _smollm3,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=8192),
        _gemma2,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            sliding_window_pattern=6,
            max_position_embeddings=131_072,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
        ),
        _gemma3,
    ),
    "Olmo2ForCausalLM": Family("olmo2", _COMMON | dict(rms_norm_eps=1e-5, max_position_embeddings=2048), _olmo2),
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ADAPTER_CONFIG = "adapter_config.json"  # peft's, in a folder of adapters without their base
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads `folder`/config.json.

    Raises:
      ModelError: no such folder or file, not JSON, or a model that we do not know.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; a model folder holds config.json and *.safetensors.")
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{folder} holds a LoRA adapter ({ADAPTER_CONFIG}) and no model; merge it into its base model first, "
                "for example with peft's merge_and_unload, or train with lora.export='merged'."
            )
        raise ModelError(f"{folder} holds no config.json; a model folder holds config.json and *.safetensors.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not an object of settings.")
    return decoder_config(values)


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder config of a config.json's content, in the older spelling (`rope_theta`, `rope_scaling`) or the
    newer one (`rope_parameters`, also nested by layer type).

    Raises:
      ModelError: an unknown architecture (the message lists those we know), a missing field, a feature that would be
        computed wrongly.
    """
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(f"config.json names the architecture {architecture!r}; those known here are {known}.")
    family = FAMILIES[architecture]
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise ModelError(f"config.json has no {missing[0]}, which a {architecture} needs.")
    if values.get("quantization_config"):
        raise ModelError("config.json describes quantised weights (quantization_config); only plain ones can be read.")
    filled = dict(family.defaults) | dict(values)
    heads, layers = filled["num_attention_heads"], filled["num_hidden_layers"]
    head_dim = filled.get("head_dim") or filled["hidden_size"] // heads
    if head_dim % 2:
        raise ModelError(f"config.json gives heads of {head_dim} dimensions; rope needs an even number.")
    kv_heads = filled.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(f"config.json gives {heads} heads, which num_key_value_heads={kv_heads} does not divide.")
    activation = filled.get("hidden_activation") or filled["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ModelError(f"config.json asks for the activation {activation!r}; known are {', '.join(_ACTIVATIONS)}.")
    fields = dict(
        architecture=architecture,
        vocab_size=filled["vocab_size"],
        hidden_size=filled["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=filled["intermediate_size"],
        norm_eps=float(filled["rms_norm_eps"]),
        activation=_ACTIVATIONS[activation],
        is_tied=bool(filled["tie_word_embeddings"]),
        rope_index_L=(0,) * layers,
        window_L=(0,) * layers,
        attention_scale=head_dim**-0.5,
        eos_token_ids=_token_ids(filled.get("eos_token_id")),
        bos_token_id=filled.get("bos_token_id"),
        pad_token_id=filled.get("pad_token_id"),
        max_positions=filled["max_position_embeddings"],
        source=json.dumps(dict(values, model_type=family.model_type), sort_keys=True),
    ) | family.fields(filled)
    if "ropes" not in fields:
        fields["ropes"] = (_rope(filled, filled),)
    return DecoderConfig(**fields)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rope(rope_values: Mapping[str, Any], values: Mapping[str, Any]) -> Rope:
    """Reads one rope; `rope_values` may be the whole config (older or newer spelling) or one nested entry."""
    settings = dict(rope_values)
    settings |= rope_values.get("rope_scaling") or {}
    settings |= rope_values.get("rope_parameters") or {}
    nested = [name for name in ("full_attention", "sliding_attention") if name in settings]
    if nested:
        raise ModelError(f"config.json nests rope_parameters by layer type ({nested[0]}), unlike this architecture.")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in KINDS or kind == "none":
        known = ", ".join(name for name in KINDS if name != "none")
        raise ModelError(f"config.json asks for rope of type {kind!r}; known are {known}.")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            "config.json rotates only a part of each head (partial_rotary_factor), which is not known here."
        )
    rope = Rope(kind=kind, theta=float(settings.get("rope_theta") or values["rope_theta"]))
    if kind == "default":
        return rope
    length_names = ("original_max_position_embeddings", "max_position_embeddings")
    original_length = values.get(length_names[0]) or settings.get(length_names[0]) or values[length_names[1]]
    factor = settings.get("factor")
    if factor is None and kind == "yarn":
        factor = values["max_position_embeddings"] / original_length
    if factor is None:
        raise ModelError(f"config.json asks for rope of type {kind!r} without its factor.")
    rope = dataclasses.replace(rope, factor=float(factor), original_length=int(original_length))
    if kind == "llama3":
        missing = [name for name in ("low_freq_factor", "high_freq_factor") if settings.get(name) is None]
        if missing:
            raise ModelError(f"config.json asks for rope of type 'llama3' without its {missing[0]}.")
        return dataclasses.replace(
            rope,
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
        )
    if kind == "yarn":
        attention_factor = settings.get("attention_factor")
        if attention_factor is None:
            attention_factor = yarn_attention_factor(
                rope.factor, settings.get("mscale") or 0.0, settings.get("mscale_all_dim") or 0.0
            )
        return dataclasses.replace(
            rope,
            beta_fast=float(settings.get("beta_fast") or 32.0),
            beta_slow=float(settings.get("beta_slow") or 1.0),
            attention_factor=float(attention_factor),
            truncate=settings.get("truncate", True),
        )
    return rope


def hf_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json to be written: what was read, with the dtype of the weights beside it."""
    values = json.loads(config.source)
    values.pop("torch_dtype", None)
    return values | {"dtype": dtype}
