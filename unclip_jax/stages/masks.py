"""What of a picture is known: for networks that complete pictures (GLIDE, section 4)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.configs import DecoderConfig, GlideDecoderConfig
from unclip_jax.types import Array

CHANNELS = 4  # of a network's further input: the picture, zero where it is unknown, and the mask
_ALL_UNKNOWN = 0.3  # of the examples: without a picture a decoder is to paint as well as before
_SPOTS = 4


def completes(config: Any) -> bool:
  """Whether a decoder was trained to complete pictures, by its config."""
  return isinstance(config, DecoderConfig | GlideDecoderConfig) and config.inpaints


def paste(known_bhwc: Array, mask_bhw1: Array) -> Callable[[Array], Array]:
  """What puts the known pixels into an x_0.

  Args:
    known_bhwc: [b, h, w, 3] in [-1, 1]; what it holds where the mask is 0 has no effect.
    mask_bhw1: [b, h, w, 1], 1 or true where the picture is known.
  """
  known, mask = known_bhwc.astype(jnp.float32), mask_bhw1.astype(jnp.float32)
  return lambda x_0: x_0 * (1 - mask) + known * mask


def beside(known_bhwc: Array, mask_bhw1: Array) -> Array:
  """The further input of a network, float32 [b, h, w, CHANNELS]; arguments as of `paste`."""
  mask = mask_bhw1.astype(jnp.float32)
  return jnp.concatenate([known_bhwc.astype(jnp.float32) * mask, mask], axis=-1)


def draw_masks(key: Array, batch: int, size: int) -> Array:
  """Masks to train with, float32 [batch, size, size, 1], 1 where the picture is known.

  GLIDE erases random regions and names no shapes. Here nothing is known for some examples; of the
  rest each erases one of: a rectangle, all but a rectangle, one side, some round spots.
  """
  keys = jax.random.split(key, 6)
  # Pixels at their middles, in [0, 1].
  at = (jnp.arange(size) + 0.5) / size
  y, x = at[None, :, None], at[None, None, :]

  def rectangles(key: Array, least: float, most: float) -> Array:
    key_side, key_place = jax.random.split(key)
    side = jax.random.uniform(key_side, (2, batch, 1, 1), minval=least, maxval=most)
    start = jax.random.uniform(key_place, (2, batch, 1, 1)) * (1 - side)
    (top, left), (bottom, right) = start, start + side
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)

  def sides(key: Array) -> Array:
    key_angle, key_shift = jax.random.split(key)
    angle = jax.random.uniform(key_angle, (batch, 1, 1), maxval=2 * jnp.pi)
    shift = jax.random.uniform(key_shift, (batch, 1, 1), minval=-0.3, maxval=0.3)
    return (y - 0.5) * jnp.sin(angle) + (x - 0.5) * jnp.cos(angle) > shift

  def spots(key: Array) -> Array:
    key_place, key_radius, key_count = jax.random.split(key, 3)
    shape = (_SPOTS, batch, 1, 1)
    mid_y, mid_x = jax.random.uniform(key_place, (2, *shape))
    radius = jax.random.uniform(key_radius, shape, minval=0.08, maxval=0.35)
    count = jax.random.randint(key_count, (batch, 1, 1), 1, _SPOTS + 1)
    inside = (y[None] - mid_y) ** 2 + (x[None] - mid_x) ** 2 < radius**2
    return (inside & (jnp.arange(_SPOTS)[:, None, None, None] < count[None])).any(axis=0)

  shapes = [rectangles(keys[0], 0.2, 0.9), ~rectangles(keys[1], 0.3, 0.8), sides(keys[2])]
  erased = jnp.stack([*shapes, spots(keys[3])])
  which = jax.random.randint(keys[4], (batch,), 0, len(erased))
  chosen = jnp.take_along_axis(erased, which[None, :, None, None], axis=0)[0]
  everything = jax.random.bernoulli(keys[5], _ALL_UNKNOWN, (batch, 1, 1))
  return 1 - (chosen | everything).astype(jnp.float32)[..., None]
