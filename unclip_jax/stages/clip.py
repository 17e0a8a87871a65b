"""CLIP as a stage: initialise, encode, and the contrastive loss (Radford et al. 2021, figure 3)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.configs import ClipConfig
from unclip_jax.nn.clip import ClipNetwork, TextFeatures
from unclip_jax.types import Array, Params, UnclipError

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
  z_i: Array,
  z_t: Array,
  log_scale: Array,
  axis_name: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Symmetric cross entropy of matching images and captions over the whole batch.

  With `chunk_size` the logits are never held whole: memory, that of the gradient included, grows
  with the rows of a device and not with their square. Under jit a batch that is split over devices
  needs nothing else, and each block of embeddings is sent as its turn comes; with `axis_name` all
  embeddings are gathered at once.

  Args:
    z_i: [b, d] image embeddings of unit norm, row i belonging to row i of z_t.
    z_t: [b, d] caption embeddings of unit norm.
    log_scale: logarithm of the logits' scale; the scale is held at 100 or below.
    axis_name: the device axis over which the batch is spread, under shard_map or pmap. The
      contrast is then with the embeddings of all devices, and the mean over that axis of loss and
      gradients is that of the whole batch on one device.
    chunk_size: columns of logits that are held at a time, of the whole batch's; None holds all.

  Returns:
    The loss, and {'accuracy'}: the share of images whose caption comes first; a tie is a miss.

  Raises:
    UnclipError: chunks of that size do not divide the batch.
  """
  b = z_i.shape[0]
  all_z_i, all_z_t, labels = z_i, z_t, jnp.arange(b)
  if axis_name is not None:
    all_z_i = jax.lax.all_gather(z_i, axis_name, tiled=True)
    all_z_t = jax.lax.all_gather(z_t, axis_name, tiled=True)
    labels = labels + b * jax.lax.axis_index(axis_name)
  n = all_z_i.shape[0]
  if chunk_size is not None and (chunk_size < 1 or n % chunk_size):
    raise UnclipError(
      f'a batch of {n} cannot be contrasted in chunks of {chunk_size}: take a divisor of {n}'
    )
  num_blocks = 1 if chunk_size is None else n // chunk_size
  scale = logit_scale(log_scale)
  loss_i, is_first = _cross_entropy(scale * z_i, all_z_t, labels, num_blocks)
  loss_t, _ = _cross_entropy(scale * z_t, all_z_i, labels, num_blocks)
  return (loss_i.mean() + loss_t.mean()) / 2, {'accuracy': is_first.mean()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(
  queries: Array, keys: Array, labels: Array, num_blocks: int
) -> tuple[Array, Array]:
  """Cross entropy of queries [b, d] with keys [n, d], the one at `labels` being right.

  The sum of exponentials is taken block by block (Milakov and Gimelshein 2018, algorithm 3), and
  the gradient computes each block's logits anew: both hold [b, n / num_blocks] at a time.

  Returns:
    float32 [b], and bool [b]: whether the right key's logit exceeds all others.
  """
  return _cross_entropy_forward(queries, keys, labels, num_blocks)[0]


def _cross_entropy_forward(
  queries: Array, keys: Array, labels: Array, num_blocks: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
  def add(carry: tuple[Array, ...], block: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
    highest, total, own, other = carry
    keys_of_block, rows = block
    logits = queries @ keys_of_block.T
    is_own = labels[:, None] == rows[None]
    higher = jnp.maximum(highest, logits.max(axis=1))
    total = total * jnp.exp(highest - higher) + jnp.exp(logits - higher[:, None]).sum(axis=1)
    own = own + jnp.where(is_own, logits, 0).sum(axis=1)
    other = jnp.maximum(other, jnp.where(is_own, -jnp.inf, logits).max(axis=1))
    return (higher, total, own, other), None

  zero = jnp.zeros_like(queries[:, 0])
  lowest = jnp.full_like(zero, -jnp.inf)
  carry, _ = jax.lax.scan(add, (lowest, zero, zero, lowest), _blocks(keys, num_blocks))
  highest, total, own, other = carry
  log_total = highest + jnp.log(total)
  return (log_total - own, own > other), (queries, keys, labels, log_total)


def _cross_entropy_backward(
  num_blocks: int, residuals: tuple[Array, ...], cotangents: tuple[Array, Any]
) -> tuple[Array, Array, None]:
  queries, keys, labels, log_total = residuals
  weight = cotangents[0][:, None]

  def add(d_queries: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
    keys_of_block, rows = block
    share = jnp.exp(queries @ keys_of_block.T - log_total[:, None])
    d_logits = weight * (share - (labels[:, None] == rows[None]))
    return d_queries + d_logits @ keys_of_block, d_logits.T @ queries

  d_queries, d_keys = jax.lax.scan(add, jnp.zeros_like(queries), _blocks(keys, num_blocks))
  return d_queries, d_keys.swapaxes(0, 1).reshape(keys.shape), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _blocks(keys: Array, num_blocks: int) -> tuple[Array, Array]:
  """Keys [n, d] as [num_blocks, n / num_blocks, d], and their rows [num_blocks, n / num_blocks].

  A block takes every num_blocks-th row: of keys that are split over devices it is split likewise,
  and is all that a device is sent at a time.
  """
  n, d = keys.shape
  rows = jnp.arange(n).reshape(-1, num_blocks).T
  return keys.reshape(-1, num_blocks, d).swapaxes(0, 1), rows


def embed(
  config: ClipConfig,
  params: Params,
  image_bhwc: Array,
  ids_bt: Array,
  mask_bt: Array,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[Array, Array]:
  """z_i and z_t [b, embed_dim] of images [b, h, w, 3] in [-1, 1] and their captions.

  With `remat` the blocks of Transformers and ResNets run again for their gradients, which keeps
  less in memory.
  """
  network = ClipNetwork(config, dtype, remat)
  return network.apply({'params': params}, image_bhwc, ids_bt, mask_bt)[:2]


def loss_of_embeddings(
  params: Params,
  z_i: Array,
  z_t: Array,
  axis_name: str | None = None,
  chunk_size: int | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The contrastive loss of embeddings at the temperature of `params`, and the scale as a metric.

  Arguments and errors as for `contrastive_loss`.
  """
  value, metrics = contrastive_loss(z_i, z_t, params['log_scale'], axis_name, chunk_size)
  return value, {**metrics, 'scale': logit_scale(params['log_scale'])}


def loss(
  config: ClipConfig,
  params: Params,
  image_bhwc: Array,
  ids_bt: Array,
  mask_bt: Array,
  axis_name: str | None = None,
  dtype: Any = jnp.float32,
  chunk_size: int | None = None,
  remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
  """The contrastive loss of a batch of images [b, h, w, 3] in [-1, 1] and their captions.

  Arguments and errors as for `embed` and `contrastive_loss`.
  """
  z_i, z_t = embed(config, params, image_bhwc, ids_bt, mask_bt, dtype, remat)
  return loss_of_embeddings(params, z_i, z_t, axis_name, chunk_size)
