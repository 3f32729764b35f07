"""Small models with sharp random weights: wrong masks, positions or caches move their logits by whole units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models

VOCAB = 61


def _sharp(values, seed):
    model = models.init_model(models.decoder_config(values), jax.random.key(seed), jnp.float32)
    generator = np.random.default_rng(seed)
    noisy = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.15 * generator.normal(size=leaf.shape), np.float32), model.params
    )
    return model.replace(params=noisy)


_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


@pytest.fixture(scope="session")
def model():
    return _sharp(dict(_SIZES, model_type="qwen3", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True), 0)


@pytest.fixture(scope="session")
def windowed_model():
    """Sliding windows shorter than the tests' sequences, capped logits, and a vocabulary whose head is cut in tiles."""
    values = dict(
        _SIZES,
        vocab_size=128,
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        sliding_window=6,
        final_logit_softcapping=8.0,
        attn_logit_softcapping=20.0,
        query_pre_attn_scalar=8,
    )
    return _sharp(values, 1)
