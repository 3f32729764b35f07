"""Random weights and a tokenizer of numbered words in HF layout, so that every library reads the same model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from omniopd_jax import models
from omniopd_jax.bench.shapes import read_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i is the word "w<i>"; 0 is padding, 1 the end of a response."""
    from tokenizers import Tokenizer, pre_tokenizers  # fmt: skip
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    backend = Tokenizer(kinds.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def ensure_checkpoint(folder: Path, model: str, dtype: str) -> Path:
    """The folder of a row of SHAPES with random weights; written, where it is not there, by a process of its own.

    The process that leads the contests must not hold a device.
    """
    path = folder / f"{model}-{dtype}"
    if not (path / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "omniopd_jax.bench.checkpoint", str(path), model, dtype], check=True)
    return path


def _write(path: Path, model: str, dtype: str) -> None:
    config = read_shape(model)
    weights = models.init_model(config, jax.random.key(0), jnp.dtype(dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save_model(path, weights, word_tokenizer(config.vocab_size))


if __name__ == "__main__":
    _write(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
