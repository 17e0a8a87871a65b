"""The programs that `unclip` runs, one jitted function a stage.

Parameters are arguments, so that one compiled program serves all weights of a config. What makes a
program (config, sampler, shapes, whether there is guidance) is static; the rest is traced, so that
another prompt, seed, guidance scale or eta compiles nothing.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.configs import ClipConfig, DecoderConfig, PriorConfig, UpsamplerConfig
from unclip_jax.diffusion.samplers import Trajectory, start_noise
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler
from unclip_jax.types import Array, Params, Step

# What a stage folds into an image's key; upsampler i folds UPSAMPLER + i.
PRIOR, DECODER, UPSAMPLER = 0, 1, 2


class Sampled(NamedTuple):
  """What a diffusion stage drew.

  Attributes:
    x_0: float32 [b, ...], the sample: z_i [b, d], or images [b, h, w, 3] around [-1, 1].
    trajectory: x_s and x_0 after each step, [n, b, ...], if wanted; of the prior
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
  """Typed keys [b] of the images `index_b` (uint32 [b]) of a seed (uint32 scalar).

  The generator is named, so that a seed keeps its images whatever JAX's default is.
  """
  key = jax.random.key(seed, impl='threefry2x32')
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_b)


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
  b, height, width, c = image_bhwc.shape
  if (height, width) != (size, size):
    # The longer side is rounded down, and so is half of what is cut off, as by OpenAI's code.
    height, width = (size * side // min(image_bhwc.shape[1:3]) for side in (height, width))
    image_bhwc = jax.image.resize(image_bhwc, (b, height, width, c), 'cubic', antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    image_bhwc = image_bhwc[:, top : top + size, left : left + size]
  return jnp.clip(image_bhwc, -1, 1)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_prior(
  params: Params,
  text: TextFeatures,
  null_text: TextFeatures,
  key_bn: Array,
  plan: Step,
  guidance_scale: Array | None,
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
      common.make_sampler(sampler, variance, eta),
      guidance_scale,
      x_start_bnd.reshape(b * n, d),
      with_trajectory,
      dtype,
      num_candidates=n,
    )
    z_i = diffusion_prior.rerank(z_i.reshape(b, n, d), text.z_t)
  trajectory = jax.tree.map(lambda x: x.reshape(x.shape[0], b, n, d), trajectory)
  return Sampled(z_i, trajectory)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_decoder(
  params: Params,
  text: TextFeatures,
  null_text: TextFeatures,
  z_i: Array,
  key_b: Array,
  plan: Step,
  guidance_scale: Array | None,
  eta: Array,
  x_start: Array,
  *,
  config: DecoderConfig,
  sampler: str,
  variance: str,
  with_trajectory: bool,
  dtype: Any,
) -> Sampled:
  """Draws an image from each z_i and its caption."""
  with _precision(dtype):
    image, trajectory = decoder.sample(
      config,
      params,
      text,
      null_text,
      z_i,
      key_b,
      plan,
      common.make_sampler(sampler, variance, eta),
      guidance_scale,
      x_start,
      with_trajectory,
      dtype,
    )
  return Sampled(image, trajectory)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampler', 'variance', 'with_trajectory', 'dtype')
)
def sample_upsampler(
  params: Params,
  low_bhwc: Array,
  key_b: Array,
  plan: Step,
  eta: Array,
  x_start: Array,
  *,
  config: UpsamplerConfig,
  sampler: str,
  variance: str,
  with_trajectory: bool,
  dtype: Any,
) -> Sampled:
  """Draws the large images of small ones."""
  with _precision(dtype):
    image, trajectory = upsampler.sample(
      config,
      params,
      low_bhwc,
      key_b,
      plan,
      common.make_sampler(sampler, variance, eta),
      x_start,
      with_trajectory,
      dtype,
    )
  return Sampled(image, trajectory)


@jax.jit
def to_uint8(image: Array) -> Array:
  """Images in [-1, 1], clipped, as uint8."""
  return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)
