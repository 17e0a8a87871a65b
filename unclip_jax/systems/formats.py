"""What a model is: a folder of our own format, a pipeline of diffusers, a CLIP of others.

The config is read from the folder's files, whatever the model is called and however large it is.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from unclip_jax.config_json import from_json
from unclip_jax.configs import ArPriorConfig, UnclipConfig, XlmRobertaConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.systems import clip_formats, glide_format, karlo_format, pipelines
from unclip_jax.systems.checks import check_config
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.folder import (
  EPS_POWER_NAME,
  MANIFEST_NAME,
  read_eps_power,
  read_manifest,
)
from unclip_jax.weights.foreign_folder import (
  CONFIG_NAME,
  INDEX_NAME,
  find_weights,
  open_components,
)
from unclip_jax.weights.rules import read_params
from unclip_jax.weights.safetensors import load_params


class Stage(NamedTuple):
  """Where the parameters of a stage come from.

  Attributes:
    read: given the parameters expected (`jax.ShapeDtypeStruct`s), reads them.
    paths: of the files, for their sizes.
  """

  read: Callable[[Params], Params]
  paths: tuple[epath.Path, ...]


class Model(NamedTuple):
  """A model folder, opened as far as its configs; no weights are read yet.

  Attributes:
    folder: of the model, or the one file that it is.
    path: of the file that says what it is.
    written_by: the program that wrote it.
    config: of the stages.
    tokenizer: of the captions; None where the decoder alone reads them.
    vocabulary: of the captions, None where the folder says nothing of it.
    stages: those that are there, by their names.
    decoder_tokenizer: of a decoder with a text encoder of its own.
    eps_power: of stages, [T] the mean square of the noise that they predict, where it was measured.
  """

  folder: epath.Path
  path: epath.Path
  written_by: str
  config: UnclipConfig
  tokenizer: Tokenizer | None
  vocabulary: Vocabulary | None
  stages: Mapping[str, Stage]
  decoder_tokenizer: Tokenizer | None = None
  eps_power: Mapping[str, np.ndarray] = MappingProxyType({})


def open_model(folder: epath.Path, prior: epath.Path | None = None) -> Model:
  """Opens a folder of any known format, or a CLIP that is one file.

  Args:
    folder: of the model.
    prior: a pipeline of diffusers whose CLIP and prior are taken, for decoders that were published
      without one.

  Raises:
    UnclipError: it is none, or its files are not valid; names the file and the remedy.
  """
  for path in filter(None, (folder, prior)):
    if not path.exists():
      raise UnclipError(f'there is no model folder {path}: check the path')
  if prior is not None:
    if not (folder / INDEX_NAME).exists():
      raise UnclipError(f'{folder} takes no prior of another model: leave {prior} out')
    return _open_pipeline(folder, prior)
  if folder.is_file():
    return _clip_alone(folder, clip_formats.open_file(folder))
  if (folder / MANIFEST_NAME).exists():
    return _open_ours(folder)
  if (folder / INDEX_NAME).exists():
    return _open_pipeline(folder)
  if clip_formats.is_folder_of_open_clip(folder):
    return _clip_alone(folder, clip_formats.open_open_clip(folder))
  if (folder / CONFIG_NAME).exists():
    return _clip_alone(folder, clip_formats.open_transformers(folder))
  for release in (karlo_format, glide_format):
    if release.is_release(folder):
      return _open_release(folder, release)
  raise UnclipError(
    f'{folder} is not a model: it has no {MANIFEST_NAME}, {INDEX_NAME} or {CONFIG_NAME}; give the '
    'folder that does'
  )


def read_vocabulary(folder: epath.Path) -> Vocabulary | None:
  """The words that a model folder of ours says it was trained on, None where it says nothing.

  Raises:
    UnclipError: the folder is no model, or its vocabulary is not valid.
  """
  path = read_manifest(folder).vocabulary
  return None if path is None else Vocabulary.load(path)


def _open_ours(folder: epath.Path) -> Model:
  manifest, path = read_manifest(folder), folder / MANIFEST_NAME
  config = from_json(UnclipConfig, manifest.config, f'{path}: config')
  files = (manifest.tokenizer, manifest.decoder_tokenizer)
  tokenizer, decoder_tokenizer = (file and Tokenizer.load(file) for file in files)
  stages = {
    name: Stage(functools.partial(_read_ours, file), (file,))
    for name, file in manifest.stages.items()
  }
  vocabulary = read_vocabulary(folder)
  written_by = manifest.written_by
  model = _checked(
    Model(folder, path, written_by, config, tokenizer, vocabulary, stages, decoder_tokenizer)
  )
  return model._replace(eps_power=_checked_eps_power(folder, config))


def _checked_eps_power(folder: epath.Path, config: UnclipConfig) -> Mapping[str, np.ndarray]:
  """The statistics of a folder, which are of its stages and their schedules.

  Raises:
    UnclipError: not so, or the file is damaged.
  """
  path, known = folder / EPS_POWER_NAME, diffusion_stages(config)
  remedy = 'remove the file, or measure again (experiments/emoji/measure_noise.py)'
  eps_power = read_eps_power(folder)
  for name, power in eps_power.items():
    if name not in known:
      raise UnclipError(f'{path} has statistics of {name}, which samples nothing here: {remedy}')
    if len(power) != known[name].diffusion.num_steps:
      raise UnclipError(
        f'{path}: the statistics of the {name} are of {len(power)} timesteps, and its schedule has '
        f'{known[name].diffusion.num_steps}: {remedy}'
      )
    if power.min() < 0 or power.max() > 1:
      raise UnclipError(f'{path}: the statistics of the {name} are not within 0..1: {remedy}')
  return eps_power


def diffusion_stages(config: UnclipConfig) -> dict[str, Any]:
  """The configs of the stages that are sampled by denoising, by their names, in their order."""
  prior = None if isinstance(config.prior, ArPriorConfig) else config.prior
  stages = {'prior': prior, 'decoder': config.decoder}
  stages |= {f'upsampler_{i}': stage for i, stage in enumerate(config.upsamplers)}
  return {name: stage for name, stage in stages.items() if stage is not None}


def _read_ours(path: epath.Path, expected: Params) -> Params:
  """A stage of ours, in a safetensors file or an Orbax checkpoint."""
  if not path.is_dir():
    return load_params(path, expected)
  from unclip_jax.weights.checkpoint import load_tree  # takes seconds to import

  return load_tree(path, expected)


def _open_pipeline(folder: epath.Path, prior: epath.Path | None = None) -> Model:
  path = folder / INDEX_NAME
  name, family, components = pipelines.find_components(folder, prior)
  try:
    config = _checked_config(family.read_config(components), path)
  except UnclipError as error:
    if prior is None:
      raise
    raise UnclipError(f'{folder} and the prior {prior} do not go together: {error}') from error

  def stage(names: tuple[str, ...], rules: Any) -> Stage:
    def read(expected: Params) -> Params:
      with open_components({name: components[name] for name in names}) as tensors:
        # Some rules depend on which of its names an older file has.
        chosen = rules(tensors.names()) if callable(rules) else rules
        return read_params(tensors, chosen, expected, str(folder), family.IGNORED)

    return Stage(read, tuple(find_weights(components[name]) for name in names))

  stages = {name: stage(names, rules) for name, (names, rules) in family.rules(config).items()}
  tokenizer = decoder_tokenizer = None
  if family.TOKENIZER in components:
    tokenizer = Tokenizer.from_transformers(components[family.TOKENIZER])
  if config.decoder_text is not None:
    of_xlm = isinstance(config.decoder_text, XlmRobertaConfig)
    read_tokenizer = Tokenizer.from_xlm_roberta if of_xlm else Tokenizer.from_transformers
    decoder_tokenizer = read_tokenizer(components[family.DECODER_TOKENIZER])
  written_by = f'diffusers ({name})'
  return _checked(
    Model(folder, path, written_by, config, tokenizer, None, stages, decoder_tokenizer)
  )


def _open_release(folder: epath.Path, release_format: ModuleType) -> Model:
  release, name = release_format.open_release(folder), release_format.WRITTEN_BY
  stages = {stage: Stage(read, paths) for stage, (read, paths) in release.stages.items()}
  return _checked(Model(folder, folder, name, release.config, release.tokenizer, None, stages))


def _clip_alone(folder: epath.Path, clip: clip_formats.ForeignClip) -> Model:
  config = UnclipConfig(clip=clip.config, prior=None, decoder=None)
  stages = {'clip': Stage(clip.read, (clip.weights,))}
  return _checked(Model(folder, clip.path, clip.written_by, config, clip.tokenizer, None, stages))


def _checked(model: Model) -> Model:
  """The model, whose config can be built and whose tokenizer fits it.

  Raises:
    UnclipError: not so.
  """
  _checked_config(model.config, model.path)
  config = model.config
  own_text = getattr(config.decoder, 'text', None)
  of_clip = own_text if config.clip is None else config.clip.text
  readers = [(model.tokenizer, of_clip), (model.decoder_tokenizer, config.decoder_text)]
  for tokenizer, text in readers:
    if text is None:
      continue
    if tokenizer is None:
      raise UnclipError(f'{model.folder} has no tokenizer: copy or download the model again')
    if tokenizer.vocab_size > text.vocab_size or tokenizer.context_length != text.context_length:
      raise UnclipError(
        f'the tokenizer of {model.folder} has {tokenizer.vocab_size} entries and reads '
        f'{tokenizer.context_length} tokens, the model {text.vocab_size} and '
        f'{text.context_length}: take the tokenizer of that model'
      )
  return model


def _checked_config(config: UnclipConfig, path: epath.Path) -> UnclipConfig:
  try:
    check_config(config)
  except UnclipError as error:
    raise UnclipError(f'{path}: {error}') from error
  return config
