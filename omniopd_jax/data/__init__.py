"""Prompts and text: what goes into a run, and its way between text and tokens."""

from omniopd_jax.data.prompts import PromptError, PromptStream, pad_prompts, read_prompts
from omniopd_jax.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

__all__ = [
    "PromptError",
    "PromptStream",
    "Tokenizer",
    "TokenizerError",
    "load_tokenizer",
    "pad_prompts",
    "read_prompts",
]
