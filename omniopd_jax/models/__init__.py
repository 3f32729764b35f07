"""One decoder for every common family, its files in HF layout, and its adapters."""

from omniopd_jax.models.decoder import (
    Model,
    decode,
    decode_branches,
    decoding_head,
    for_decoding,
    init_model,
    laid_out_for_decoding,
    logical_axes,
    logits,
    open_branches,
    read,
    read_tree,
    unembedding,
    with_kernel,
)
from omniopd_jax.models.families import DecoderConfig, ModelError, decoder_config, read_config
from omniopd_jax.models.hf_weights import load_model, save_model
from omniopd_jax.models.kernels import Kernel, kernel_of
from omniopd_jax.models.kv_cache import BranchCache, KVCache
from omniopd_jax.models.lora import add_adapters, merge, save_adapters

__all__ = [
    "BranchCache",
    "DecoderConfig",
    "KVCache",
    "Kernel",
    "Model",
    "ModelError",
    "add_adapters",
    "decode",
    "decode_branches",
    "decoder_config",
    "decoding_head",
    "for_decoding",
    "init_model",
    "kernel_of",
    "laid_out_for_decoding",
    "load_model",
    "logical_axes",
    "logits",
    "merge",
    "open_branches",
    "read",
    "read_config",
    "read_tree",
    "save_adapters",
    "save_model",
    "unembedding",
    "with_kernel",
]
