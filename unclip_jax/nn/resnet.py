"""Residual convolution blocks: the ADM block of the U-Nets and the convolutional image tower."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.nn.convolution import Conv3x3
from unclip_jax.nn.layers import GroupNorm, downsample_mean, upsample_nearest, zeros
from unclip_jax.types import Array


class ResBlock(nn.Module):
  """The residual block of ADM (Dhariwal & Nichol 2021), with its up- or down-sampling inside.

  `scale_shift` modulates the second norm by the embedding; otherwise the embedding is added
  before it, as in Karlo's super-resolution nets.
  """

  channels: int
  scale_shift: bool = True
  resample: str = 'none'
  dropout: float = 0.0
  num_groups: int = 32
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, emb: Array, deterministic: bool = True) -> Array:
    """Args: x [b, h, w, c]; emb [b, e], the SiLU already applied. Returns [b, h', w', channels]."""
    h = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name='norm_in')(x))
    if self.resample == 'up':
      x, h = upsample_nearest(x), upsample_nearest(h)
    elif self.resample == 'down':
      x, h = downsample_mean(x), downsample_mean(h)
    h = Conv3x3(self.channels, dtype=self.dtype, name='conv_in')(h, deterministic)
    emb_width = 2 * self.channels if self.scale_shift else self.channels
    emb = nn.Dense(emb_width, dtype=self.dtype, name='emb_proj')(emb)[:, None, None, :]
    if self.scale_shift:
      scale, shift = jnp.split(emb, 2, axis=-1)
      h = GroupNorm(self.num_groups, dtype=self.dtype, name='norm_out')(h) * (1 + scale) + shift
    else:
      h = GroupNorm(self.num_groups, dtype=self.dtype, name='norm_out')(h + emb)
    h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=deterministic)
    conv_out = Conv3x3(self.channels, zeros, self.dtype, name='conv_out')
    h = conv_out(h, deterministic)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name='skip')(x)
    return x + h


class ConvTower(nn.Module):
  """An image tower of residual convolutions: learns far faster on small data than a small ViT.

  A 2x2 patch stem, then for each width `depth` blocks at half the resolution of the last.
  """

  widths: tuple[int, ...]
  depth: int
  num_groups: int = 16
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image_bhwc: Array) -> Array:
    """[b, h, w, 3] in [-1, 1] -> [b, 2 * widths[-1]]: mean and maximum over the last grid."""
    x = nn.Conv(self.widths[0], (2, 2), (2, 2), dtype=self.dtype, name='stem')(image_bhwc)
    for level, width in enumerate(self.widths):
      if level:
        x = downsample_mean(x)
        x = nn.Conv(width, (1, 1), dtype=self.dtype, name=f'widen_{level}')(x)
      for i in range(self.depth):
        name = f'level_{level}_block_{i}'
        h = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name=f'{name}_norm_in')(x))
        h = nn.Conv(width, (3, 3), dtype=self.dtype, name=f'{name}_conv_in')(h)
        h = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name=f'{name}_norm_out')(h))
        x = x + nn.Conv(width, (3, 3), dtype=self.dtype, name=f'{name}_conv_out')(h)
    x = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name='norm')(x))
    return jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
