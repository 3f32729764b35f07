"""Shapes of well-known students, so that a run can be planned before anything is downloaded.

Values of the published config.json files (huggingface.co/Qwen/Qwen3-0.6B, -1.7B, -4B, -8B), as of their first release;
Qwen3-4B's and Qwen3-1.7B's chat templates and tokenizers do not matter here.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from omniopd_jax import models
from omniopd_jax.config import ConfigError
from omniopd_jax.models import DecoderConfig

_QWEN3 = dict(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=151936,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1_000_000,
    max_position_embeddings=40960,
    attention_bias=False,
    use_sliding_window=False,
    bos_token_id=151643,
    eos_token_id=151645,
)


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, is_tied: bool) -> dict:
    return _QWEN3 | dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=is_tied,
    )


PUBLISHED = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, is_tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, is_tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, is_tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, is_tied=False),
}


def find_student(name: str, path: str) -> DecoderConfig:
    """The decoder of `--student=NAME`, else of the folder `path`, else of the published model that the path ends in.

    Raises:
      ConfigError: no such name; or no folder there and no published model of that name.
      ModelError: the folder's config.json cannot be used.
    """
    if name:
        if name.lower() not in PUBLISHED:
            nearest = difflib.get_close_matches(name.lower(), PUBLISHED, n=1, cutoff=0.0)
            raise ConfigError(
                f"--student={name!r} is not known; did you mean {nearest[0]}? Known are {', '.join(PUBLISHED)}."
            )
        return models.decoder_config(PUBLISHED[name.lower()])
    if path and Path(path).is_dir():
        return models.read_config(path)
    guess = Path(path).name.lower()
    if guess in PUBLISHED:
        return models.decoder_config(PUBLISHED[guess])
    raise ConfigError(
        f"config.student.path={path!r} is no folder here; --student names a published model instead "
        f"({', '.join(PUBLISHED)})."
    )
