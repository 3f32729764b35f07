"""Model folders in HF layout, both ways: config.json, safetensors (one file or shards with an index).

Reading: each tensor is read once, alone, and written straight into its place in the buffer that becomes the device's
array; the rest of the checkpoint is never in memory. Writing: into a folder beside the destination, which takes the
destination's place only when it is complete.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from omniopd_jax import gathering
from omniopd_jax.models.decoder import Decoder, Model
from omniopd_jax.models.families import DecoderConfig, ModelError, hf_config, read_config
from omniopd_jax.models.folder import TOKENIZER_FILES, copy_files, replace_folder
from omniopd_jax.models.lora import merged
from omniopd_jax.models.parameters import Parameter, leaf, nest, parameter_table
from omniopd_jax.types import PyTree

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_COPIED = ("generation_config.json",)
_READABLE = ("F64", "F32", "F16", "BF16")
_ALIGNMENT = 64  # bytes; jax on CPU takes a host buffer as it is, without a copy, if it is aligned so


def load_model(
    path: str | Path, *, dtype: Any = jnp.float32, compute_dtype: Any = None, shardings: PyTree | None = None
) -> Model:
    """Reads a model folder.

    Args:
      path: folder with config.json and *.safetensors.
      dtype: of the parameters.
      compute_dtype: of activations and matrix products; None: `dtype`.
      shardings: a tree like `Model.params` of `jax.sharding.Sharding`, or one for all; None: the default device.
        Only the parts of a tensor that this process's devices hold are kept.

    Returns:
      The model. On the host its peak is the parameters of this process plus one tensor.

    Raises:
      ModelError: one sentence: no such folder, unknown architecture, missing, surplus or wrongly shaped tensors...
    """
    folder = Path(path)
    config = read_config(folder)
    dtype = jnp.dtype(dtype)
    table = parameter_table(config)
    checkpoint = _Checkpoint(folder)
    _check_names(folder, config, table, checkpoint)
    leaves = {}
    for parameter in table:
        sharding = leaf(shardings, parameter.path) if isinstance(shardings, Mapping) else shardings
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves[parameter.path] = _place(parameter, checkpoint, dtype, sharding)
    _check_tied(folder, config, checkpoint)
    module = Decoder(config, jnp.dtype(compute_dtype or dtype))
    return Model(config=config, module=module, params=nest(leaves))


class _Checkpoint:
    """The tensors of a folder by name. Files are read (`pread`), not mapped: mapped pages would count as memory."""

    def __init__(self, folder: Path):
        self._files = _tensor_files(folder)
        self._handles = {file: _open(file) for file in sorted(set(self._files.values()))}
        held = {file: set(handle.keys()) for file, handle in self._handles.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in self._files.items():
            if name not in held[file]:
                raise ModelError(f"{file} holds no tensor {name}, which {INDEX} says it does.")
            piece = self._handles[file].get_slice(name)
            if piece.get_dtype() not in _READABLE:
                known = ", ".join(_READABLE)
                raise ModelError(f"{file} stores {name} as {piece.get_dtype()}; only {known} can be read.")
            self.shapes[name] = tuple(piece.get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._handles[self._files[name]].get_tensor(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}.") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it."""
    index = folder / INDEX
    if index.is_file():
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a JSON object whose weight_map names each tensor's file.") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ModelError(f"{index} names the shard {file.name}, which is not in {folder}.")
        return files
    single = folder / SINGLE
    if single.is_file():
        return dict.fromkeys(_open(single).keys(), single)
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} holds its weights only as *.bin (pickle, which can run code when read); "
            "convert it to safetensors first, for example with transformers' save_pretrained."
        )
    raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def _listed(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _check_names(folder: Path, config: DecoderConfig, table: list[Parameter], checkpoint: _Checkpoint) -> None:
    wanted = {name: parameter.hf_shape for parameter in table for name in parameter.hf_names().values()}
    missing = [name for name in wanted if name not in checkpoint.shapes]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} tensors of a {config.architecture}: {_listed(missing)}.")
    surplus = [name for name in checkpoint.shapes if name not in wanted and not _is_harmless(name, config)]
    if surplus:
        raise ModelError(
            f"{folder} holds {len(surplus)} tensors that a {config.architecture} does not have: {_listed(surplus)}."
        )
    wrong = [
        f"{name} is {list(checkpoint.shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if checkpoint.shapes[name] != shape
    ]
    if wrong:
        raise ModelError(f"{folder} does not fit its config.json: {_listed(wrong)}.")


