"""The programs that `unclip` runs, one jitted function a stage.

Parameters are arguments, so that one compiled program serves all weights of a config. What makes a
program (config, sampler, shapes, whether there is guidance) is static; the rest is traced, so that
another prompt, seed, guidance scale or eta compiles nothing.
"""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.configs import (
  AnyDecoderConfig,
  AnyUpsamplerConfig,
  ArPriorConfig,
  AutoencoderConfig,
  ClipConfig,
  GlideDecoderConfig,
  GlideUpsamplerConfig,
  PriorConfig,
  StableUnclipDecoderConfig,
  TextConfig,
  XlmRobertaConfig,
)
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.diffusion.inversion import ddim_inversion
from unclip_jax.diffusion.resampling import keep_known
from unclip_jax.diffusion.samplers import Trajectory, start_noise
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import (
  ar_prior,
  autoencoder,
  clip,
  common,
  decoder,
  diffusion_prior,
  glide,
  masks,
  stable_unclip,
  text_encoder,
  upsampler,
)
from unclip_jax.systems.by_columns import Program
from unclip_jax.types import Array, Params, Step

# What a stage folds into an image's key; upsampler i folds UPSAMPLER + i.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2
NEGATIVE_PRIOR = 1 << 16
Z_I_NOISE = 1 << 17  # beyond what a sampling loop folds into its key
INVERSION = 'inversion'  # of a decoder, in place of a sampler's name; no caller's to choose


class Prompt(NamedTuple):
  """What decoders and upsamplers paint; what one of them has no use for is None.

  Attributes:
    text: features of b captions.
    null_text: features [b] of what guidance leads away from.
    z_i: [b, d] CLIP image embeddings.
    null_z_i: [b, d] what takes their place in the unconditional half, where none was learned.
    noise_level: int32, the timestep that z_i is noised to.
    known: [b, h, w, 3] in [-1, 1], a picture that is to be completed.
    mask: [b, h, w, 1], 1 where it is known, else 0.
  """

  text: TextFeatures | None
  null_text: TextFeatures | None
  z_i: Array | None
  null_z_i: Array | None = None
  noise_level: Array | None = None
  known: Array | None = None
  mask: Array | None = None


class Sampled(NamedTuple):
  """What a stage drew.

  Attributes:
    x_0: float32 [b, ...], the sample: z_i [b, d], or images [b, h, w, 3] around [-1, 1].
    trajectory: x_s and x_0 after each step, [n, b, ...], if wanted; of the diffusion prior
      [n, b, candidates, d], standardised.
  """

  x_0: Array
  trajectory: Trajectory | None


def _precision(dtype: Any) -> contextlib.AbstractContextManager[None]:
  """Lets float32 be float32 in what is traced within: the same picture on every machine.

  Left alone, a TPU rounds the factors of a product to bfloat16, and a GPU may to TF32.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return jax.default_matmul_precision('highest')
  return contextlib.nullcontext()


@jax.jit
def image_keys(seed: Array, index_b: Array) -> Array:
  """Typed keys [b] of the images `index_b` (uint32 [b]) of a seed (uint32, one or [b]).

  The generator is named, so that a seed keeps its images whatever JAX's default is.
  """

  def image_key(seed: Array, index: Array) -> Array:
    return jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), index)

  return jax.vmap(image_key)(jnp.broadcast_to(seed, index_b.shape), index_b)


@functools.partial(jax.jit, static_argnames=('stage',))
def stage_keys(key_b: Array, *, stage: int) -> Array:
  """The keys [b] of one stage: no two stages of an image draw the same."""
  return jax.vmap(lambda key: jax.random.fold_in(key, stage))(key_b)


@functools.partial(jax.jit, static_argnames=('num_candidates',))
def candidate_keys(key_b: Array, *, num_candidates: int) -> Array:
  """The keys [b, num_candidates] of the prior's candidates."""
  return jax.vmap(
    lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_candidates))
  )(key_b)


