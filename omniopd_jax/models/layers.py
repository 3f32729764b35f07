"""The parts of a decoder layer: norms, linear maps, attention, feed-forward (plain or routed), and the layer itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from omniopd_jax.models import tiles
from omniopd_jax.models.families import DecoderConfig
from omniopd_jax.models.layout import Layout, by_sequence
from omniopd_jax.models.rope import rotate
from omniopd_jax.types import Array

# a parameter's name and shape are declared here; how it starts stands in the table of `parameters.py`
DECLARED = nn.initializers.zeros
TILES = "tiles"  # what a linear map has in place of `kernel` where it is laid out for decoding on a CPU


@struct.dataclass
class LayerTraits:
    """What differs between layers. Arrays under the scan, plain ints where layers are walked one by one."""

    window: Array | int  # tokens that a query sees, itself included
    rope_index: Array | int


class RMSNorm(nn.Module):
    """x / rms(x) · (scale + offset), float32 inside. `num_axes` last axes are normalised together."""

    eps: float
    offset: float = 0.0
    num_axes: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = tuple(range(-self.num_axes, 0))
        shape = x.shape[-self.num_axes :]
        scale = self.param("scale", DECLARED, shape)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + self.eps)
        return (wide * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)


class Linear(nn.Module):
    """x · kernel (+ bias) (+ the adapter's x · a · b · scale, if it has one). Kernels are [*in, *out]."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    has_bias: bool = False
    adapter_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_in = len(self.in_shape)
        if self.has_variable("params", TILES):
            rows = x.reshape(-1, math.prod(self.in_shape))
            y = tiles.product(rows, self.get_variable("params", TILES))
            y = y.reshape(*x.shape[: x.ndim - num_in], *self.out_shape)
        else:
            kernel = self.param("kernel", DECLARED, (*self.in_shape, *self.out_shape))
            y = _contract(x, kernel, num_in)
        if self.has_bias:
            bias = self.param("bias", DECLARED, self.out_shape)
            y = y + bias.astype(x.dtype)
        if self.has_variable("lora", "a"):
            low = _contract(x, self.get_variable("lora", "a"), num_in)
            y = y + _contract(low, self.get_variable("lora", "b"), 1) * jnp.asarray(self.adapter_scale, x.dtype)
        return y


def _contract(x: Array, kernel: Array, num_in: int) -> Array:
    return _product(num_in, x, kernel.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(num_in: int, x: Array, kernel: Array) -> Array:
    """The last `num_in` axes of x times the first of the kernel.

    Its backward pass is jax's own but for the order of operands: jax asks for the kernel's gradient as its transpose,
    which costs a CPU a transposed copy of dL/dy and a slow product (an MLP forward and back: 1.3 times as long).
    """
    return _plain_product(num_in, x, kernel)


def _plain_product(num_in: int, x: Array, kernel: Array) -> Array:
    return jax.lax.dot_general(x, kernel, ((_last(x, num_in), _first(num_in)), ((), ())))


def _product_forward(num_in: int, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    # not `_product`: a rematerialisation policy that keeps products has to see one here
    return _plain_product(num_in, x, kernel), (x, kernel)


def _product_backward(num_in: int, saved: tuple[Array, Array], y_gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    num_out, rows = kernel.ndim - num_in, _first(x.ndim - num_in)
    back = ((_last(y_gradient, num_out), _last(kernel, num_out)), ((), ()))
    return jax.lax.dot_general(y_gradient, kernel, back), jax.lax.dot_general(x, y_gradient, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward)


def _first(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def _last(x: Array, count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))


class Attention(nn.Module):
    config: DecoderConfig
    adapter_scale: float

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], traits: LayerTraits, context: Any) -> tuple[Array, Any]:
        c = self.config
        linear = functools.partial(Linear, adapter_scale=self.adapter_scale)
        width, heads, kv_heads = (c.hidden_size,), (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        q = linear(width, heads, c.has_qkv_bias, name="q_proj")(x)
        k = linear(width, kv_heads, c.has_qkv_bias, name="k_proj")(x)
        v = linear(width, kv_heads, c.has_qkv_bias, name="v_proj")(x)
        if c.qk_norm != "none":
            num_axes = 1 if c.qk_norm == "head" else 2
            norm = functools.partial(RMSNorm, c.norm_eps, c.norm_offset, num_axes)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        cos, sin = rope
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out, kept = context.attend(q, k, v, traits.window, scale=c.attention_scale, softcap=c.attention_softcap)
        return linear(heads, width, c.has_o_bias, name="o_proj")(out), kept


class FeedForward(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    config: DecoderConfig
    adapter_scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        linear = functools.partial(Linear, adapter_scale=self.adapter_scale)
        width, inner = (c.hidden_size,), (c.mlp_dim,)
        gate = linear(width, inner, c.has_mlp_bias, name="gate_proj")(x)
        up = linear(width, inner, c.has_mlp_bias, name="up_proj")(x)
        return linear(inner, width, c.has_mlp_bias, name="down_proj")(activate(c.activation, gate) * up)


class RoutedFeedForward(nn.Module):
    """Each token goes through its `experts_per_token` likeliest experts; X experts.

    The tokens' copies are sorted by expert, and one ragged product a matrix serves all experts.
    """

    config: DecoderConfig
    adapter_scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        experts, width, inner = c.num_experts, c.hidden_size, c.mlp_dim
        tokens = x.reshape(-1, width)
        router = Linear((width,), (experts,), name="router")
        probability = jax.nn.softmax(router(tokens).astype(jnp.float32), axis=-1)
        weight, expert = jax.lax.top_k(probability, c.experts_per_token)
        if c.is_topk_normalised:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)

        def kernel(name: str, inputs: int, outputs: int) -> Array:
            return self.param(name, DECLARED, (experts, inputs, outputs)).astype(x.dtype)

        order = jnp.argsort(expert.reshape(-1))
        rows = tokens[order // c.experts_per_token]
        sizes = jnp.bincount(expert.reshape(-1), length=experts).astype(jnp.int32)
        gate = jax.lax.ragged_dot(rows, kernel("gate_proj", width, inner), sizes)
        up = jax.lax.ragged_dot(rows, kernel("up_proj", width, inner), sizes)
        down = kernel("down_proj", inner, width)
        out = jax.lax.ragged_dot(activate(c.activation, gate) * up, down, sizes)
        out = out * weight.reshape(-1)[order, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[order // c.experts_per_token].add(out).reshape(x.shape)


def activate(name: str, x: Array) -> Array:
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=True)


class Layer(nn.Module):
    """Attention and feed-forward, each inside norms where the family has them, each added to the stream."""

    config: DecoderConfig
    adapter_scale: float
    layout: Layout | None = None

    @nn.compact
    def __call__(
        self, x: Array, traits: LayerTraits, ropes: tuple[tuple[Array, Array], ...], context: Any
    ) -> tuple[Array, Any]:
        c = self.config
        has_pre, has_post = c.norm_placement != "post", c.norm_placement != "pre"
        norm = functools.partial(RMSNorm, c.norm_eps, c.norm_offset)
        mlp = RoutedFeedForward if c.num_experts else FeedForward

        y = norm(name="attention_pre_norm")(x) if has_pre else x
        rope = _pick_rope(ropes, traits.rope_index)
        y, kept = Attention(c, self.adapter_scale, name="attention")(y, rope, traits, context)
        x = by_sequence(self.layout, x + (norm(name="attention_post_norm")(y) if has_post else y))

        y = norm(name="mlp_pre_norm")(x) if has_pre else x
        y = mlp(c, self.adapter_scale, name="mlp")(y)
        x = by_sequence(self.layout, x + (norm(name="mlp_post_norm")(y) if has_post else y))
        return x, kept


def _pick_rope(ropes: tuple[tuple[Array, Array], ...], index: Array | int) -> tuple[Array, Array]:
    if len(ropes) == 1:
        return ropes[0]
    if isinstance(index, int):
        return ropes[index]
    return jax.tree.map(lambda *tables: jax.lax.select_n(index, *tables), *ropes)
