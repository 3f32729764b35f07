"""One tiny world for the room: a word-level tokenizer, a student of a few thousand parameters, a config."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from omniopd_jax import models
from omniopd_jax.config import Config, from_mapping
from omniopd_jax.data import load_tokenizer
from omniopd_jax.teacher.protocol import Continuation
from omniopd_jax.teacher.scripted import ScriptedTeacher
from omniopd_jax.worlds import arithmetic


def tiny_model(vocab_size: int = 40, seed: int = 0) -> models.Model:
    """A two-layer Qwen3 whose weights come from numpy, so that no change of jax's random bits moves them."""
    config = models.decoder_config(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 64,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        }
    )
    rng = np.random.default_rng(seed)
    model = models.init_model(config, jax.random.key(0))
    return model.replace(
        params=jax.tree.map(
            lambda leaf: jax.numpy.asarray(np.asarray(leaf) * 0 + rng.normal(0, 0.2, leaf.shape), leaf.dtype),
            model.params,
        )
    )


def tiny_config(**overrides: object) -> Config:
    """configs/base.py at the room's sizes; `overrides` are {"section.knob": value}."""
    config = base.get_config()
    config.rollout.update(batch_size=8, max_new_tokens=24)
    config.audit.update(num_chunks=2, chunk_tokens=4, num_continuations=2)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
    config.train.update(steps=6, checkpoint_every=3, compilation_cache="off")
    config.update_from_flattened_dict(overrides)
    return from_mapping(config)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file of JSON objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def make_config():
    return tiny_config


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    arithmetic.save_tokenizer(str(folder))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def prompts():
    problems = arithmetic.problems(np.random.default_rng(0), 30, 1)
    return [problem.prompt(f"p{i}") for i, problem in enumerate(problems)]


@pytest.fixture
def teacher():
    """Says one of two things, by the request's seed."""

    def answer(request):
        texts = ("add 1 and 2 with 0 gives", "7 plus 5 makes 1 2")
        return [Continuation(texts[(request.seed + i) % 2], "length") for i in range(request.n)]

    return ScriptedTeacher(answer)
