"""The arguments of `Unclip.sample`, checked against the model, as a request."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import (
  ArPriorConfig,
  GlideDecoderConfig,
  KandinskyDecoderConfig,
  StableUnclipDecoderConfig,
  UnclipConfig,
)
from unclip_jax.data.tokenizer import Tokenizer, Tokens
from unclip_jax.stages import masks
from unclip_jax.systems import ar_settings, settings
from unclip_jax.systems.given import as_array, given_array
from unclip_jax.systems.pipeline import image_shape
from unclip_jax.systems.samples import Request, StartNoise
from unclip_jax.systems.settings import Sampling
from unclip_jax.types import UnclipError

_NO_STATISTICS: Mapping[str, np.ndarray] = MappingProxyType({})


class Samplings(NamedTuple):
  """How stages are sampled, where not as the model says."""

  prior: Sampling
  decoder: Sampling
  upsampler: Sampling


class Given(NamedTuple):
  """What the caller gives in place of what stages would make; as `Unclip.sample` describes it."""

  z_t: Any
  z_i: Any
  image: Any
  mask: Any
  noise_level: Any
  start_noise: Any


def make(
  config: UnclipConfig,
  tokenizer: Tokenizer | None,
  decoder_tokenizer: Tokenizer | None,
  prompts: str | Sequence[str],
  seed: Any,
  num_images: Any,
  first_image: Any,
  negative_prompt: Any,
  samplings: Samplings,
  num_candidates: Any,
  size: Any,
  given: Given,
  with_trajectories: bool,
  tile: Any,
  eps_power: Mapping[str, np.ndarray] = _NO_STATISTICS,
) -> Request:
  """The request of a call; `Unclip` and its `sample` describe the arguments.

  Raises:
    UnclipError: an argument is not as described there, or has no meaning for this model; names it.
  """
  sees_z_i = config.decoder is not None and not isinstance(config.decoder, GlideDecoderConfig)
  captions = settings.check_prompts(prompts, allow_empty=given.z_i is not None)
  num_images = settings.check_count('the number of images', num_images)
  seeds = _for_each('seed', seed, len(captions), settings.check_seed)
  firsts = _for_each('index of the first image', first_image, len(captions), settings.check_first)
  settings.check_last(max(firsts) + num_images - 1)
  settings.check_total(len(captions), num_images)
  captions = [caption for caption in captions for _ in range(num_images)]
  n = len(captions)
  if config.decoder is None:
    raise UnclipError('this model has no decoder: it draws no pictures')
  if config.prior is None and given.z_i is None and sees_z_i:
    raise UnclipError(
      'this model has no prior: give the z_i that encode_image makes of a picture (--image of '
      'generate), or open it with a prior'
    )
  _check_effects(config, captions, samplings, num_candidates, given, negative_prompt)
  num_ups = settings.num_upsamplers(config, size)
  prior, decoder, upsamplers = _resolve(config, samplings, num_ups, eps_power)
  guided = decoder.guidance_scale is not None or (
    given.z_i is None and prior is not None and prior.guidance_scale is not None
  )
  if num_candidates is None:
    num_candidates = 1 if config.prior is None else config.prior.num_candidates
  settings.check_count('the number of candidates', num_candidates)
  null_caption = _check_negative(negative_prompt, guided)
  readers = (tokenizer, decoder_tokenizer)
  tokens, decoder_tokens = (reader and reader.encode(captions) for reader in readers)
  nothing: Tokens | None = None
  null_tokens, null_decoder_tokens = (
    reader.encode([null_caption] * n) if guided and reader else nothing for reader in readers
  )
  width = (0,) if config.clip is None else (config.clip.embed_dim,)
  if not sees_z_i and (given.z_i is not None or given.z_t is not None):
    raise UnclipError('z_i and z_t are without effect on this model: its decoder knows no CLIP')
  known, mask = _known(config, given, n)
  return Request(
    captions=tuple(captions),
    tokens=tokens,
    null_tokens=null_tokens,
    decoder_tokens=decoder_tokens,
    null_decoder_tokens=null_decoder_tokens,
    is_negative=negative_prompt is not None,
    seed=np.repeat(np.array(seeds, np.uint32), num_images),
    indices=np.repeat(np.array(firsts, np.uint32), num_images)
    + np.arange(n, dtype=np.uint32) % np.uint32(num_images),
    num_candidates=num_candidates,
    prior=prior,
    decoder=decoder,
    upsamplers=upsamplers[:num_ups],
    z_t=given_array('z_t', given.z_t, n, width),
    z_i=given_array('z_i', given.z_i, n, width),
    noise_level=_noise_level(config, given.noise_level),
    known=known,
    mask=mask,
    noise=_given_noise(config, given.start_noise, n, num_candidates, num_ups),
    with_trajectories=with_trajectories,
    tile=_tile(config, tile),
  )


def example(
  config: UnclipConfig,
  tokenizer: Tokenizer | None,
  decoder_tokenizer: Tokenizer | None,
  batch_size: int,
  samplings: Samplings,
  num_candidates: int | None,
  size: int | None,
  eps_power: Mapping[str, np.ndarray] = _NO_STATISTICS,
  tile: int | None = None,
) -> Request:
  """A request of any captions, for what depends on shapes alone.

  The arguments are those of `make`; where no prior makes z_i it is given.

  Raises:
    UnclipError: as `make`.
  """
  settings.check_count('the batch size', batch_size)
  is_varied = config.prior is None and config.clip is not None
  z_i = np.zeros((1, config.clip.embed_dim), np.float32) if is_varied else None
  return make(
    config,
    tokenizer,
    decoder_tokenizer,
    [''] if is_varied else ['a'],
    0,
    batch_size,
    0,
    None,
    samplings,
    num_candidates,
    size,
    Given(None, z_i, None, None, None, None),
    False,
    tile,
    eps_power,
  )


def stages(config: UnclipConfig, request: Request) -> list[str]:
  """The stages that a request runs, in their order."""
  is_kandinsky = isinstance(config.decoder, KandinskyDecoderConfig)
  needed = {
    'clip': config.clip is not None,
    'prior': config.prior is not None
    and (request.z_i is None or (request.is_negative and is_kandinsky)),
    'decoder_text': config.decoder_text is not None,
    'decoder': True,
    'autoencoder': config.autoencoder is not None,
  }
  upsamplers = [f'upsampler_{i}' for i in range(len(request.upsamplers))]
  return [name for name, runs in needed.items() if runs] + upsamplers


def _for_each(what: str, value: Any, num_prompts: int, check: Callable[[object], int]) -> list[int]:
  """What holds for all prompts or was given for each, checked."""
  if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
    return [check(value)] * num_prompts
  if len(value) != num_prompts:
    raise UnclipError(
      f'there are {len(value)} of the {what} and {num_prompts} prompts: give one, or one for each'
    )
  return [check(one) for one in value]


def _check_effects(
  config: UnclipConfig,
  captions: Sequence[str],
  samplings: Samplings,
  num_candidates: Any,
  given: Given,
  negative_prompt: Any,
) -> None:
  """Raises UnclipError where something is asked of a stage that does not run."""
  asked_prior = {
    'settings of the prior': samplings.prior != Sampling(),
    'a number of candidates': num_candidates is not None,
  }
  why = None
  if config.prior is None:
    why = 'this model has no prior'
  elif given.z_i is not None and negative_prompt is None:
    why = 'z_i is given: the prior does not run'
  for what, asked in asked_prior.items():
    if asked and why is not None:
      raise UnclipError(f'{what}: without effect, as {why}')
  if samplings.upsampler != Sampling() and not config.upsamplers:
    raise UnclipError('settings of upsamplers: without effect, as this model has none')
  decoder = config.decoder
  reads_nothing = isinstance(decoder, KandinskyDecoderConfig) and decoder.text_width is None
  if given.z_i is not None and reads_nothing and any(caption.strip() for caption in captions):
    raise UnclipError(
      'a caption is without effect where z_i is given, as this decoder reads none: leave it empty'
    )


def _resolve(
  config: UnclipConfig, asked: Samplings, num_ups: int, eps_power: Mapping[str, np.ndarray]
) -> tuple[Any, Any, tuple[Any, ...]]:
  """Settings of prior, decoder and the upsamplers that run, or of the first where none does."""
  if not isinstance(asked.upsampler, Sampling):
    raise UnclipError(f'upsampler: give a Sampling, not {type(asked.upsampler).__name__}')
  own = asked.upsampler
  if (own.guidance_scale, own.guidance_rescale, own.guidance_interval) != (None, None, None):
    raise UnclipError('upsampler: it is not guided; give the guidance scale to the decoder')

  def resolve(name: str, stage: Any, sampling: Sampling) -> settings.StageSettings:
    power = eps_power.get(name.replace(' ', '_'))
    return settings.resolve(name, stage.diffusion, stage.sampling, sampling, power)

  prior = None
  if isinstance(config.prior, ArPriorConfig):
    prior = ar_settings.resolve('prior', config.prior.sampling, asked.prior)
  elif config.prior is not None:
    prior = resolve('prior', config.prior, asked.prior)
  decoder = resolve('decoder', config.decoder, asked.decoder)
  ups = enumerate(config.upsamplers[: max(1, num_ups)])
  return prior, decoder, tuple(resolve(f'upsampler {i}', up, asked.upsampler) for i, up in ups)


def _check_negative(negative_prompt: Any, guided: bool) -> str:
  """The caption that guidance leads away from."""
  if negative_prompt is None:
    return ''
  settings.check_text(negative_prompt, 'the negative prompt', allow_empty=True)
  if not guided:
    raise UnclipError(
      'the negative prompt is without effect as nothing is guided: give the decoder a guidance '
      'scale above 1'
    )
  return negative_prompt


def _noise_level(config: UnclipConfig, asked: Any) -> np.int32 | None:
  decoder = config.decoder
  if not isinstance(decoder, StableUnclipDecoderConfig):
    if asked is not None:
      raise UnclipError('the noise level is without effect: only Stable unCLIP noises its z_i')
    return None
  level = decoder.noise_level if asked is None else asked
  most = decoder.z_i_diffusion.num_steps - 1
  return np.int32(settings.check_count('the noise level', level, 0, most))


def _tile(config: UnclipConfig, tile: Any) -> int | None:
  if tile is None:
    return None
  if config.autoencoder is None:
    raise UnclipError('tiles are without effect: this model has no autoencoder')
  factor = config.autoencoder.factor
  settings.check_count('the size of a tile', tile, 4 * factor)
  if tile % factor:
    raise UnclipError(f'the size of a tile is {tile}: take a multiple of {factor}')
  return int(tile)


def _given_noise(
  config: UnclipConfig, noise: Any, n: int, num_candidates: int, num_upsamplers: int
) -> StartNoise:
  """The caller's noise, checked; what is for stages that do not run is dropped."""
  noise = StartNoise() if noise is None else noise
  if not isinstance(noise, StartNoise) or not isinstance(noise.upsamplers, Sequence):
    raise UnclipError('start_noise must be a StartNoise, with a tuple for the upsamplers')
  ups = (*noise.upsamplers, *[None] * num_upsamplers)[:num_upsamplers]
  prior = None
  if isinstance(config.prior, ArPriorConfig):
    if noise.prior is not None:
      raise UnclipError('start_noise.prior: an autoregressive prior begins from none: leave it out')
  elif config.prior is not None:
    shape = (num_candidates, config.prior.embed_dim)
    prior = given_array('start_noise.prior', noise.prior, n, shape)
  return StartNoise(
    prior,
    given_array('start_noise.decoder', noise.decoder, n, image_shape(config.decoder)),
    tuple(
      given_array(f'start_noise.upsamplers[{i}]', x, n, image_shape(config.upsamplers[i]))
      for i, x in enumerate(ups)
    ),
  )


