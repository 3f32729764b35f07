"""Model folders: shards, what is wrong with a folder, whole writes, memory. Bit-for-bit round trips: parity_test.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omniopd_jax import models
from tests.models import parity


@pytest.fixture(scope="module")
def model():
    return parity.tiny_model("Qwen3")


@pytest.fixture
def folder(model, tmp_path):
    models.save_model(tmp_path / "model", model)
    return tmp_path / "model"


def test_shards_with_an_index_hold_the_same_tensors(model, folder, tmp_path):
    sharded = tmp_path / "sharded"
    models.save_model(sharded, model, max_shard_bytes=30_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert all((sharded / file).stat().st_size < 40_000 for file in files)
    together = {}
    for file in files:
        together |= load_file(sharded / file)
    single = load_file(folder / "model.safetensors")
    assert together.keys() == single.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in single.values())
    again = models.load_model(sharded)
    assert again.module == model.module.clone(config=again.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_dtypes_are_separate_knobs(folder):
    loaded = models.load_model(folder, dtype=jnp.float32, compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    hidden, cache = models.read(loaded, jnp.ones((1, 2), int), jnp.ones((1, 2), bool), cache_length=3)
    assert hidden.dtype == cache.k[0].dtype == models.unembedding(loaded).dtype == jnp.bfloat16
    halves = models.load_model(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(halves.params)} == {jnp.dtype(jnp.bfloat16)}
    models.save_model(folder.parent / "halves", halves)
    assert json.loads((folder.parent / "halves" / "config.json").read_text())["dtype"] == "bfloat16"


def _tensors(folder):
    return load_file(folder / "model.safetensors")


def _rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_named(folder):
    tensors = _tensors(folder)
    del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["model.norm.weight"]
    _rewrite(folder, tensors)
    with pytest.raises(models.ModelError, match=r"lacks 2 tensors of a Qwen3.*layers\.1\.self_attn\.q_proj.*norm"):
        models.load_model(folder)


def test_surplus_tensors_are_named(folder):
    _rewrite(folder, _tensors(folder) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)})
    with pytest.raises(models.ModelError, match=r"holds 1 tensors that a Qwen3.*layers\.0\.self_attn\.q_proj\.bias"):
        models.load_model(folder)


def test_wrongly_shaped_tensors_are_named_with_both_shapes(folder):
    _rewrite(folder, _tensors(folder) | {"model.norm.weight": np.zeros(7, np.float32)})
    with pytest.raises(models.ModelError, match=r"model\.norm\.weight is \[7\] instead of \[48\]"):
        models.load_model(folder)


def test_old_buffers_and_the_copy_of_a_tied_head_are_harmless_unless_they_differ(folder, model):
    tensors = _tensors(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    _rewrite(folder, tensors)
    jax.tree.map(np.testing.assert_array_equal, models.load_model(folder).params, model.params)
    tensors["lm_head.weight"][3, 3] += 1
    _rewrite(folder, tensors)
    with pytest.raises(models.ModelError, match="tie_word_embeddings=true; set it to false"):
        models.load_model(folder)


def test_quantised_tensors_are_refused(folder):
    _rewrite(folder, _tensors(folder) | {"model.norm.weight": np.zeros(48, np.int8)})
    with pytest.raises(models.ModelError, match=r"model\.norm\.weight as I8"):
        models.load_model(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(models.ModelError, match=r"pickle.*convert it to safetensors"):
        models.load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(models.ModelError, match=r"holds neither model\.safetensors nor"):
        models.load_model(folder)


def test_a_broken_file_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(models.ModelError, match=r"model\.safetensors is not a readable safetensors file"):
        models.load_model(folder)


def test_an_index_that_names_an_absent_shard(model, tmp_path):
    models.save_model(tmp_path / "m", model, max_shard_bytes=30_000)
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(models.ModelError, match=f"names the shard {shard.name}"):
        models.load_model(tmp_path / "m")


def test_small_files_travel_with_the_model(model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(name)
    models.save_model(tmp_path / "out", model, source=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }

    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("the object's own")

    models.save_model(tmp_path / "out", model, Tokenizer(), source=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the object's own"
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_write_that_fails_leaves_the_old_model_and_nothing_else(model, folder):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    before = _tensors(folder)
    with pytest.raises(OSError, match="disk full"):
        models.save_model(folder, model, Tokenizer())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert all(np.array_equal(tensor, before[name]) for name, tensor in _tensors(folder).items())


_MEMORY_SCRIPT = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
from omniopd_jax import models

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

folder, dtype = sys.argv[1:]
if len(jax.devices()) > 1:
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    place = dict(embed="a", mlp="b", kv_heads="b", vocab="b")
    plain = models.load_model(folder)
    axes = models.logical_axes(plain)
    shardings = jax.tree.map(
        lambda names: jax.sharding.NamedSharding(mesh, P(*(place.get(name) for name in names))),
        axes, is_leaf=lambda x: isinstance(x, tuple))
    sharded = models.load_model(folder, shardings=shardings)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), sharded.params, plain.params)
    assert jax.tree.map(lambda x: x.sharding, sharded.params) == shardings
    kernel = sharded.params["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    print(json.dumps("sharded"))
else:
    jnp.ones(3).block_until_ready()
    before = peak()
    model = models.load_model(folder, dtype=jnp.dtype(dtype))
    jax.block_until_ready(model.params)
    print(json.dumps(dict(peak=peak() - before, parameters=sum(x.nbytes for x in jax.tree.leaves(model.params)))))
"""


def _in_a_fresh_process(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, *map(str, arguments)],
        env=dict(os.environ, JAX_PLATFORMS="cpu", **environment),
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_host_memory_stays_under_the_parameters_and_two_tensors(tmp_path):
    """200 MB of bfloat16, read as it is: the peak of the process's resident memory while loading."""
    values = dict(parity.CASES[1].values, architectures=["Qwen3ForCausalLM"])
    values |= dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=9, vocab_size=4096)
    model = models.init_model(models.decoder_config(values), jax.random.key(0), jnp.bfloat16)
    models.save_model(tmp_path / "big", model)
    largest = model.params["embedding"].nbytes
    del model
    measured = _in_a_fresh_process(tmp_path / "big", "bfloat16")
    assert measured["parameters"] > 1.8e8
    assert measured["peak"] < measured["parameters"] + 2 * largest
    print(f"peak {measured['peak']:,} bytes for parameters of {measured['parameters']:,}")


def test_tensors_go_straight_to_their_shards(folder):
    assert _in_a_fresh_process(folder, "float32", XLA_FLAGS="--xla_force_host_platform_device_count=4") == "sharded"


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(models.ModelError, match="weight_map names each tensor's file"):
        models.load_model(folder)
