"""A model folder as configs, parameters, tokenizer and vocabulary, checked against each other."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.errors import FlaxError

from unclip_jax.configs import (
  DiffusionConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
  ViTConfig,
  from_json,
)
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.sharding import Mesh, make_mesh, replicated
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.folder import MANIFEST_NAME, read_manifest
from unclip_jax.weights.safetensors import load_params, reach

DEFAULT = 'default'
DEGRADATIONS = ('blur', 'bsr')
DEFAULT_FOLDER = Path(__file__).parents[1] / 'assets' / 'default'


def find_folder(model: str | os.PathLike[str]) -> epath.Path:
  """The folder of a model: of the package's own for 'default', else as given.

  Raises:
    UnclipError: the package came without a model, the name is empty, or it is of a store that
      cannot be reached.
  """
  if not isinstance(model, str | os.PathLike) or not os.fspath(model):
    raise UnclipError(f"model {model!r}: give 'default' or a folder")
  if model != DEFAULT:
    return reach(model)
  if not (DEFAULT_FOLDER / MANIFEST_NAME).exists():
    raise UnclipError(
      'this installation came without a default model: install unclip-jax again, or give the '
      'folder of a model'
    )
  return epath.Path(DEFAULT_FOLDER)


def expected_params(config: UnclipConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
  """Names, shapes and types of all parameters, a tree of `jax.ShapeDtypeStruct`s for each stage.

  Floating parameters are of `dtype`; the statistics of the prior are float32 always, as they
  standardise float32 embeddings.
  """

  def shapes(init: Any, stage_config: Any) -> Params:
    tree = _init_shapes(init, stage_config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)

  row = jax.ShapeDtypeStruct((config.prior.embed_dim,), jnp.float32)
  prior = shapes(diffusion_prior.init, config.prior)
  return {
    'clip': shapes(clip.init, config.clip),
    'prior': {'network': prior, 'statistics': {'mean': row, 'std': row}},
    'decoder': shapes(decoder.init, config.decoder),
    **{
      f'upsampler_{i}': shapes(upsampler.init, stage) for i, stage in enumerate(config.upsamplers)
    },
  }


@functools.cache
def _init_shapes(init: Callable[[Any, Array], Params], stage_config: Any) -> Params:
  """Traced once a config: it takes as long as all else that opening a model does."""
  return jax.eval_shape(functools.partial(init, stage_config), jax.random.key(0))


def check_config(config: UnclipConfig) -> None:
  """Checks that the stages fit together, and that each can be built as it is meant.

  Raises:
    UnclipError: not so; names the fields.
  """
  _check_stages_meet(config)
  prior, decoder = config.prior, config.decoder
  _check_heads('prior', prior.width, prior.num_heads)
  towers = {
    'clip.text': config.clip.text,
    'clip.vision': config.clip.vision,
    'decoder.text': decoder.text,
  }
  for name, tower in towers.items():
    if isinstance(tower, TextConfig | ViTConfig):
      _check_heads(name, tower.width, tower.num_heads)
  _check_diffusion('prior', prior.diffusion)
  if prior.diffusion.learned_variance:
    raise UnclipError('prior.diffusion.learned_variance is true: the prior predicts no variance')
  stages = {'decoder': decoder}
  stages |= {f'upsamplers.{i}': stage for i, stage in enumerate(config.upsamplers)}
  for name, stage in stages.items():
    _check_diffusion(name, stage.diffusion)
    _check_unet(f'{name}.unet', stage.unet, stage.diffusion.learned_variance)
  for name in ('z_i_noise', 'draft_size'):
    if not 0 <= getattr(decoder, name) < math.inf:
      raise UnclipError(f'decoder.{name} is {getattr(decoder, name):g}: take 0 or more')
  draft = decoder.draft_size
  if draft and decoder.draft_width < 1:
    raise UnclipError(f'decoder.draft_width is {decoder.draft_width}: take 1 or more')
  wanted = decoder.unet.in_channels if draft else 0
  if decoder.unet.condition_channels != wanted:
    raise UnclipError(
      f'decoder.unet.condition_channels is {decoder.unet.condition_channels}: with a '
      f'decoder.draft_size of {draft} it must be {wanted}'
    )
  if draft and decoder.image_size % draft:
    raise UnclipError(
      f'decoder.draft_size is {draft}: it must divide decoder.image_size, {decoder.image_size}'
    )
  for name, stage in {'prior': prior, **stages}.items():
    try:
      common.make_plan(stage.diffusion, stage.sampling)
      common.make_sampler(stage.sampling.sampler, stage.sampling.variance)
    except UnclipError as error:
      raise UnclipError(f'{name}.sampling: {error}') from error
  shares = {
    'prior.text_drop': prior.text_drop,
    'decoder.text_drop': decoder.text_drop,
    'decoder.image_drop': decoder.image_drop,
  }
  for i, stage in enumerate(config.upsamplers):
    if stage.degradation not in DEGRADATIONS:
      raise UnclipError(
        f'upsamplers.{i}.degradation is {stage.degradation!r}: take one of '
        f'{", ".join(DEGRADATIONS)}'
      )
    if stage.keep_low and (stage.low_size < 1 or stage.image_size % stage.low_size):
      raise UnclipError(
        f'upsamplers.{i}.low_size is {stage.low_size}: with keep_low it must divide '
        f'upsamplers.{i}.image_size, {stage.image_size}'
      )
    shares[f'upsamplers.{i}.crop_fraction'] = stage.crop_fraction
    shares[f'upsamplers.{i}.blur_fraction'] = stage.blur_fraction
    shares[f'upsamplers.{i}.low_noise'] = stage.low_noise
  for name, share in shares.items():
    if not 0 <= share <= 1:
      raise UnclipError(f'{name} is {share:g}: take a fraction from 0 to 1')


def _check_stages_meet(config: UnclipConfig) -> None:
  text, size = config.clip.text, config.decoder.image_size
  meet = [
    ('clip.embed_dim', config.clip.embed_dim, 'prior.embed_dim', config.prior.embed_dim),
    ('clip.embed_dim', config.clip.embed_dim, 'decoder.embed_dim', config.decoder.embed_dim),
    ('clip.text.width', text.width, 'prior.text_width', config.prior.text_width),
    (
      'clip.text.context_length', text.context_length,
      'prior.context_length', config.prior.context_length,
    ),
  ]  # fmt: skip
  if config.decoder.text is not None:
    meet += [
      (
        'clip.text.context_length', text.context_length,
        'decoder.text.context_length', config.decoder.text.context_length,
      ),
      (
        'clip.text.vocab_size', text.vocab_size,
        'decoder.text.vocab_size', config.decoder.text.vocab_size,
      ),
    ]  # fmt: skip
  else:
    width = config.decoder.clip_text_width
    meet.append(('clip.text.width', text.width, 'decoder.clip_text_width', width))
  for i, stage in enumerate(config.upsamplers):
    meet.append(('the size before it', size, f'upsamplers.{i}.low_size', stage.low_size))
    size = stage.image_size
  for name, value, other_name, other in meet:
    if value != other:
      raise UnclipError(f'{name} is {value}, but {other_name} is {other}: they must be equal')


def _check_heads(name: str, width: int, num_heads: int) -> None:
  if num_heads < 1 or width % num_heads:
    raise UnclipError(f'{name}.num_heads is {num_heads}: it must divide {name}.width, {width}')


def _check_diffusion(name: str, diffusion: DiffusionConfig) -> None:
  words = {
    'schedule': (diffusion.schedule, ('cosine', 'linear')),
    'prediction': (diffusion.prediction, ('eps', 'x_0', 'v')),
  }
  for field, (word, known) in words.items():
    if word not in known:
      raise UnclipError(f'{name}.diffusion.{field} is {word!r}: take one of {", ".join(known)}')
  if diffusion.clip_x_0 is not None and not diffusion.clip_x_0 > 0:
    raise UnclipError(f'{name}.diffusion.clip_x_0 is {diffusion.clip_x_0:g}: take more than 0')
  percentile = diffusion.dynamic_threshold
  if percentile is not None and not 50 <= percentile <= 100:
    raise UnclipError(
      f'{name}.diffusion.dynamic_threshold is {percentile:g}: take a percentile from 50 to 100'
    )


def _check_unet(name: str, unet: UNetConfig, learned_variance: bool) -> None:
  wanted = unet.in_channels * (2 if learned_variance else 1)
  if unet.out_channels != wanted:
    variance = 'learned' if learned_variance else 'not learned'
    raise UnclipError(
      f'{name}.out_channels is {unet.out_channels}: with {unet.in_channels} in_channels and a '
      f'variance that is {variance} it must be {wanted}'
    )
  if not 0 <= unet.dropout < 1:
    raise UnclipError(f'{name}.dropout is {unet.dropout:g}: take 0 or more, and less than 1')
  levels = range(len(unet.multipliers))
  for level in unet.attention_levels:
    if level not in levels:
      raise UnclipError(f'{name}.attention_levels has {level}: there are {len(levels)} levels')
  # Wherever there is attention there is some in the middle, at the last level's width.
  for level in {*unet.attention_levels, *levels[-1:]} if unet.attention_levels else ():
    channels = unet.channels * unet.multipliers[level]
    if unet.head_dim < 1 or channels % unet.head_dim:
      raise UnclipError(
        f'{name}.head_dim is {unet.head_dim}: it must divide the {channels} channels of level '
        f'{level}'
      )


def read_config(folder: epath.Path) -> UnclipConfig:
  """The config of a model folder.

  Raises:
    UnclipError: the folder is no model, or its config is not valid.
  """
  path = folder / MANIFEST_NAME
  config = from_json(UnclipConfig, read_manifest(folder).config, f'{path}: config')
  try:
    check_config(config)
  except UnclipError as error:
    raise UnclipError(f'{path}: {error}') from error
  return config


def read_vocabulary(folder: epath.Path) -> Vocabulary | None:
  """The words that a model folder says it was trained on, None where it says nothing of them.

  Raises:
    UnclipError: the folder is no model, or its vocabulary is not valid.
  """
  path = read_manifest(folder).vocabulary
  return None if path is None else Vocabulary.load(path)


def load_parts(
  model: str | os.PathLike[str], dtype: np.dtype, num_devices: int
) -> tuple[UnclipConfig, dict[str, Params], Tokenizer, Mesh | None, Vocabulary | None]:
  """Config, parameters, tokenizer, devices, vocabulary; `unclip.load` says what is raised."""
  folder = find_folder(model)
  config = read_config(folder)
  manifest = read_manifest(folder)
  tokenizer = Tokenizer.load(manifest.tokenizer)
  vocabulary = read_vocabulary(folder)
  text = config.clip.text
  if tokenizer.vocab_size > text.vocab_size or tokenizer.context_length != text.context_length:
    raise UnclipError(
      f'{manifest.tokenizer} has {tokenizer.vocab_size} entries and reads '
      f'{tokenizer.context_length} tokens, the model {text.vocab_size} and {text.context_length}: '
      'take the tokenizer of that model'
    )
  mesh = None if num_devices == 1 else make_mesh(num_devices)
  try:
    expected = expected_params(config, dtype)
  except (ArithmeticError, TypeError, ValueError, FlaxError) as error:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'{folder / MANIFEST_NAME}: no network can be built from this config ({first})'
    ) from error
  if unknown := sorted(manifest.stages.keys() - expected.keys()):
    raise UnclipError(
      f'{folder / MANIFEST_NAME} names a stage {unknown[0]!r}, which its config does not have: it '
      f'has {", ".join(expected)}'
    )
  if mesh is not None:
    place = replicated(mesh)
    expected = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), expected
    )
  params = {
    name: load_params(manifest.stages[name], expected[name])
    for name in expected
    if name in manifest.stages
  }
  return config, params, tokenizer, mesh, vocabulary