def _known(config: UnclipConfig, given: Given, n: int) -> tuple[Any, Any]:
  """The picture that is to be completed and its mask, at the size of each stage."""
  decoder = config.decoder
  if given.image is None and given.mask is None:
    if not (isinstance(decoder, GlideDecoderConfig) and decoder.inpaints):
      return None, None
    # Without a picture all is to be painted.
    image, mask = np.zeros((1, 1, 1, 3), np.float32), np.ones((1, 1, 1), bool)
  elif not masks.completes(decoder):
    raise UnclipError('image and mask are without effect: this model completes no pictures')
  else:
    image, mask = _check_known(given, n)
  sizes = [stage.image_size for stage in (decoder, *config.upsamplers)]
  known = tuple(_spread(_resize(image, size, 'cubic'), n) for size in sizes)
  # Nearest neighbours: a pixel is known or it is not.
  rows = 1 - mask[..., None].astype(np.float32)
  return known, tuple(_spread(_resize(rows, size, 'nearest'), n) for size in sizes)


def _check_known(given: Given, n: int) -> tuple[np.ndarray, np.ndarray]:
  if given.image is None or given.mask is None:
    raise UnclipError('image and mask go together: give both')
  image, mask = as_array('image', given.image), as_array('mask', given.mask)
  if image.ndim != 4 or image.shape[0] not in (1, n) or image.shape[-1] != 3 or 0 in image.shape:
    raise UnclipError(f'image must be an array [{n} or 1, h, w, 3], not {list(image.shape)}')
  if mask.dtype != bool or mask.ndim != 3 or mask.shape[0] not in (1, n) or 0 in mask.shape:
    raise UnclipError(
      f'mask must be of booleans [{n} or 1, h, w], not {mask.dtype} {list(mask.shape)}'
    )
  if mask.shape[1:] != image.shape[1:3]:
    raise UnclipError(
      f'mask is of {list(mask.shape[1:])} pixels and image of {list(image.shape[1:3])}: they must '
      'be of one size'
    )
  if image.dtype == np.uint8:
    image = image / np.float32(127.5) - 1
  is_floating = jnp.issubdtype(image.dtype, jnp.floating)
  if not is_floating or not abs(image).max() <= 1:
    raise UnclipError('image must be uint8, or float in [-1, 1]')
  return image.astype(np.float32), mask


def _resize(x: np.ndarray, size: int, method: str) -> np.ndarray:
  if x.shape[1:3] == (size, size):
    return x
  resized = jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), method)
  return np.clip(np.asarray(resized), -1, 1)


def _spread(x: np.ndarray, n: int) -> np.ndarray:
  return np.broadcast_to(x, (n, *x.shape[1:]))
