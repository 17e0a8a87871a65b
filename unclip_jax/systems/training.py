"""How each stage trains, from its config alone: what a step is given, by shapes, and its loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.configs import (
  ArPriorConfig,
  ClipConfig,
  DecoderConfig,
  PriorConfig,
  TextConfig,
  UnclipConfig,
  UpsamplerConfig,
)
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.sharding import Mesh
from unclip_jax.stages import ar_prior, clip, decoder, diffusion_prior, upsampler
from unclip_jax.systems.apart import make_apart
from unclip_jax.systems.loading import expected_params
from unclip_jax.train.gradient_cache import EmbedFn
from unclip_jax.train.presets import Recipe
from unclip_jax.train.sam import make_sam_grad
from unclip_jax.train.state import GradFn
from unclip_jax.types import Array, Params, UnclipError

Loss = tuple[Array, dict[str, Array]]


class Training(NamedTuple):
  """The training of a stage, described by shapes.

  Attributes:
    stage: its name.
    config: its own.
    dtype: what the network computes in.
    params: what updates change, float32.
    constants: what else the loss is given, the same at each step: statistics, the empty caption.
    batch: a dict of pytrees of arrays [b, ...].
    loss_fn: (params, constants, batch, key) -> (loss, metrics).
    embed_fn: (params, batch, key) -> embeddings, of a loss that compares the examples of a batch;
      None where it is a mean over them.
  """

  stage: str
  config: Any
  dtype: Any
  params: Params
  constants: dict[str, Any]
  batch: dict[str, Any]
  loss_fn: Callable[[Params, dict[str, Any], dict[str, Any], Array], Loss]
  embed_fn: EmbedFn | None = None


def make_grad(
  training: Training,
  recipe: Recipe,
  constants: dict[str, Any],
  mesh: Mesh | None = None,
  fsdp: bool = False,
) -> GradFn:
  """The gradient of a stage's loss: (params, batch, key) -> ((loss, metrics), gradient).

  Args:
    training: of the stage.
    recipe: by which it trains, with SAM or without.
    constants: the arrays that `training.constants` describes.
    mesh: of the devices, for what each of them does by itself.
    fsdp: whether the parameters are split over its `data` axis.

  Raises:
    UnclipError: SAM is asked of a loss that is a mean over examples.
  """
  if recipe.sam_rho is not None:
    if training.embed_fn is None:
      raise UnclipError(f'{training.stage}: SAM is for CLIP: leave sam_rho out')
    return make_sam_grad(
      training.embed_fn,
      lambda params, embeddings: clip.loss_of_embeddings(params, *embeddings),
      recipe.sam_rho,
      recipe.sam_group,
      apart=None if mesh is None else make_apart(mesh, fsdp),
      dtype=training.dtype,
    )
  return jax.value_and_grad(
    lambda params, batch, key: training.loss_fn(params, constants, batch, key), has_aux=True
  )


def trained_stages(config: UnclipConfig) -> dict[str, Any]:
  """The stages that have a training here, with their configs."""
  found: dict[str, Any] = {}
  if config.clip is not None and config.clip.vision is not None and config.clip.text is not None:
    found['clip'] = config.clip
  if isinstance(config.prior, PriorConfig | ArPriorConfig):
    found['prior'] = config.prior
  if isinstance(config.decoder, DecoderConfig):
    found['decoder'] = config.decoder
  for i, stage in enumerate(config.upsamplers):
    if isinstance(stage, UpsamplerConfig):
      found[f'upsampler_{i}'] = stage
  return found


def describe_training(
  config: UnclipConfig, stage: str, batch_size: int, dtype: Any, remat: bool
) -> Training:
  """A stage's training.

  Args:
    config: of all stages.
    stage: one of `trained_stages`.
    batch_size: b.
    dtype: what the network computes in.
    remat: of the loss.

  Raises:
    UnclipError: there is no such stage.
  """
  stages = trained_stages(config)
  if stage not in stages:
    raise UnclipError(f'there is no stage {stage!r} to train: take {", ".join(stages)}')
  own, params = stages[stage], expected_params(config)[stage]
  if stage == 'prior':
    params = params['network']
  match own:
    case ClipConfig():
      given = _clip(own, batch_size, dtype, remat)
    case PriorConfig():
      given = _prior(own, batch_size, dtype, remat)
    case ArPriorConfig():
      given = _ar_prior(own, batch_size, dtype, remat)
    case DecoderConfig():
      given = _decoder(own, config.clip.text, batch_size, dtype, remat)
    case _:
      given = _upsampler(own, batch_size, dtype, remat)
  return Training(stage, own, dtype, params, *given)


def _clip(own: ClipConfig, b: int, dtype: Any, remat: bool) -> Any:
  size, length = own.vision.image_size, own.text.context_length
  batch = {'image': _floats(b, size, size, 3), 'text': _text(b, length)}

  def embed_fn(params: Params, batch: Any, key: Array) -> Any:
    text = batch['text']
    return clip.embed(own, params, batch['image'], text.ids, text.mask, dtype, remat)

  def loss_fn(params: Params, constants: Any, batch: Any, key: Array) -> Loss:
    return clip.loss_of_embeddings(params, *embed_fn(params, batch, key))

  return {}, batch, loss_fn, embed_fn


def _prior(own: PriorConfig, b: int, dtype: Any, remat: bool) -> Any:
  d, features = own.embed_dim, (own.context_length, own.text_width, own.embed_dim)
  statistics = diffusion_prior.Statistics(_floats(d), _floats(d))
  constants = {'statistics': statistics, 'null_text': _text(1, *features)}
  batch = {'z_i': _floats(b, d), 'text': _text(b, *features)}

  def loss_fn(params: Params, constants: Any, batch: Any, key: Array) -> Loss:
    given = constants['statistics'], batch['z_i'], batch['text'], constants['null_text'], key
    return diffusion_prior.loss(own, params, *given, dtype, remat)

  return constants, batch, loss_fn


def _ar_prior(own: ArPriorConfig, b: int, dtype: Any, remat: bool) -> Any:
  # With a Transformer of its own the states of CLIP's are not looked at.
  features = own.context_length, own.text_width if own.text is None else None, own.embed_dim
  constants = {'quantiser': ar_prior.quantiser_shapes(own), 'null_text': _text(1, *features)}
  batch = {'z_i': _floats(b, own.embed_dim), 'text': _text(b, *features)}

  def loss_fn(params: Params, constants: Any, batch: Any, key: Array) -> Loss:
    given = constants['quantiser'], batch['z_i'], batch['text'], constants['null_text'], key
    return ar_prior.loss(own, params, *given, dtype, remat)

  return constants, batch, loss_fn


def _decoder(own: DecoderConfig, text: TextConfig, b: int, dtype: Any, remat: bool) -> Any:
  if own.text is None:
    features = text.context_length, own.clip_text_width, own.embed_dim
  else:
    features = own.text.context_length, None, None
  size = own.image_size
  constants = {'null_text': _text(1, *features)}
  batch = {
    'image': _floats(b, size, size, 3),
    'z_i': _floats(b, own.embed_dim),
    'text': _text(b, *features),
  }

  def loss_fn(params: Params, constants: Any, batch: Any, key: Array) -> Loss:
    given = batch['image'], batch['z_i'], batch['text'], constants['null_text'], key
    return decoder.loss(own, params, *given, dtype, remat)

  return constants, batch, loss_fn


def _upsampler(own: UpsamplerConfig, b: int, dtype: Any, remat: bool) -> Any:
  crop = round(own.image_size * own.crop_fraction)
  low = crop * own.low_size // own.image_size
  batch = {'image': _floats(b, crop, crop, 3), 'low': _floats(b, low, low, 3)}

  def loss_fn(params: Params, constants: Any, batch: Any, key: Array) -> Loss:
    return upsampler.loss(own, params, batch['image'], batch['low'], key, dtype, remat)

  return {}, batch, loss_fn


def _text(
  b: int, length: int, width: int | None = None, embed_dim: int | None = None
) -> TextFeatures:
  """Features of captions, as far as a stage looks at them."""
  return TextFeatures(
    jax.ShapeDtypeStruct((b, length), jnp.int32),
    jax.ShapeDtypeStruct((b, length), bool),
    None if width is None else _floats(b, length, width),
    None if embed_dim is None else _floats(b, embed_dim),
  )


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)
