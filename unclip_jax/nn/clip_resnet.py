"""The ResNet of CLIP (Radford et al. 2021, section 2.4).

It differs from He et al. 2016 in its stem of three convolutions (ResNet-D, He et al. 2019), in
strides that blur before they skip (Zhang 2019), here means of 2x2 pixels, and in attention in the
place of the mean over the last grid.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import attend
from unclip_jax.nn.layers import downsample_mean, zeros
from unclip_jax.types import Array

EXPANSION = 4  # channels that a bottleneck gives, over those of its 3x3 convolution
_SAME_PIXELS = ((1, 1), (1, 1))  # of a 3x3 convolution: XLA's SAME shifts one of stride 2


class FrozenBatchNorm(nn.Module):
  """Batch normalisation by statistics that are stored with the parameters, computed in float32.

  They are those of the data that the model was trained on, and nothing here changes them.
  """

  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> the same shape in `dtype`."""
    c = x.shape[-1]
    ones = nn.initializers.ones_init()
    scale = self.param('scale', ones, (c,))
    bias = self.param('bias', zeros, (c,))
    mean = jax.lax.stop_gradient(self.param('mean', zeros, (c,))).astype(jnp.float32)
    var = jax.lax.stop_gradient(self.param('var', ones, (c,))).astype(jnp.float32)
    x = x.astype(jnp.float32) - mean[None, None, None]
    scale = jax.lax.rsqrt(var + self.epsilon) * scale
    return (x * scale[None, None, None] + bias[None, None, None]).astype(self.dtype)


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut; with `halve`, both at half the resolution."""

  width: int
  halve: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    channels = EXPANSION * self.width
    self.conv_in = nn.Conv(self.width, (1, 1), use_bias=False, dtype=self.dtype)
    self.norm_in = FrozenBatchNorm(dtype=self.dtype)
    self.conv_mid = nn.Conv(
      self.width, (3, 3), padding=_SAME_PIXELS, use_bias=False, dtype=self.dtype
    )
    self.norm_mid = FrozenBatchNorm(dtype=self.dtype)
    self.conv_out = nn.Conv(channels, (1, 1), use_bias=False, dtype=self.dtype)
    self.norm_out = FrozenBatchNorm(dtype=self.dtype)
    # Unused, and then without parameters, where the shortcut is the input as it is.
    self.skip = nn.Conv(channels, (1, 1), use_bias=False, dtype=self.dtype)
    self.skip_norm = FrozenBatchNorm(dtype=self.dtype)

  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> [b, h', w', 4 * width]."""
    h = nn.relu(self.norm_in(self.conv_in(x)))
    h = nn.relu(self.norm_mid(self.conv_mid(h)))
    h = self.norm_out(self.conv_out(downsample_mean(h) if self.halve else h))
    if self.halve or x.shape[-1] != EXPANSION * self.width:
      x = self.skip_norm(self.skip(downsample_mean(x) if self.halve else x))
    return nn.relu(h + x)


class AttentionPool(nn.Module):
  """One layer of attention: the mean of a grid asks the grid and itself, and is projected."""

  num_heads: int
  out_width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> [b, out_width].

    Raises:
      ValueError: the heads do not divide the channels.
    """
    b, h, w, c = x.shape
    head_dim, rest = divmod(c, self.num_heads)
    if rest:
      raise ValueError(f'{self.num_heads} heads do not divide {c} channels')
    x = x.reshape(b, h * w, c)
    x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
    positions = self.param('positions', nn.initializers.normal(c**-0.5), (h * w + 1, c))
    x = x + positions.astype(self.dtype)[None]
    heads = self.num_heads, head_dim
    q = nn.DenseGeneral((1, *heads), dtype=self.dtype, name='q')(x[:, :1])[:, :, 0]
    kv = nn.DenseGeneral((2, *heads), dtype=self.dtype, name='kv')(x)
    pooled = attend(q, kv[:, :, 0], kv[:, :, 1])[:, 0]
    return nn.DenseGeneral(self.out_width, axis=(-2, -1), dtype=self.dtype, name='out')(pooled)


class ClipResNet(nn.Module):
  """A stem, levels of bottlenecks, each at half the resolution of the last, and the pool."""

  width: int
  depths: tuple[int, ...]
  num_heads: int
  out_width: int
  dtype: Any = jnp.float32
  remat: bool = False  # of the bottlenecks

  @nn.compact
  def __call__(self, image_bhwc: Array) -> Array:
    """[b, h, w, 3] -> [b, out_width]; h and w multiples of 2 ** (levels + 1)."""
    x = image_bhwc
    for i, width in enumerate((self.width // 2, self.width // 2, self.width)):
      x = nn.Conv(
        width,
        (3, 3),
        (1, 1) if i else (2, 2),
        padding=_SAME_PIXELS,
        use_bias=False,
        dtype=self.dtype,
        name=f'stem_conv_{i}',
      )(x)
      x = nn.relu(FrozenBatchNorm(dtype=self.dtype, name=f'stem_norm_{i}')(x))
    x = downsample_mean(x)
    make_block = nn.remat(Bottleneck) if self.remat else Bottleneck
    for level, depth in enumerate(self.depths):
      for i in range(depth):
        name = f'level_{level}_block_{i}'
        halve = level > 0 and i == 0
        x = make_block(self.width * 2**level, halve, dtype=self.dtype, name=name)(x)
    return AttentionPool(self.num_heads, self.out_width, dtype=self.dtype, name='pool')(x)
