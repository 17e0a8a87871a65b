"""What `bench_training` trains: each stage's own loss on random data of the right shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import PriorConfig, UnclipConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import ar_prior, diffusion_prior
from unclip_jax.systems.stage_calls import random_params
from unclip_jax.systems.training import Training, describe_training
from unclip_jax.types import Array, Params

_IMAGE_AXES = 4

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


def make_case(config: UnclipConfig, stage: str, batch_size: int, dtype: Any, remat: bool) -> Case:
  """A stage's training on random data.

  Args:
    config: of all stages.
    stage: one of `trained_stages(config)`.
    batch_size: examples.
    dtype: what the network computes in; parameters are float32.
    remat: of the stage's loss.
  """
  config = _keep_all(config, stage)
  training = describe_training(config, stage, batch_size, dtype, remat)
  params = random_params(config, stage, jnp.float32)
  rng, last_word = np.random.default_rng(0), _vocab_size(config, stage) - 1
  constants = _constants(training, params, rng, last_word)
  batch = {name: _draw(rng, shapes, last_word) for name, shapes in training.batch.items()}

  def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
    return training.loss_fn(params, constants, batch, key)

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


def _vocab_size(config: UnclipConfig, stage: str) -> int:
  own = getattr(config.decoder if stage == 'decoder' else config.prior, 'text', None)
  return (config.clip.text if own is None else own).vocab_size


def _constants(
  training: Training, params: Params, rng: np.random.Generator, last_word: int
) -> dict[str, Any]:
  """What the loss is given beside the batch: what is measured of a data set, and no caption."""
  found: dict[str, Any] = {}
  if 'null_text' in training.constants:
    text = _draw(rng, training.constants['null_text'], last_word)
    found['null_text'] = jax.tree.map(jnp.asarray, text)
  if training.stage == 'prior' and isinstance(training.config, PriorConfig):
    found['statistics'] = diffusion_prior.Statistics(**params['statistics'])
  elif training.stage == 'prior':
    found['quantiser'] = ar_prior.Quantiser(**params['quantiser'])
  return found


def _draw(rng: np.random.Generator, shapes: Any, last_word: int) -> Any:
  """Captions, images in [-1, 1], or normal numbers, by their shapes."""
  if isinstance(shapes, TextFeatures):
    return _text(rng, shapes, last_word)
  if len(shapes.shape) == _IMAGE_AXES:
    return rng.uniform(-1, 1, shapes.shape).astype(np.float32)
  return rng.standard_normal(shapes.shape, np.float32)


def _text(rng: np.random.Generator, shapes: TextFeatures, last_word: int) -> TextFeatures:
  """Captions of all lengths that end with the last word of the vocabulary, CLIP's end of text."""
  b, length = shapes.ids.shape
  ends = rng.integers(2, length + 1, (b, 1))
  places = np.arange(length)[None]
  ids = np.where(places < ends - 1, rng.integers(1, last_word, (b, length)), 0)
  ids = np.where(places == ends - 1, last_word, ids)
  features = (
    None if own is None else _draw(rng, own, last_word) for own in (shapes.states, shapes.z_t)
  )
  return TextFeatures(ids.astype(np.int32), places < ends, *features)
