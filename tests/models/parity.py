"""The models that are compared with transformers: one tiny config a family and a rope, with sharp random weights.

Weights are transformers' initial ones plus noise of 0.2: attention is then so sharp that a wrong rope base, window,
scale or norm shows as an error of several nats, while float32 rounding stays below 1e-4.

    python -m tests.models.parity          # prints the table of docs/models.md (needs torch and transformers)
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omniopd_jax import models
from omniopd_jax.models import decoder
from omniopd_jax.models.families import FAMILIES
from omniopd_jax.models.parameters import nest, parameter_table

_SMALL = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GEMMA = _SMALL | dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=5)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    values: dict[str, Any]
    covers: str  # what of the family the case exercises


CASES = (
    Case(
        "Qwen2 / 2.5",
        "qwen2",
        _SMALL | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1, rope_theta=1_000_000.0),
        "q/k/v biases, windows from a layer on, untied head",
    ),
    Case(
        "Qwen3",
        "qwen3",
        _SMALL | dict(head_dim=16, tie_word_embeddings=True, rope_theta=5_000_000.0),
        "q/k norm, head width apart from D / H, tied head",
    ),
    Case(
        "Qwen3-MoE",
        "qwen3_moe",
        _SMALL | dict(head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True),
        "routed experts, top-k, normalised weights",
    ),
    Case(
        "Llama 3 / 3.1 / 3.2",
        "llama",
        _SMALL
        | dict(
            tie_word_embeddings=True,
            rope_theta=500_000.0,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        "llama3 rope beyond its original length, tied head",
    ),
    Case("Mistral", "mistral", _SMALL | dict(sliding_window=6, head_dim=16), "sliding window on every layer"),
    Case(
        "SmolLM2",
        "llama",
        _SMALL | dict(tie_word_embeddings=True, rope_theta=100_000.0, attention_bias=True, mlp_bias=True),
        "Llama layout with every bias",
    ),
    Case("SmolLM3", "smollm3", _SMALL | dict(no_rope_layer_interval=2, rope_theta=2_000_000.0), "layers without rope"),
    Case("Gemma 2", "gemma2", _GEMMA, "soft-caps, alternating windows, query scale, norms before and after"),
    Case(
        "Gemma 3 (text)",
        "gemma3_text",
        _GEMMA
        | dict(
            sliding_window_pattern=2,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
        "two rope bases, linear scaling on full layers, q/k norm, windows",
    ),
    Case("OLMo 2", "olmo2", _SMALL | dict(rope_theta=500_000.0), "norms after only, q/k norm over all heads"),
    Case(
        "Qwen3, yarn",
        "qwen3",
        _SMALL
        | dict(
            head_dim=16,
            rope_theta=1_000_000.0,
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        ),
        "yarn rope beyond its original length",
    ),
    Case(
        "Llama, linear",
        "llama",
        _SMALL | dict(rope_scaling=dict(type="linear", factor=4.0), num_key_value_heads=1, head_dim=24),
        "linear rope in the oldest spelling, one key head",
    ),
)
BATCH, LENGTH, PROMPT = 4, 24, 14
# XLA's CPU back end at its lowest level: the same graph and the same numbers to rounding, half the time to compile
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def case_config(case: Case) -> models.DecoderConfig:
    """The case as our reader sees a config.json in the older spelling."""
    architecture = next(name for name, family in FAMILIES.items() if family.model_type == case.model_type)
    return models.decoder_config(copy.deepcopy(case.values) | {"architectures": [architecture]})


def tiny_model(name: str, **changes: Any) -> models.Model:
    """A case's model with sharp random weights, without transformers."""
    case = next(case for case in CASES if case.name == name)
    config = case_config(dataclasses.replace(case, values=case.values | changes))
    rng = np.random.default_rng(1)
    leaves = {}
    for row in parameter_table(config):
        values = row.mean + np.hypot(row.std, 0.2) * rng.standard_normal(row.shape)
        leaves[row.path] = jnp.asarray(values, jnp.float32)
    return models.Model(config=config, module=decoder.Decoder(config), params=nest(leaves))


def tokens_and_mask() -> tuple[np.ndarray, np.ndarray]:
    """Four rows: full, left-padded, right-padded, both. Longer than every window and every original rope length."""
    tokens = np.random.default_rng(0).integers(3, _SMALL["vocab_size"], (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, :7] = False
    mask[2, 19:] = False
    mask[3, :3] = mask[3, 20:] = False
    return tokens, mask


def branch_tokens_and_mask(rows: int, slots: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """[rows, slots, width] branches of `tokens_and_mask`: a short one in every row, an empty slot in the first."""
    tokens = np.random.default_rng(3).integers(3, _SMALL["vocab_size"], (rows, slots, width))
    mask = np.ones((rows, slots, width), bool)
    mask[:, 1, 2:] = False
    mask[0, 2] = False
    return tokens, mask


def write_reference(case: Case, folder: Path) -> Any:
    """Makes transformers' model of the case, saves it to `folder` and returns it (float32, eval mode)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.for_model(case.model_type, **copy.deepcopy(case.values))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def reference_logprobs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """log-probabilities [B, S, V] of a transformers model, float32."""
    import torch

    with torch.no_grad():
        logits = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits
    return torch.log_softmax(logits.float(), dim=-1).numpy()


@quick_jit
def our_logprobs(model: models.Model, tokens: Any, mask: Any) -> jax.Array:
    return jax.nn.log_softmax(models.logits(model, tokens, mask))


@quick_jit
def decoded_hidden(model: models.Model, tokens: Any, mask: Any) -> jax.Array:
    """Hidden states of columns [PROMPT, S), each column decoded over the cache of those before it."""
    _, cache = models.read(model, tokens[:, :PROMPT], mask[:, :PROMPT], cache_length=tokens.shape[1])
    stepper = models.for_decoding(model)

    def step(cache: models.KVCache, column: Any) -> tuple[models.KVCache, Any]:
        hidden, cache = models.decode(stepper, column[0], cache, is_real_B=column[1])
        return cache, hidden

    _, hidden = jax.lax.scan(step, cache, (tokens[:, PROMPT:].T, mask[:, PROMPT:].T))
    return hidden.swapaxes(0, 1)


def errors(ours: Any, theirs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Absolute differences at the real positions."""
    return np.abs(np.asarray(ours) - theirs)[mask]


def main() -> None:
    import torch

    tokens, mask = tokens_and_mask()
    print(
        "| family | covered by the check | float32, max | bf16, max | bf16, mean | transformers' own bf16, max | mean |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            theirs = write_reference(case, Path(folder))
            truth = reference_logprobs(theirs, tokens, mask)
            exact = errors(our_logprobs(models.load_model(folder), tokens, mask), truth, mask)
            short = errors(our_logprobs(models.load_model(folder, dtype=jnp.bfloat16), tokens, mask), truth, mask)
            their_short = errors(reference_logprobs(theirs.to(torch.bfloat16), tokens, mask), truth, mask)
        print(
            f"| {case.name} | {case.covers} | {exact.max():.0e} | {short.max():.2f} | {short.mean():.3f} "
            f"| {their_short.max():.2f} | {their_short.mean():.3f} |"
        )


if __name__ == "__main__":
    main()
