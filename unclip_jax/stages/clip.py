"""CLIP as a stage: initialise, encode, and the contrastive loss (Radford et al. 2021, figure 3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.configs import ClipConfig
from unclip_jax.nn.clip import ClipNetwork, TextFeatures
from unclip_jax.types import Array, Params

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5


def init(config: ClipConfig, key: Array) -> Params:
  """Fresh parameters."""
  network = ClipNetwork(config)
  if config.vision is not None:
    image = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
  if config.text is None:
    return network.init(key, image, method='encode_image')['params']
  ids = jnp.zeros((1, config.text.context_length), jnp.int32)
  if config.vision is None:
    return network.init(key, ids, ids == 0, method='encode_text')['params']
  return network.init(key, image, ids, ids == 0)['params']


def encode_image(
  config: ClipConfig, params: Params, image_bhwc: Array, dtype: Any = jnp.float32
) -> Array:
  """z_i float32 [b, embed_dim] of images [b, h, w, 3] in [-1, 1] at the tower's size.

  Raises:
    ValueError: the images have another size.
  """
  size = config.vision.image_size
  if image_bhwc.shape[1:] != (size, size, 3):
    raise ValueError(f'CLIP takes images [b, {size}, {size}, 3], got {image_bhwc.shape}')
  network = ClipNetwork(config, dtype)
  return network.apply({'params': params}, image_bhwc, method='encode_image')


def encode_text(
  config: ClipConfig, params: Params, ids_bt: Array, mask_bt: Array, dtype: Any = jnp.float32
) -> TextFeatures:
  """Features of tokenised captions: ids int32 [b, t], mask bool [b, t] up to the end of text."""
  network = ClipNetwork(config, dtype)
  return network.apply({'params': params}, ids_bt, mask_bt, method='encode_text')


def logit_scale(log_scale: Array) -> Array:
  """The scale of the logits, at most 100, from its learned logarithm."""
  # The gradient passes straight through the bound: a minimum's is zero beyond it, so that a scale
  # that had once gone there would stay for good.
  excess = jnp.maximum(log_scale - math.log(MAX_LOGIT_SCALE), 0)
  return jnp.exp(log_scale - jax.lax.stop_gradient(excess))


def contrastive_loss(
  z_i: Array, z_t: Array, log_scale: Array, axis_name: str | None = None
) -> tuple[Array, dict[str, Array]]:
  """Symmetric cross entropy of matching images and captions over the whole batch.

  Args:
    z_i: [b, d] image embeddings of unit norm, row i belonging to row i of z_t.
    z_t: [b, d] caption embeddings of unit norm.
    log_scale: logarithm of the logits' scale; the scale is held at 100 or below.
    axis_name: the device axis over which the batch is spread, under shard_map or pmap. The
      contrast is then with the embeddings of all devices, and the mean over that axis of loss and
      gradients is that of the whole batch on one device.

  Returns:
    The loss, and {'accuracy'}: the share of images whose caption comes first.
  """
  b = z_i.shape[0]
  all_z_i, all_z_t, labels = z_i, z_t, jnp.arange(b)
  if axis_name is not None:
    all_z_i = jax.lax.all_gather(z_i, axis_name, tiled=True)
    all_z_t = jax.lax.all_gather(z_t, axis_name, tiled=True)
    labels = labels + b * jax.lax.axis_index(axis_name)
  scale = logit_scale(log_scale)
  logits_it, logits_ti = scale * z_i @ all_z_t.T, scale * z_t @ all_z_i.T

  def cross_entropy(logits: Array) -> Array:
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean()

  accuracy = (logits_it.argmax(axis=1) == labels).mean()
  loss = (cross_entropy(logits_it) + cross_entropy(logits_ti)) / 2
  return loss, {'accuracy': accuracy}


def loss(
  config: ClipConfig,
  params: Params,
  image_bhwc: Array,
  ids_bt: Array,
  mask_bt: Array,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
) -> tuple[Array, dict[str, Array]]:
  """The contrastive loss of a batch of images [b, h, w, 3] in [-1, 1] and their captions."""
  network = ClipNetwork(config, dtype)
  z_i, z_t, log_scale = network.apply({'params': params}, image_bhwc, ids_bt, mask_bt)
  value, metrics = contrastive_loss(z_i, z_t, log_scale, axis_name)
  return value, {**metrics, 'scale': logit_scale(log_scale)}
