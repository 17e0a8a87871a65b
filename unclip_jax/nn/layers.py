"""Small layers that several networks share: normalisation, timestep embedding, pixel shuffles."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.types import Array

zeros = nn.initializers.zeros_init()


def activation(name: str) -> Callable[[Array], Array]:
  """The non-linearity that a config names: 'gelu' (exact), 'quick_gelu' (OpenAI CLIP) or 'silu'."""
  match name:
    case 'gelu':
      return lambda x: nn.gelu(x, approximate=False)
    case 'quick_gelu':
      return lambda x: x * nn.sigmoid(1.702 * x)
    case 'silu':
      return nn.silu
  raise ValueError(f'unknown activation {name!r}: gelu, quick_gelu or silu')


class GroupNorm(nn.Module):
  """Group normalisation over NHWC, computed in float32 whatever the dtype of its input (ADM)."""

  num_groups: int = 32
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> the same shape in `dtype`."""
    c = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones_init(), (c,))[None, None, None]
    bias = self.param('bias', zeros, (c,))[None, None, None]
    rounded, x = x.dtype.itemsize < jnp.dtype(jnp.float32).itemsize, x.astype(jnp.float32)
    # Pixels are averaged before channels are grouped: a reduction over a reshaped
    # [b, h, w, groups, c / groups] runs three times slower in the training step on a CPU.
    mean = self._group_mean(x)
    if rounded:
      # What float32 loses to a large mean, 16 bits have lost before; and x is read once.
      variance = jnp.maximum(self._group_mean(x * x) - mean * mean, 0)
      scale = jax.lax.rsqrt(variance + self.epsilon) * scale
      return (x * scale + (bias - mean * scale)).astype(self.dtype)
    x = x - mean
    scale = jax.lax.rsqrt(self._group_mean(x * x) + self.epsilon) * scale
    return (x * scale + bias).astype(self.dtype)

  def _group_mean(self, x: Array) -> Array:
    """The mean over the pixels and channels of each group, [b, 1, 1, c]."""
    b, _, _, c = x.shape
    mean = x.mean(axis=(1, 2)).reshape(b, self.num_groups, -1).mean(axis=-1)
    return jnp.repeat(mean, c // self.num_groups, axis=1)[:, None, None]


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, computed in float32."""

  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = nn.LayerNorm(
      epsilon=self.epsilon, dtype=jnp.float32, use_fast_variance=False, name='norm'
    )
    return norm(x.astype(jnp.float32)).astype(self.dtype)


def timestep_embedding(t: Array, dim: int, max_period: float = 1e4) -> Array:
  """Sinusoids of the timestep, cosines first, as in GLIDE and ADM.

  Args:
    t: [b] timesteps of the full schedule.
    dim: size of the embedding; an odd one ends with a zero.
    max_period: the longest wave length, 2 pi times this many steps.

  Returns:
    float32 [b, dim]
  """
  half = dim // 2
  frequencies = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
  angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
  embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepMLP(nn.Module):
  """Sinusoids -> Dense -> SiLU -> Dense, the timestep embedding of ADM and of the prior."""

  sinusoid_dim: int
  width: int
  out_width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, t: Array) -> Array:
    x = timestep_embedding(t, self.sinusoid_dim).astype(self.dtype)
    x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='in_proj')(x))
    return nn.Dense(self.out_width, dtype=self.dtype, name='out_proj')(x)


def space_to_depth(x: Array, patch: int) -> Array:
  """[b, h, w, c] -> [b, h / patch, w / patch, patch * patch * c]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def depth_to_space(x: Array, patch: int) -> Array:
  """The inverse of space_to_depth."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, patch, patch, c // patch**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)


def upsample_nearest(x: Array) -> Array:
  """[b, h, w, c] -> [b, 2h, 2w, c], each pixel repeated."""
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
  return x.reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Array) -> Array:
  """[b, h, w, c] -> [b, h / 2, w / 2, c], the mean of 2x2 pixels."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def l2_normalize(x: Array, epsilon: float = 1e-12) -> Array:
  """x over its Euclidean norm along the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon))