@functools.partial(jax.jit, static_argnames=('shape',))
def draw_start(keys: Array, *, shape: tuple[int, ...]) -> Array:
  """Unit noise [*keys.shape, *shape], each key's own.

  A program of its own, so that those of the stages are the same for noise that is given.
  """
  noise = start_noise(keys.reshape(-1), shape)
  return noise.reshape(*keys.shape, *shape)


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def encode_text(
  params: Params, ids_bt: Array, mask_bt: Array, *, config: ClipConfig, dtype: Any
) -> TextFeatures:
  """CLIP's features of tokenised captions."""
  with _precision(dtype):
    return clip.encode_text(config, params, ids_bt, mask_bt, dtype)


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def encode_image(params: Params, image_bhwc: Array, *, config: ClipConfig, dtype: Any) -> Array:
  """z_i float32 [b, d] of images [b, h, w, 3] of any size, uint8 or float in [-1, 1]."""
  with _precision(dtype):
    return clip.encode_image(config, params, prepare(image_bhwc, config.vision.image_size), dtype)


@functools.partial(jax.jit, static_argnames=('config', 'rows', 'dtype'))
def encode_zeros(params: Params, *, config: ClipConfig, rows: int, dtype: Any) -> Array:
  """float32 [rows, d]: CLIP of a picture that is zero once standardised; Kandinsky's "no z_i"."""
  size = config.vision.image_size
  image = jnp.asarray(config.pixel_mean)[None, None, None] * 2 - 1
  with _precision(dtype):
    z_i = clip.encode_image(config, params, jnp.broadcast_to(image, (1, size, size, 3)), dtype)
  return jnp.broadcast_to(z_i, (rows, z_i.shape[1]))


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def encode_decoder_text(
  params: Params,
  ids_bt: Array,
  mask_bt: Array,
  *,
  config: XlmRobertaConfig | TextConfig,
  dtype: Any,
) -> TextFeatures:
  """Features of captions by a decoder's own text encoder."""
  with _precision(dtype):
    return text_encoder.encode(config, params, ids_bt, mask_bt, dtype)


def prepare(image_bhwc: Array, size: int) -> Array:
  """Images as CLIP was trained on them: the shorter side is resized, the middle is cut out.

  Args:
    image_bhwc: [b, h, w, c], uint8 or float in [-1, 1].
    size: pixels a side.

  Returns:
    float [b, size, size, c] in [-1, 1].
  """
  if image_bhwc.dtype == jnp.uint8:
    image_bhwc = image_bhwc.astype(jnp.float32) / 127.5 - 1
  b, *sides, c = image_bhwc.shape
  if sides != [size, size]:
    windows, scales, shifts = [], [], []
    for side in sides:
      # The longer side is rounded down, and so is half of what is cut off, as by OpenAI's code.
      resized = size * side // min(sides)
      scale, first = resized / side, (resized - size) // 2
      # Only what the middle is made of is resized: all of a thin picture could be of any size. The
      # cubic kernel reaches two pixels far, of the coarser of the two grids.
      reach = 2 * max(1, 1 / scale) + 1
      start = max(0, math.floor(first / scale - reach))
      windows.append(slice(start, math.ceil((first + size) / scale + reach)))
      scales.append(scale)
      shifts.append(start * scale - first)
    image_bhwc = jax.image.scale_and_translate(
      image_bhwc[:, *windows], (b, size, size, c), (1, 2), *jnp.array((scales, shifts)), 'cubic'
    )
  return jnp.clip(image_bhwc, -1, 1)


@Program
@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_prior(
  params: Params,
  text: TextFeatures,
  null_text: TextFeatures,
  key_bn: Array,
  plan: Step,
  guidance_scale: Array | Guidance | None,
  eta: Array,
  x_start_bnd: Array,
  *,
  config: PriorConfig,
  sampler: str,
  variance: str,
  with_trajectory: bool,
  dtype: Any,
) -> Sampled:
  """Draws n embeddings [b, n, d] a caption and keeps the one nearest to z_t (section 2.2)."""
  b, n, d = x_start_bnd.shape
  with _precision(dtype):
    z_i, trajectory = diffusion_prior.sample(
      config,
      params['network'],
      diffusion_prior.Statistics(**params['statistics']),
      text,
      null_text,
      key_bn.reshape(b * n),
      plan,
      common.make_sampler(sampler, variance, eta, config.diffusion.prediction),
      guidance_scale,
      x_start_bnd.reshape(b * n, d),
      with_trajectory,
      dtype,
      num_candidates=n,
    )
    z_i = diffusion_prior.rerank(z_i.reshape(b, n, d), text.z_t)
  trajectory = jax.tree.map(lambda x: x.reshape(x.shape[0], b, n, d), trajectory)
  return Sampled(z_i, trajectory)