def _is_harmless(name: str, config: DecoderConfig) -> bool:
    """Buffers of old checkpoints, and the second copy of a tied head (compared in `_check_tied`)."""
    return name.endswith("rotary_emb.inv_freq") or (config.is_tied and name == "lm_head.weight")


def _check_tied(folder: Path, config: DecoderConfig, checkpoint: _Checkpoint) -> None:
    if config.is_tied and "lm_head.weight" in checkpoint.shapes:
        embedding = checkpoint.read("model.embed_tokens.weight")
        if not np.array_equal(checkpoint.read("lm_head.weight"), embedding):
            raise ModelError(
                f"{folder} holds an lm_head.weight unlike its embedding, but its config.json says "
                "tie_word_embeddings=true; set it to false."
            )


def _place(parameter: Parameter, checkpoint: _Checkpoint, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Reads one parameter's tensors, one at a time, into buffers of exactly the shards that this process holds."""
    shards = sharding.addressable_devices_indices_map(parameter.shape)
    windows = {device: _bounds(index or (), parameter.shape) for device, index in shards.items()}
    buffers = {
        window: _aligned_empty(tuple(stop - start for start, stop in window), dtype) for window in set(windows.values())
    }
    stacked = parameter.num_stacked
    for index, name in parameter.hf_names().items():
        holders = [
            window
            for window in buffers
            if all(start <= i < stop for i, (start, stop) in zip(index, window[:stacked], strict=True))
        ]
        if not holders:
            continue
        tensor = parameter.from_hf(checkpoint.read(name))
        for window in holders:
            own = tuple(slice(start, stop) for start, stop in window[stacked:])
            at = tuple(i - start for i, (start, _) in zip(index, window[:stacked], strict=True))
            buffers[window][at] = tensor[own]
    arrays = [jax.device_put(buffers[window], device) for device, window in windows.items()]
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + num_bytes].view(dtype).reshape(shape)


def save_model(
    path: str | Path,
    model: Model,
    tokenizer: Any = None,
    source: str | Path | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that transformers, vLLM and SGLang open. Adapters are merged into the weights.

    Args:
      path: the folder; one that is there already is replaced, but only once the new one is complete.
      tokenizer: an object with `save_pretrained` (transformers); None: `source`'s tokenizer files are copied.
      source: the folder that the model came from, for its tokenizer and generation_config.json.
      max_shard_bytes: larger checkpoints are split, with an index.

    A model whose arrays lie with several processes is written by process 0; all have to call this.
    """
    destination = Path(path)
    table = parameter_table(model.config)
    tensors = _host_tensors(model, table)
    is_spread = gathering.is_spread((model.params, model.adapters))
    if is_spread and jax.process_index() > 0:
        for _ in tensors:  # each is put together by all processes
            pass
        return

    def write(folder: Path) -> None:
        dtype = str(jax.tree.leaves(model.params)[0].dtype)
        _write_json(folder / "config.json", hf_config(model.config, dtype))
        _write_tensors(folder, model, table, tensors, max_shard_bytes)
        copied = _COPIED if tokenizer is not None else _COPIED + TOKENIZER_FILES
        if source is not None:
            copy_files(Path(source), folder, copied)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    try:
        replace_folder(destination, write)
    finally:
        for _ in tensors if is_spread else ():  # whatever failed here, the other processes go on to the last one
            pass


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path,
    model: Model,
    table: list[Parameter],
    host_tensors: Iterator[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Shards are filled in the table's order; one shard at a time is in host memory."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    total = 0
    for parameter, _, name in _tensors(table):
        itemsize = leaf(model.params, parameter.path).dtype.itemsize
        size = int(np.prod(parameter.hf_shape)) * itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
        total += size
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(itertools.islice(host_tensors, len(group)))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(table: list[Parameter]) -> Iterator[tuple[Parameter, tuple[int, ...], str]]:
    for parameter in table:
        for index, name in parameter.hf_names().items():
            yield parameter, index, name


def _host_tensors(model: Model, table: list[Parameter]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor), one after the other in the table's order."""
    for parameter, index, name in _tensors(table):
        yield name, parameter.to_hf(np.asarray(gathering.whole(merged(model, parameter, index))))
