"""The decoder as a stage (section 2.1): from z_i and the caption to an image of 64 pixels.

The decoders of Kandinsky and Stable unCLIP paint latents in its place: `make_network` knows which.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.configs import (
  DecoderConfig,
  KandinskyDecoderConfig,
  StableUnclipDecoderConfig,
)
from unclip_jax.diffusion import guidance, losses, samplers
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import DecoderNetwork
from unclip_jax.nn.kandinsky import KandinskyDecoderNetwork
from unclip_jax.nn.stable_unclip import StableUnclipDecoderNetwork
from unclip_jax.stages import masks
from unclip_jax.stages.common import draw_training_step, make_denoise_fn
from unclip_jax.stages.diffusion_prior import drop_text
from unclip_jax.types import Array, Params, Step, UnclipError

# What `init` and `sample` know; `loss` is of the first alone.
EmbeddingDecoderConfig = DecoderConfig | KandinskyDecoderConfig | StableUnclipDecoderConfig
_MASKS = 3  # what a step folds into its key for them, beyond the keys that it splits off


def make_network(config: EmbeddingDecoderConfig, dtype: Any = jnp.float32) -> nn.Module:
  """The network of a decoder that is given z_i."""
  match config:
    case DecoderConfig():
      return DecoderNetwork(config, dtype)
    case KandinskyDecoderConfig():
      return KandinskyDecoderNetwork(config, dtype)
    case StableUnclipDecoderConfig():
      return StableUnclipDecoderNetwork(config, dtype)


def init(config: EmbeddingDecoderConfig, key: Array) -> Params:
  """Fresh parameters of the network."""
  x_t = jnp.zeros((1, config.image_size, config.image_size, config.unet.in_channels))
  z_i, t = jnp.zeros((1, config.embed_dim)), jnp.zeros(1, jnp.int32)
  given: tuple[Any, ...]
  known: tuple[Any, ...] = ()
  match config:
    case DecoderConfig():
      length = 8 if config.text is None else config.text.context_length
      text = _some_text(length, config.clip_text_width or 1, config.embed_dim)
      given = (text, z_i, jnp.ones(1, bool))
      if config.inpaints:
        known = (jnp.zeros((*x_t.shape[:3], masks.CHANNELS)),)
    case KandinskyDecoderConfig(text_width=None):
      given = (None, z_i)
    case KandinskyDecoderConfig():
      given = (_some_text(8, config.text_width, config.text_embed_dim), z_i)
    case StableUnclipDecoderConfig():
      text = _some_text(8, config.unet.context_dim, config.embed_dim)
      given = (text, jnp.zeros((1, 2 * config.embed_dim)))
  network = make_network(config)
  return network.init(key, x_t, t, *given, True, *known, method='predict')['params']


def _some_text(length: int, width: int, embed_dim: int) -> TextFeatures:
  """Features [1] of the right shapes."""
  return TextFeatures(
    ids=jnp.zeros((1, length), jnp.int32),
    mask=jnp.ones((1, length), bool),
    states=jnp.zeros((1, length, width)),
    z_t=jnp.zeros((1, embed_dim)),
  )


def loss(
  config: DecoderConfig,
  params: Params,
  image_bhwc: Array,
  z_i: Array,
  text: TextFeatures,
  null_text: TextFeatures,
  key: Array,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
  """The diffusion loss, hybrid where the variance is learned, plus the draft's if there is one.

  z_i is dropped for 10% of the images and the caption for 50%, independently of each other. With
  `z_i_noise` z_i is turned by noise, so that a prior's small errors are nothing new to the decoder.
  With `inpaints` a part of most images is given (`masks.draw_masks`).

  Args:
    config: the decoder's.
    params: the network's.
    image_bhwc: [b, h, w, 3] in [-1, 1].
    z_i: [b, embed_dim] their CLIP embeddings.
    text: features of their captions.
    null_text: features [1] of the empty caption.
    key: of this step.
    dtype: the network's.
    remat: whether blocks of the network run again for their gradients, which keeps less in memory.

  Returns:
    The loss, and the means of the metrics of `diffusion_loss`; with a draft also 'draft_mse'.
  """
  key_drop, key_step, key_dropout = jax.random.split(key, 3)
  z_i, has_z_i, text = _corrupt(config, key_drop, z_i, text, null_text)
  diffusion = config.diffusion
  x_t, eps, step = draw_training_step(diffusion, key_step, image_bhwc)
  known = None
  if config.inpaints:
    mask = masks.draw_masks(jax.random.fold_in(key, _MASKS), len(x_t), config.image_size)
    known = masks.beside(image_bhwc, mask)
  output, draft = DecoderNetwork(config, dtype, remat).apply(
    {'params': params},
    x_t,
    step.t,
    text,
    z_i,
    has_z_i,
    False,
    known,
    method='predict',
    rngs={'dropout': key_dropout},
  )
  loss_b, metrics = losses.diffusion_loss(
    output,
    image_bhwc,
    eps,
    x_t,
    step,
    diffusion.prediction,
    diffusion.learned_variance,
    diffusion.min_snr_gamma,
    vlb_weight=0.001 * diffusion.num_steps,
    noise_power=diffusion.noise_power,
  )
  if draft is not None:
    metrics['draft_mse'] = _draft_error(draft, image_bhwc)
    loss_b = loss_b + metrics['draft_mse']
  return loss_b.mean(), jax.tree.map(jnp.mean, metrics)


def draft_loss(
  config: DecoderConfig,
  params: Params,
  image_bhwc: Array,
  z_i: Array,
  text: TextFeatures,
  null_text: TextFeatures,
  key: Array,
  dtype: Any = jnp.float32,
) -> tuple[Array, dict[str, Array]]:
  """The draft's part of `loss` alone: the U-Net, which is nearly all of the cost, does not run.

  Arguments as for `loss`.

  Returns:
    The mean squared error of the draft to the image at its size, and the same as 'draft_mse'.
  """
  z_i, has_z_i, text = _corrupt(config, key, z_i, text, null_text)
  network, variables = DecoderNetwork(config, dtype), {'params': params}
  conditioning = network.apply(variables, text, z_i, has_z_i, method='encode_conditioning')
  error = _draft_error(conditioning.draft, image_bhwc).mean()
  return error, {'draft_mse': error}


def _draft_error(draft: Array, image_bhwc: Array) -> Array:
  """Mean squared error [b] of a draft to the picture at its size."""
  b, size, _, channels = draft.shape
  block = image_bhwc.shape[1] // size
  small = image_bhwc.reshape(b, size, block, size, block, channels).mean(axis=(2, 4))
  return ((draft - small) ** 2).mean(axis=(1, 2, 3))


def _corrupt(
  config: DecoderConfig, key: Array, z_i: Array, text: TextFeatures, null_text: TextFeatures
) -> tuple[Array, Array, TextFeatures]:
  """What training sees of a prompt: z_i with noise, bool [b] which keep it, captions or none."""
  key_text, key_image, key_noise = jax.random.split(key, 3)
  text = drop_text(key_text, text, null_text, config.text_drop)
  has_z_i = jax.random.bernoulli(key_image, 1 - config.image_drop, z_i.shape[:1])
  if config.z_i_noise:
    norm = jnp.linalg.norm(z_i, axis=-1, keepdims=True)
    noise = jax.random.normal(key_noise, z_i.shape) * norm / z_i.shape[-1] ** 0.5
    z_i = z_i + config.z_i_noise * noise
    z_i = z_i * (norm / jnp.linalg.norm(z_i, axis=-1, keepdims=True))
  return z_i, has_z_i, text


def sample(
  config: EmbeddingDecoderConfig,
  params: Params,
  text: TextFeatures | None,
  null_text: TextFeatures | None,
  z_i: Array,
  key_b: Array,
  plan: Step,
  sampler: samplers.Sampler,
  guidance_scale: Array | Guidance | None = None,
  x_start: Array | None = None,
  with_trajectory: bool = False,
  dtype: Any = jnp.float32,
  null_z_i: Array | None = None,
  known: Array | None = None,
  mask: Array | None = None,
) -> tuple[Array, samplers.Trajectory | None]:
  """Draws images, float32 [b, image_size, image_size, 3] around [-1, 1], or latents of that size.

  Args:
    config: the decoder's.
    params: the network's.
    text: features of b captions; None for Kandinsky 2.2, which reads none.
    null_text: features [b] of what guidance leads away from: empty or negative captions.
    z_i: [b, embed_dim] CLIP image embeddings; for Stable unCLIP what `stable_unclip.augment` makes
      of them.
    key_b: typed keys [b].
    plan: of `common.make_plan`.
    sampler: of `common.make_sampler`.
    guidance_scale: scalar or [b], or a `Guidance`; None draws without guidance at half the cost.
    x_start: [b, image_size, image_size, c] the noise to start from; drawn from the keys if None.
    with_trajectory: whether to return what lay between.
    dtype: the network's.
    null_z_i: of the shape of z_i, what the unconditional half has in its place; of a
      `DecoderConfig` None, as that has learned its own.
    known: [b, image_size, image_size, 3] in [-1, 1], a picture that is kept where the mask says; of
      a `DecoderConfig` that `inpaints`.
    mask: [b, image_size, image_size, 1], 1 or true where it is kept.

  Raises:
    UnclipError: there is a picture to keep, but the network was not trained to complete one.
  """
  if known is not None and not masks.completes(config):
    raise UnclipError('this decoder was not trained to complete pictures')
  if x_start is None:
    size = config.image_size
    x_start = samplers.start_noise(key_b, (size, size, config.unet.in_channels))
  network, variables = make_network(config, dtype), {'params': params}
  cond: tuple[Any, ...] = (text, z_i)
  uncond: tuple[Any, ...] = (null_text, null_z_i)
  if isinstance(config, DecoderConfig):
    b = z_i.shape[0]
    given = None if known is None else masks.beside(known, mask)
    cond = (text, z_i, jnp.ones(b, bool), given)
    uncond = (null_text, z_i, jnp.zeros(b, bool), given)
  if guidance_scale is not None:
    cond = guidance.interleave(cond, uncond)
  conditioning = network.apply(variables, *cond, method='encode_conditioning')
  time_embs = network.apply(variables, plan.t, method='encode_time')
  denoise_fn = make_denoise_fn(
    lambda x, emb, given: network.apply(variables, x, emb, given),
    conditioning,
    time_embs,
    config.diffusion,
    guidance_scale,
    None if known is None else masks.paste(known, mask),
  )
  result = samplers.sample_loop(denoise_fn, sampler, plan, x_start, key_b, with_trajectory)
  return result if with_trajectory else (result, None)
