"""Kernels for accelerators against the attention that runs everywhere; splash runs here in its interpreter."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax import models
from omniopd_jax.models.contexts import Keys, causal_attention
from omniopd_jax.models.decoder import positions
from omniopd_jax.models.kernels import Kernel, compact_attention, kernel_attention

B, S, H, K, E = 3, 100, 4, 2, 128
SCALE = E**-0.5


@pytest.fixture(scope="module")
def sides():
    """(q, k, v, mask): padding left, right, between."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, S, heads, E)), jnp.float32) for heads in (H, K, K))
    mask = np.ones((B, S), bool)
    mask[0, :11], mask[1, 80:], mask[2, 40:60] = False, False, False
    return q, k, v, jnp.asarray(mask)


def _plain(q, k, v, mask):
    keys = Keys(mask, positions(mask), False)
    return causal_attention(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), keys, 2**30, scale=SCALE)


KERNELS = {
    "dot_product_attention": lambda *sides: compact_attention(*sides, scale=SCALE, implementation="xla"),
    "splash": lambda *sides: kernel_attention(Kernel("splash", is_interpreted=True), *sides, scale=SCALE),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_give_what_plain_attention_gives_and_the_same_gradients(sides, name):
    *qkv, mask = sides
    weight = jnp.cos(jnp.arange(E)) * mask[..., None, None]

    def run(attend):
        def loss(*qkv):
            out = attend(*qkv, mask)
            return jnp.sum(jnp.where(mask[..., None, None], out, 0.0) * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    (_, out), gradients = run(KERNELS[name])
    (_, expected), plain_gradients = run(_plain)
    real = np.asarray(mask)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=2e-5)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[real], np.asarray(theirs)[real], atol=5e-4)


def test_a_model_reads_the_same_through_a_kernel():
    values = dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=64,
        vocab_size=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = models.init_model(models.decoder_config(values), jax.random.key(0))
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * 4, model.params))
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, 64)
    mask = jnp.ones((2, 20), bool).at[0, :5].set(False)
    through = models.with_kernel(model, Kernel("splash", is_interpreted=True))
    read = jax.jit(models.read, static_argnames="cache_length")
    (plain, cache), (ours, own) = (read(one, tokens, mask, cache_length=24) for one in (model, through))
    np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(plain)[mask], atol=2e-4)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(cache), strict=True):
        assert a.shape == b.shape


def _config(**changes):
    shape = dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=64,
        vocab_size=64,
    )
    return dataclasses.replace(models.decoder_config(shape), **changes)


def _device(name):
    """A device that is not there, as jax would show it."""
    platform, _, capability = name.partition(" ")
    return SimpleNamespace(platform=platform, compute_capability=capability or "9.0")


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "changes", "kernel"),
    [
        ("auto", "cpu", "float32", {}, "xla"),
        ("auto", "gpu", "bfloat16", {}, "cudnn"),
        ("auto", "gpu", "float32", {}, "xla"),
        ("auto", "gpu", "bfloat16", {"head_dim": 256}, "xla"),
        ("auto", "gpu 7.5", "bfloat16", {}, "xla"),
        ("auto", "gpu 12.0", "bfloat16", {}, "cudnn"),
        ("auto", "gpu gfx942", "bfloat16", {}, "xla"),
        ("auto", "gpu", "bfloat16", {"window_L": (8,)}, "xla"),
        ("auto", "tpu", "bfloat16", {}, "xla"),
        ("splash", "tpu", "bfloat16", {}, "splash"),
        ("xla", "gpu", "bfloat16", {"attention_softcap": 30.0}, "xla"),
    ],
)
def test_which_kernel_a_setting_means(setting, platform, dtype, changes, kernel):
    assert models.kernel_of(setting, _config(**changes), dtype, _device(platform)) == kernel


@pytest.mark.parametrize(
    ("setting", "platform", "changes", "reason"),
    [
        ("cudnn", "cpu", {}, "needs a GPU and this is a cpu"),
        ("splash", "gpu", {}, "needs a TPU and this is a gpu"),
        ("splash", "tpu", {"window_L": (8,)}, "layers have windows"),
        ("cudnn", "gpu", {"attention_softcap": 50.0}, "caps its attention scores"),
        ("cudnn", "gpu 7.5", {}, "compute capability 8.0 or more and this one's is 7.5"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(setting, platform, changes, reason):
    with pytest.raises(models.ModelError, match=reason):
        models.kernel_of(setting, _config(**changes), "bfloat16", _device(platform))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs that are not there")
def test_splash_compiles_for_a_tpu(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # nobody answers off a cloud machine
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run on a chip
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def loss(q, k, v, mask):
        return jnp.sum(kernel_attention(Kernel("splash"), q, k, v, mask, scale=SCALE).astype(jnp.float32))

    sides = (shape(2, 600, H, E), shape(2, 600, K, E), shape(2, 600, K, E), shape(2, 600, dtype=bool))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*sides).compile()
    assert "tpu_custom_call" in compiled.as_text()
