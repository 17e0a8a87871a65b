"""The autoencoder as a stage: initialise, encode, decode at once or by tiles.

Latents are those of the network: what is noised is `config.scaling` times as large (Stable
unCLIP), or is the same (Kandinsky).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import AutoencoderConfig
from unclip_jax.nn.autoencoder import Autoencoder
from unclip_jax.types import Array, Params, UnclipError


def init(config: AutoencoderConfig, key: Array) -> Params:
  """Fresh parameters."""
  image = jnp.zeros((1, config.factor, config.factor, config.image_channels))
  return Autoencoder(config).init(key, image)['params']


def encode(
  config: AutoencoderConfig, params: Params, image_bhwc: Array, dtype: Any = jnp.float32
) -> Array:
  """Images [b, h, w, 3] in [-1, 1] -> latents float32 [b, h / f, w / f, z], the mean for 'kl'.

  Raises:
    ValueError: the images are of other channels, or of a size that f does not divide.
  """
  f, channels = config.factor, config.image_channels
  _, h, w, c = image_bhwc.shape
  if c != channels or h % f or w % f:
    raise ValueError(
      f'the autoencoder takes images [b, h, w, {channels}] with h and w multiples of {f}, '
      f'got {image_bhwc.shape}'
    )
  return Autoencoder(config, dtype).apply({'params': params}, image_bhwc, method='encode')


def decode(
  config: AutoencoderConfig, params: Params, latent_bhwc: Array, dtype: Any = jnp.float32
) -> Array:
  """Latents [b, h, w, z] -> images float32 [b, h f, w f, 3], about [-1, 1].

  Raises:
    ValueError: the latents are of other channels.
  """
  if latent_bhwc.shape[-1] != config.latent_channels:
    raise ValueError(
      f'the autoencoder takes latents [b, h, w, {config.latent_channels}], got {latent_bhwc.shape}'
    )
  return Autoencoder(config, dtype).apply({'params': params}, latent_bhwc, method='decode')


def decode_tiled(
  config: AutoencoderConfig,
  params: Params,
  latent_bhwc: Array,
  tile: int,
  overlap: int,
  dtype: Any = jnp.float32,
) -> Array:
  """`decode` for small devices: tiles one after the other, blended linearly where they overlap.

  An approximation, unless one tile covers the latent: norms and attention know of a tile what they
  should know of the picture. Tiles are of one shape: one program decodes them all.

  Args:
    config: of the autoencoder.
    params: of the autoencoder.
    latent_bhwc: [b, h, w, z].
    tile: of the latent, pixels a side; a latent that is smaller there takes one.
    overlap: of neighbours, pixels of the latent at least; tiles are spread evenly.
    dtype: what the network computes in.

  Returns:
    float32 [b, h f, w f, 3]

  Raises:
    UnclipError: tiles would be empty, or not get on.
  """
  if tile < 1 or not 0 <= overlap < tile:
    raise UnclipError(
      f'tiles of {tile} with an overlap of {overlap}: take a tile of 1 or more, and an overlap '
      'from 0 to less than the tile'
    )
  f = config.factor
  b, h, w, z = latent_bhwc.shape
  rows, row_weights = _tile_axis(h, tile, overlap, f)
  columns, column_weights = _tile_axis(w, tile, overlap, f)
  tile_shape = (b, min(tile, h), min(tile, w), z)

  def add_tile(image: Array, place: tuple[Array, ...]) -> tuple[Array, None]:
    row, column, row_weight, column_weight = place
    latent = jax.lax.dynamic_slice(latent_bhwc, (0, row, column, 0), tile_shape)
    part = decode(config, params, latent, dtype)
    part = part * row_weight[None, :, None, None] * column_weight[None, None, :, None]
    corner = (0, row * f, column * f, 0)
    part = part + jax.lax.dynamic_slice(image, corner, part.shape)
    return jax.lax.dynamic_update_slice(image, part, corner), None

  places = (
    np.repeat(rows, len(columns)),
    np.tile(columns, len(rows)),
    np.repeat(row_weights, len(columns), axis=0),
    np.tile(column_weights, (len(rows), 1)),
  )
  image = jnp.zeros((b, h * f, w * f, config.image_channels))
  image, _ = jax.lax.scan(add_tile, image, places)
  return image


def _tile_axis(size: int, tile: int, overlap: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
  """Where the n tiles of an axis begin, int32 [n]; and each one's weights, float32 [n, pixels].

  The weights of a pixel add up to 1: over what two tiles share they run from one to the other.
  """
  tile = min(tile, size)
  count = 1 if tile == size else 1 - (tile - size) // (tile - overlap)  # rounded up
  starts = np.arange(count) * (size - tile) // max(count - 1, 1)
  weights = np.ones((count, tile * factor))
  for i in range(count - 1):
    shared = (starts[i] + tile - starts[i + 1]) * factor
    rise = (np.arange(shared) + 0.5) / shared
    weights[i, tile * factor - shared :] *= 1 - rise
    weights[i + 1, :shared] *= rise
  # More than two tiles may share a pixel.
  pixels = starts[:, None] * factor + np.arange(tile * factor)[None]
  total = np.zeros(size * factor)
  np.add.at(total, pixels, weights)
  return starts.astype(np.int32), (weights / total[pixels]).astype(np.float32)
