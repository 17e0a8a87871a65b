"""The autoencoders in whose latents Kandinsky (MoVQ) and Stable unCLIP (KL) diffuse.

Both descend from VQGAN (Esser et al. 2021): residual blocks at falling resolutions, and attention
over pixels at the lowest. In MoVQ (Zheng et al. 2022) the latent also scales and shifts the
decoder's norms, each of its pixels those that it stands for. The factor between these latents and
those that are noised (`AutoencoderConfig.scaling`) is for the caller to apply.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import AutoencoderConfig
from unclip_jax.nn.attention import attend
from unclip_jax.nn.layers import GroupNorm, upsample_nearest
from unclip_jax.types import Array

EPSILON = 1e-6
SPATIAL_GROUPS = 32  # of MoVQ's decoder, whatever its encoder has
LOG_VAR_RANGE = (-30.0, 20.0)


class Norm(nn.Module):
  """Group norm; given a latent, its output is scaled and shifted by what the latent is there."""

  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    """Args: x [b, h, w, c]; latent [b, h / n, w / n, z]. Returns [b, h, w, c]."""
    x = GroupNorm(self.num_groups, EPSILON, self.dtype, name='norm')(x)
    if latent is None:
      return x
    b, h, w, c = x.shape
    _, rows, columns, _ = latent.shape
    # Before the latent is enlarged, not after: of a 1x1 convolution it is the same, n^2 times less.
    scale = nn.Conv(c, (1, 1), dtype=self.dtype, name='scale')(latent)
    shift = nn.Conv(c, (1, 1), dtype=self.dtype, name='shift')(latent)
    x = x.reshape(b, rows, h // rows, columns, w // columns, c)
    return (x * scale[:, :, None, :, None] + shift[:, :, None, :, None]).reshape(b, h, w, c)


class ConvBlock(nn.Module):
  """A residual block of two convolutions."""

  channels: int
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    """Args: x [b, h, w, c]; latent as in `Norm`. Returns [b, h, w, channels]."""
    h = nn.silu(Norm(self.num_groups, self.dtype, name='norm_in')(x, latent))
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_in')(h)
    h = nn.silu(Norm(self.num_groups, self.dtype, name='norm_out')(h, latent))
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name='conv_out')(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name='skip')(x)
    return x + h


class PixelAttention(nn.Module):
  """Self-attention over pixels, of a single head."""

  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    """Args: x [b, h, w, c]; latent as in `Norm`. Returns [b, h, w, c]."""
    b, h, w, c = x.shape
    pixels = Norm(self.num_groups, self.dtype, name='norm')(x, latent).reshape(b, h * w, c)
    qkv = nn.DenseGeneral((3, 1, c), dtype=self.dtype, name='qkv')(pixels)
    seen = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    out_proj = nn.DenseGeneral(c, axis=(-2, -1), dtype=self.dtype, name='out_proj')
    return x + out_proj(seen).reshape(b, h, w, c)


class Level(nn.Module):
  """The residual blocks of one resolution, each with attention behind it if asked for."""

  channels: int
  num_blocks: int
  has_attention: bool
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    for i in range(self.num_blocks):
      x = ConvBlock(self.channels, self.num_groups, self.dtype, name=f'block_{i}')(x, latent)
      if self.has_attention:
        x = PixelAttention(self.num_groups, self.dtype, name=f'attention_{i}')(x, latent)
    return x


class Middle(nn.Module):
  """Block, attention, block at the lowest resolution."""

  channels: int
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    x = ConvBlock(self.channels, self.num_groups, self.dtype, name='block_0')(x, latent)
    x = PixelAttention(self.num_groups, self.dtype, name='attention')(x, latent)
    return ConvBlock(self.channels, self.num_groups, self.dtype, name='block_1')(x, latent)


class Encoder(nn.Module):
  """Levels from the highest resolution to the lowest, a strided convolution between them."""

  widths: tuple[int, ...]
  num_res_blocks: int
  attention_levels: tuple[int, ...]
  out_channels: int
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image_bhwc: Array) -> Array:
    """[b, h, w, c] -> float32 [b, h / f, w / f, out_channels]."""
    x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name='conv_in')(
      image_bhwc.astype(self.dtype)
    )
    for i, width in enumerate(self.widths):
      if i:
        # Padded at the right and at the bottom only, as in VQGAN.
        padding = ((0, 1), (0, 1))
        x = nn.Conv(
          x.shape[-1], (3, 3), (2, 2), padding, dtype=self.dtype, name=f'downsampler_{i - 1}'
        )(x)
      x = Level(
        width,
        self.num_res_blocks,
        i in self.attention_levels,
        self.num_groups,
        self.dtype,
        name=f'level_{i}',
      )(x)
    x = Middle(self.widths[-1], self.num_groups, self.dtype, name='middle')(x)
    x = nn.silu(Norm(self.num_groups, self.dtype, name='norm_out')(x))
    conv_out = nn.Conv(self.out_channels, (3, 3), dtype=jnp.float32, name='conv_out')
    return conv_out(x.astype(jnp.float32))


class Decoder(nn.Module):
  """Levels from the lowest resolution to the highest, one block more in each."""

  widths: tuple[int, ...]
  num_res_blocks: int
  attention_levels: tuple[int, ...]
  out_channels: int
  num_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, latent: Array | None = None) -> Array:
    """Args: x [b, h, w, z]; latent [b, h, w, z] for the norms. Returns float32 [b, h f, w f, c]."""
    x = nn.Conv(self.widths[-1], (3, 3), dtype=self.dtype, name='conv_in')(x)
    x = Middle(self.widths[-1], self.num_groups, self.dtype, name='middle')(x, latent)
    for i, width in reversed(list(enumerate(self.widths))):
      x = Level(
        width,
        self.num_res_blocks + 1,
        i in self.attention_levels,
        self.num_groups,
        self.dtype,
        name=f'level_{i}',
      )(x, latent)
      if i:
        x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f'upsampler_{i - 1}')(upsample_nearest(x))
    x = nn.silu(Norm(self.num_groups, self.dtype, name='norm_out')(x, latent))
    conv_out = nn.Conv(self.out_channels, (3, 3), dtype=jnp.float32, name='conv_out')
    return conv_out(x.astype(jnp.float32))


class Autoencoder(nn.Module):
  """Encoder and decoder, and the 1x1 convolutions before and behind the latent.

  Raises:
    ValueError: the config's kind is not known, or its groups do not divide its channels.
  """

  config: AutoencoderConfig
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    if config.kind not in ('kl', 'vq'):
      raise ValueError(f'unknown kind of autoencoder {config.kind!r}: kl or vq')
    widths = tuple(config.channels * m for m in config.multipliers)
    decoder_groups = SPATIAL_GROUPS if config.spatial_norm else config.num_groups
    for groups in (config.num_groups, decoder_groups):
      if any(width % groups for width in widths):
        raise ValueError(f'{groups} groups do not divide channels of {widths}')
    z = config.latent_channels
    encoded = 2 * z if config.kind == 'kl' else z
    n, levels = config.num_res_blocks, config.attention_levels
    self.encoder = Encoder(widths, n, levels, encoded, config.num_groups, self.dtype)
    self.to_latent = nn.Conv(encoded, (1, 1), dtype=jnp.float32)
    self.from_latent = nn.Conv(z, (1, 1), dtype=self.dtype)
    self.decoder = Decoder(widths, n, levels, config.image_channels, decoder_groups, self.dtype)
    if config.kind == 'vq':
      # Nothing reads it: what Kandinsky paints is decoded as it is. It is here to be written back.
      self.codebook = self.param('codebook', nn.initializers.normal(), (config.codebook_size, z))

  def moments(self, image_bhwc: Array) -> tuple[Array, Array]:
    """Mean and log-variance of the latents of images [b, h, w, c] in [-1, 1], of kind 'kl'.

    Returns:
      float32 [b, h / f, w / f, z] each, the log-variance in [-30, 20]; unscaled.

    Raises:
      ValueError: the autoencoder is of another kind.
    """
    if self.config.kind != 'kl':
      raise ValueError(f'an autoencoder of kind {self.config.kind!r} gives no log-variance')
    mean, log_var = jnp.split(self.to_latent(self.encoder(image_bhwc)), 2, axis=-1)
    return mean, jnp.clip(log_var, *LOG_VAR_RANGE)

  def encode(self, image_bhwc: Array) -> Array:
    """[b, h, w, c] in [-1, 1] -> float32 [b, h / f, w / f, z], the mean for 'kl'; unscaled."""
    if self.config.kind == 'kl':
      return self.moments(image_bhwc)[0]
    return self.to_latent(self.encoder(image_bhwc))

  def decode(self, latent_bhwc: Array) -> Array:
    """Unscaled [b, h, w, z], not quantised -> float32 [b, h f, w f, c], not clipped to [-1, 1]."""
    latent = latent_bhwc.astype(self.dtype)
    return self.decoder(self.from_latent(latent), latent if self.config.spatial_norm else None)

  def __call__(self, image_bhwc: Array) -> Array:
    """Encodes and decodes, [b, h, w, c] -> float32 of the same shape."""
    return self.decode(self.encode(image_bhwc))