@Program
@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def sample_ar_prior(
  params: Params,
  text: TextFeatures,
  null_text: TextFeatures,
  key_bn: Array,
  guidance_scale: Array | None,
  *,
  config: ArPriorConfig,
  dtype: Any,
) -> Sampled:
  """As `sample_prior`, by the autoregressive prior."""
  b, n = key_bn.shape
  with _precision(dtype):
    z_i = ar_prior.sample(
      config,
      params['network'],
      ar_prior.Quantiser(**params['quantiser']),
      text,
      null_text,
      key_bn.reshape(b * n),
      guidance_scale,
      dtype,
      num_candidates=n,
    )
    return Sampled(diffusion_prior.rerank(z_i.reshape(b, n, -1), text.z_t), None)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_decoder(
  params: Params,
  prompt: Prompt,
  key_b: Array,
  plan: Step,
  guidance_scale: Array | Guidance | None,
  eta: Array,
  x_start: Array,
  *,
  config: AnyDecoderConfig,
  sampler: str,
  variance: str,
  with_trajectory: bool,
  dtype: Any,
) -> Sampled:
  """Draws an image, or a latent, from each z_i and its caption; by INVERSION its x_T from it."""
  if sampler == INVERSION:
    method = ddim_inversion()
  else:
    method = common.make_sampler(sampler, variance, eta, config.diffusion.prediction)
  if prompt.known is not None and not masks.completes(config):
    method = keep_known(method, prompt.known, prompt.mask)
    prompt = prompt._replace(known=None, mask=None)
  how = (key_b, plan, method, guidance_scale, x_start, with_trajectory, dtype)
  with _precision(dtype):
    if isinstance(config, GlideDecoderConfig):
      text, null_text = prompt.text, prompt.null_text
      drawn = glide.sample_base(config, params, text, null_text, *how, prompt.known, prompt.mask)
      return Sampled(*drawn)
    z_i, null_z_i = prompt.z_i, prompt.null_z_i
    if isinstance(config, StableUnclipDecoderConfig):
      noise = start_noise(
        jax.vmap(lambda key: jax.random.fold_in(key, Z_I_NOISE))(key_b), z_i.shape[1:]
      )
      statistics = diffusion_prior.Statistics(**params['normalizer'])
      z_i = stable_unclip.augment(config, statistics, z_i, prompt.noise_level, noise)
      null_z_i, params = jnp.zeros_like(z_i), params['network']
    given = (null_z_i, prompt.known, prompt.mask)
    drawn = decoder.sample(config, params, prompt.text, prompt.null_text, z_i, *how, *given)
    return Sampled(*drawn)


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def encode_latents(
  params: Params, image_bhwc: Array, *, config: AutoencoderConfig, dtype: Any
) -> Array:
  """Latents float32 [b, h / f, w / f, c], as a decoder paints them, of images in [-1, 1]."""
  with _precision(dtype):
    return autoencoder.encode(config, params, image_bhwc, dtype) * config.scaling


@functools.partial(jax.jit, static_argnames=('config', 'tile', 'dtype'))
def decode_latents(
  params: Params, latent_bhwc: Array, *, config: AutoencoderConfig, tile: int | None, dtype: Any
) -> Array:
  """Images float32 [b, h f, w f, 3] of latents as a decoder paints them; `tile` in pixels."""
  with _precision(dtype):
    latent_bhwc = latent_bhwc / config.scaling
    if tile is None:
      return autoencoder.decode(config, params, latent_bhwc, dtype)
    side = tile // config.factor
    return autoencoder.decode_tiled(config, params, latent_bhwc, side, side // 4, dtype)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_upsampler(
  params: Params,
  low_bhwc: Array,
  prompt: Prompt,
  key_b: Array,
  plan: Step,
  eta: Array,
  x_start: Array,
  *,
  config: AnyUpsamplerConfig,
  sampler: str,
  variance: str,
  with_trajectory: bool,
  dtype: Any,
) -> Sampled:
  """Draws the large images of small ones."""
  method = common.make_sampler(sampler, variance, eta, config.diffusion.prediction)
  how = (key_b, plan, method, x_start, with_trajectory, dtype)
  with _precision(dtype):
    if isinstance(config, GlideUpsamplerConfig):
      given = (prompt.known, prompt.mask)
      drawn = glide.sample_upsampler(config, params, prompt.text, low_bhwc, *how, *given)
      return Sampled(*drawn)
    return Sampled(*upsampler.sample(config, params, low_bhwc, *how))


@jax.jit
def to_uint8(image: Array) -> Array:
  """Images in [-1, 1], clipped, as uint8."""
  return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)
