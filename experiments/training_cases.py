"""What `bench_training` trains: each stage's own loss on random data of the right shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig, UpsamplerConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import clip, decoder, diffusion_prior, upsampler
from unclip_jax.systems.bench_figures import stage_config
from unclip_jax.systems.stage_calls import random_params
from unclip_jax.types import Array, Params, UnclipError

# Few layers of the full width: a step takes as long a layer, and fits into one device.
SLICE = {
  'clip': ('clip.text.depth=2', 'clip.vision.depth=2'),
  'prior': ('prior.depth=2',),
  'decoder': ('decoder.unet.num_res_blocks=1',),
  'upsampler_0': ('upsamplers.0.unet.num_res_blocks=1',),
  'upsampler_1': ('upsamplers.1.unet.num_res_blocks=1',),
}


class Case(NamedTuple):
  """The training of one stage.

  Attributes:
    stage: its name.
    config: of all stages, what training drops at random kept.
    params: of the stage, its statistics included.
    batch: a pytree of arrays [b, ...].
    loss_fn: (what is trained of params, batch, key) -> (loss, metrics).
  """

  stage: str
  config: UnclipConfig
  params: Params
  batch: dict[str, Any]
  loss_fn: Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]

  @property
  def trained(self) -> Params:
    """The parameters that updates change."""
    return self.params['network'] if self.stage == 'prior' else self.params


def stages(config: UnclipConfig) -> list[str]:
  """The stages that have a training here."""
  known = ['clip'] if config.clip is not None and config.clip.vision is not None else []
  known += ['prior'] if isinstance(config.prior, PriorConfig) else []
  known += ['decoder'] if isinstance(config.decoder, DecoderConfig) else []
  ours = enumerate(config.upsamplers)
  return known + [f'upsampler_{i}' for i, up in ours if isinstance(up, UpsamplerConfig)]


def make_case(config: UnclipConfig, stage: str, batch_size: int, dtype: Any, remat: bool) -> Case:
  """A stage's training on random data.

  Args:
    config: of all stages.
    stage: one of `stages(config)`.
    batch_size: examples.
    dtype: what the network computes in; parameters are float32.
    remat: of the stage's loss.

  Raises:
    UnclipError: there is no such stage.
  """
  if stage not in stages(config):
    raise UnclipError(f'there is no stage {stage!r} to train: take {", ".join(stages(config))}')
  config = _keep_all(config, stage)
  own, rng = stage_config(config, stage), np.random.default_rng(0)
  params = random_params(config, stage, jnp.float32)
  match stage:
    case 'clip':
      batch, loss_fn = _clip(config, rng, batch_size, dtype, remat)
    case 'prior':
      batch, loss_fn = _prior(config, rng, batch_size, params, dtype, remat)
    case 'decoder':
      batch, loss_fn = _decoder(config, rng, batch_size, dtype, remat)
    case _:
      batch, loss_fn = _upsampler(own, rng, batch_size, dtype, remat)
  return Case(stage, config, params, jax.tree.map(jnp.asarray, batch), loss_fn)


def _keep_all(config: UnclipConfig, stage: str) -> UnclipConfig:
  """Without dropped captions and embeddings, which a peer would have to draw alike."""
  match stage:
    case 'clip':  # cosines are what a contrastive loss compares
      clip_config = dataclasses.replace(config.clip, unit_norm=True)
      return dataclasses.replace(config, clip=clip_config)
    case 'prior':
      return dataclasses.replace(config, prior=dataclasses.replace(config.prior, text_drop=0.0))
    case 'decoder':
      own = dataclasses.replace(config.decoder, text_drop=0.0, image_drop=0.0)
      return dataclasses.replace(config, decoder=own)
  return config


def _clip(config: UnclipConfig, rng: np.random.Generator, b: int, dtype: Any, remat: bool) -> Any:
  own = config.clip
  text = _text(rng, b, own.text.context_length, own.text.vocab_size)
  size = own.vision.image_size
  batch = {'image': _images(rng, b, size), 'ids': text.ids, 'mask': text.mask}

  def loss_fn(params: Params, batch: Any, key: Array) -> Any:
    given = batch['image'], batch['ids'], batch['mask']
    return clip.loss(own, params, *given, dtype=dtype, remat=remat)

  return batch, loss_fn


def _prior(
  config: UnclipConfig,
  rng: np.random.Generator,
  b: int,
  params: Params,
  dtype: Any,
  remat: bool,
) -> Any:
  own = config.prior
  features = own.context_length, config.clip.text.vocab_size, own.text_width, own.embed_dim
  null_text = jax.tree.map(jnp.asarray, _text(rng, 1, *features))
  batch = {'z_i': _normal(rng, b, own.embed_dim), 'text': _text(rng, b, *features)}
  statistics = diffusion_prior.Statistics(**params['statistics'])

  def loss_fn(params: Params, batch: Any, key: Array) -> Any:
    given = statistics, batch['z_i'], batch['text'], null_text, key
    return diffusion_prior.loss(own, params, *given, dtype, remat)

  return batch, loss_fn


def _decoder(
  config: UnclipConfig, rng: np.random.Generator, b: int, dtype: Any, remat: bool
) -> Any:
  own = config.decoder
  if own.text is None:
    length, vocab_size = config.clip.text.context_length, config.clip.text.vocab_size
    features = length, vocab_size, own.clip_text_width, own.embed_dim
  else:
    features = own.text.context_length, own.text.vocab_size
  null_text = jax.tree.map(jnp.asarray, _text(rng, 1, *features))
  batch = {
    'image': _images(rng, b, own.image_size),
    'z_i': _normal(rng, b, own.embed_dim),
    'text': _text(rng, b, *features),
  }

  def loss_fn(params: Params, batch: Any, key: Array) -> Any:
    given = batch['image'], batch['z_i'], batch['text'], null_text, key
    return decoder.loss(own, params, *given, dtype, remat)

  return batch, loss_fn


def _upsampler(
  own: UpsamplerConfig, rng: np.random.Generator, b: int, dtype: Any, remat: bool
) -> Any:
  crop = round(own.image_size * own.crop_fraction)
  batch = {
    'image': _images(rng, b, crop),
    'low': _images(rng, b, crop * own.low_size // own.image_size),
  }

  def loss_fn(params: Params, batch: Any, key: Array) -> Any:
    return upsampler.loss(own, params, batch['image'], batch['low'], key, dtype, remat)

  return batch, loss_fn


def _text(
  rng: np.random.Generator,
  b: int,
  length: int,
  vocab_size: int,
  width: int | None = None,
  embed_dim: int | None = None,
) -> TextFeatures:
  """Captions of all lengths that end with the last word of the vocabulary, CLIP's end of text."""
  ends = rng.integers(2, length + 1, (b, 1))
  places = np.arange(length)[None]
  ids = np.where(places < ends - 1, rng.integers(1, vocab_size - 1, (b, length)), 0)
  ids = np.where(places == ends - 1, vocab_size - 1, ids)
  return TextFeatures(
    ids.astype(np.int32),
    places < ends,
    None if width is None else _normal(rng, b, length, width),
    None if embed_dim is None else _normal(rng, b, embed_dim),
  )


def _images(rng: np.random.Generator, b: int, size: int) -> np.ndarray:
  return rng.uniform(-1, 1, (b, size, size, 3)).astype(np.float32)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.standard_normal(shape, np.float32)
