"""GLIDE as two stages (Nichol et al. 2022): a base network and an upsampler that reads the caption.

Weights for inpainting have a pair of their own: what is known of the picture, and the mask of where
it is known, are given to the first convolution beside x_t, and each predicted x_0 has the known
pixels put into it. How the release samples is in its notebooks text2im and inpaint
(openai/glide-text2im).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.configs import GlideDecoderConfig, GlideUpsamplerConfig
from unclip_jax.diffusion import guidance, samplers
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.glide import GlideNetwork
from unclip_jax.stages import masks
from unclip_jax.stages.common import make_denoise_fn
from unclip_jax.types import Array, DenoiseFn, Params, Step, UnclipError


def init(config: GlideDecoderConfig | GlideUpsamplerConfig, key: Array) -> Params:
  """Fresh parameters of either network."""
  shape = (1, config.text.context_length)
  text = TextFeatures(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), None, None)
  unet = config.unet
  size = 2 ** (len(unet.multipliers) - 1)
  x_t, condition = jnp.zeros((1, size, size, unet.in_channels)), None
  if unet.condition_channels:
    condition = jnp.zeros((1, size, size, unet.condition_channels))
  t = jnp.zeros(1, jnp.int32)
  network = GlideNetwork(config)
  return network.init(key, x_t, t, text, condition, True, method='predict')['params']


def enlarge(low_bhwc: Array, size: int) -> Array:
  """What an upsampler sees of the small image: within [-1, 1] and of 256 levels, then bilinear.

  Args:
    low_bhwc: [b, h, w, 3] in [-1, 1].
    size: pixels a side, h and w or more.

  Returns:
    float32 [b, size, size, 3].
  """
  b, _, _, c = low_bhwc.shape
  low = jnp.clip(low_bhwc.astype(jnp.float32), -1, 1)
  low = jnp.round((low + 1) * 127.5) / 127.5 - 1
  return jax.image.resize(low, (b, size, size, c), 'linear')


def sample_base(
  config: GlideDecoderConfig,
  params: Params,
  text: TextFeatures,
  null_text: TextFeatures,
  key_b: Array,
  plan: Step,
  sampler: samplers.Sampler,
  guidance_scale: Array | Guidance | None = None,
  x_start: Array | None = None,
  with_trajectory: bool = False,
  dtype: Any = jnp.float32,
  known: Array | None = None,
  mask: Array | None = None,
) -> tuple[Array, samplers.Trajectory | None]:
  """Draws images, float32 [b, image_size, image_size, 3] around [-1, 1].

  Args:
    config: the base's.
    params: of `init`.
    text: features of b captions, of which ids and mask count.
    null_text: features [b] of what guidance leads away from: empty or negative captions.
    key_b: typed keys [b].
    plan: of `common.make_plan`.
    sampler: of `common.make_sampler`.
    guidance_scale: scalar or [b], or a `Guidance`; None draws without guidance at half the cost.
    x_start: [b, image_size, image_size, 3] the noise to start from; drawn from the keys if None.
    with_trajectory: whether to return what lay between.
    dtype: the network's.
    known: [b, image_size, image_size, 3] in [-1, 1], a picture that is kept where the mask says.
    mask: [b, image_size, image_size, 1], 1 or true where it is kept.

  Raises:
    UnclipError: there is a picture to keep, but the weights do not inpaint.
  """
  condition = _condition(config, key_b.shape[0], known, mask)
  cond = (text, condition)
  if guidance_scale is not None:
    cond = guidance.interleave(cond, (null_text, condition))
  if x_start is None:
    x_start = _start(config, key_b)
  edit_x_0 = None if known is None else masks.paste(known, mask)
  denoise_fn = _make_denoise_fn(config, params, cond, plan, guidance_scale, edit_x_0, dtype)
  result = samplers.sample_loop(denoise_fn, sampler, plan, x_start, key_b, with_trajectory)
  return result if with_trajectory else (result, None)


def sample_upsampler(
  config: GlideUpsamplerConfig,
  params: Params,
  text: TextFeatures,
  low_bhwc: Array,
  key_b: Array,
  plan: Step,
  sampler: samplers.Sampler,
  x_start: Array | None = None,
  with_trajectory: bool = False,
  dtype: Any = jnp.float32,
  known: Array | None = None,
  mask: Array | None = None,
) -> tuple[Array, samplers.Trajectory | None]:
  """Draws large images of small ones, float32 [b, image_size, image_size, 3] around [-1, 1].

  The arguments that `sample_base` has too are as there.

  Args:
    config: the upsampler's.
    params: of `init`.
    text: features of b captions.
    low_bhwc: [b, low_size, low_size, 3] in [-1, 1].
    key_b: typed keys [b].
    plan: of `common.make_plan`.
    sampler: of `common.make_sampler`.
    x_start: [b, image_size, image_size, 3] unit noise, which the config's temperature makes
      smaller; drawn from the keys if None.
    with_trajectory: whether to return what lay between.
    dtype: the network's.
    known: [b, image_size, image_size, 3], the picture that is kept.
    mask: [b, image_size, image_size, 1] of where.

  Raises:
    UnclipError: as of `sample_base`.
  """
  cond = (text, _condition(config, key_b.shape[0], known, mask, low_bhwc))
  if x_start is None:
    x_start = _start(config, key_b)
  x_start = config.temperature * x_start
  edit_x_0 = None if known is None else masks.paste(known, mask)
  denoise_fn = _make_denoise_fn(config, params, cond, plan, None, edit_x_0, dtype)
  result = samplers.sample_loop(denoise_fn, sampler, plan, x_start, key_b, with_trajectory)
  return result if with_trajectory else (result, None)


def _condition(
  config: GlideDecoderConfig | GlideUpsamplerConfig,
  batch: int,
  known: Array | None,
  mask: Array | None,
  low_bhwc: Array | None = None,
) -> Array | None:
  """The channels beside x_t, known * mask, mask and small image, of those that the config has."""
  size, parts = config.image_size, []
  if config.inpaints:
    if known is None:  # all is to be painted: zeros, as in the release
      parts.append(jnp.zeros((batch, size, size, masks.CHANNELS)))
    else:
      parts.append(masks.beside(known, mask))
  elif known is not None:
    raise UnclipError(
      'these weights of GLIDE do not inpaint: take base_inpaint.pt and upsample_inpaint.pt'
    )
  if low_bhwc is not None:
    parts.append(enlarge(low_bhwc, size))
  return jnp.concatenate(parts, axis=-1) if parts else None


def _start(config: GlideDecoderConfig | GlideUpsamplerConfig, key_b: Array) -> Array:
  size = config.image_size
  return samplers.start_noise(key_b, (size, size, config.unet.in_channels))


def _make_denoise_fn(
  config: GlideDecoderConfig | GlideUpsamplerConfig,
  params: Params,
  cond: tuple[TextFeatures, Array | None],
  plan: Step,
  guidance_scale: Array | Guidance | None,
  edit_x_0: Callable[[Array], Array] | None,
  dtype: Any,
) -> DenoiseFn:
  """The denoiser of a loop over `plan`, with captions and conditions as `cond` has them."""
  network, variables = GlideNetwork(config, dtype), {'params': params}
  conditioning = network.apply(variables, *cond, method='encode_conditioning')
  return make_denoise_fn(
    lambda x, emb, given: network.apply(variables, x, emb, given),
    conditioning,
    network.apply(variables, plan.t, method='encode_time'),
    config.diffusion,
    guidance_scale,
    edit_x_0,
  )
