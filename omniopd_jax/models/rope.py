"""Rotary position embedding: inverse frequencies of every kind we read, and the rotation itself.

Su et al. 2021 (RoPE); linear interpolation: Chen et al. 2023; YaRN: Peng et al. 2023; llama3: the scaling that came
with Llama 3.1. A layer without positions (NoPE) is a rope whose frequencies are all 0, so one code path serves all.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from omniopd_jax.types import Array

KINDS = ("default", "linear", "llama3", "yarn", "none")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One way of turning positions into angles. Fields that a kind does not use keep their defaults."""

    kind: str = "default"  # one of KINDS
    theta: float = 10_000.0  # base
    factor: float = 1.0  # linear, llama3, yarn: how far the original length is stretched
    original_length: int = 0  # llama3, yarn: tokens seen in pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the correction range to whole dimensions


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a token for each pair of dimensions.

    Args:
      rope: the kind and its constants.
      head_dim: E, even.

    Returns:
      float32 [E / 2].
    """
    if rope.kind == "none":
        return np.zeros(head_dim // 2, np.float32)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.power(np.float32(rope.theta), exponent)).astype(np.float32)
    if rope.kind == "linear":
        return frequency / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, frequency)
    if rope.kind == "yarn":
        return _yarn(rope, frequency, head_dim)
    return frequency


def _llama3(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequency
    smooth = (rope.original_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = np.where(wavelength > rope.original_length / rope.low_freq_factor, frequency / rope.factor, between)
    return np.where(wavelength < rope.original_length / rope.high_freq_factor, frequency, scaled).astype(np.float32)


def _yarn(rope: Rope, frequency: np.ndarray, head_dim: int) -> np.ndarray:
    """Dimensions that turn often within the original length are kept, slow ones stretched, a ramp between."""

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (frequency / rope.factor * stretched + frequency * (1 - stretched)).astype(np.float32)


def yarn_attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """What YaRN multiplies cos and sin with when the config does not say; 0 means an absent mscale."""

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


def rotation(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """cos and sin of every position's angles.

    Args:
      positions: int, any shape [...].

    Returns:
      (cos, sin), float32 [..., E / 2].
    """
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x_BxNxHxE: Array, cos_BxNxF: Array, sin_BxNxF: Array) -> Array:
    """Rotates dimension i with dimension i + E/2 (the layout of HF checkpoints). F = E / 2; float32 inside."""
    first, second = jnp.split(x_BxNxHxE.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxNxF[:, :, None], sin_BxNxF[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxNxHxE.dtype)
