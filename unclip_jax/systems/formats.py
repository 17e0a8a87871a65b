"""What a model is: a folder of our own format, a pipeline of diffusers, a CLIP of others.

The config is read from the folder's files, whatever the model is called and however large it is.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from unclip_jax.config_json import from_json
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.systems import clip_formats, karlo_format
from unclip_jax.systems.checks import check_config
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import karlo
from unclip_jax.weights.folder import MANIFEST_NAME, read_manifest
from unclip_jax.weights.foreign_folder import (
  CONFIG_NAME,
  INDEX_NAME,
  find_weights,
  open_components,
  read_components,
)
from unclip_jax.weights.rules import read_params
from unclip_jax.weights.safetensors import load_params

TOKENIZER_FOLDER = 'tokenizer'
_FAMILIES = {name: family for family in (karlo,) for name in family.NAMES}


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
    tokenizer: of the captions.
    vocabulary: of the captions, None where the folder says nothing of it.
    stages: those that are there, by their names.
  """

  folder: epath.Path
  path: epath.Path
  written_by: str
  config: UnclipConfig
  tokenizer: Tokenizer
  vocabulary: Vocabulary | None
  stages: Mapping[str, Stage]


def open_model(folder: epath.Path) -> Model:
  """Opens a folder of any known format, or a CLIP that is one file.

  Raises:
    UnclipError: it is none, or its files are not valid; names the file and the remedy.
  """
  if not folder.exists():
    raise UnclipError(f'there is no model folder {folder}: check the path')
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
  if karlo_format.is_release(folder):
    return _open_karlo_release(folder)
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
  tokenizer = Tokenizer.load(manifest.tokenizer)
  stages = {
    name: Stage(functools.partial(_read_ours, file), (file,))
    for name, file in manifest.stages.items()
  }
  vocabulary = read_vocabulary(folder)
  return _checked(Model(folder, path, manifest.written_by, config, tokenizer, vocabulary, stages))


def _read_ours(path: epath.Path, expected: Params) -> Params:
  """A stage of ours, in a safetensors file or an Orbax checkpoint."""
  if not path.is_dir():
    return load_params(path, expected)
  from unclip_jax.weights.checkpoint import load_tree  # takes seconds to import

  return load_tree(path, expected)


def _open_pipeline(folder: epath.Path) -> Model:
  path = folder / INDEX_NAME
  name, components = read_components(folder)
  if name not in _FAMILIES:
    raise UnclipError(f'{path}: _class_name is {name!r}: only {", ".join(_FAMILIES)} can be opened')
  family = _FAMILIES[name]
  for extra in family.EXTRA:
    if (folder / extra).exists():
      components[extra] = folder / extra
  config = _checked_config(family.read_config(components), path)

  def stage(names: tuple[str, ...], rules: list[Any]) -> Stage:
    def read(expected: Params) -> Params:
      with open_components({name: components[name] for name in names}) as tensors:
        return read_params(tensors, rules, expected, str(folder), family.IGNORED)

    return Stage(read, tuple(find_weights(components[name]) for name in names))

  stages = {name: stage(names, rules) for name, (names, rules) in family.rules(config).items()}
  tokenizer = Tokenizer.from_transformers(components[family.TOKENIZER])
  return _checked(Model(folder, path, f'diffusers ({name})', config, tokenizer, None, stages))


def _open_karlo_release(folder: epath.Path) -> Model:
  release, name = karlo_format.open_release(folder), karlo_format.WRITTEN_BY
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
  text, tokenizer = model.config.clip.text, model.tokenizer
  if tokenizer.vocab_size > text.vocab_size or tokenizer.context_length != text.context_length:
    raise UnclipError(
      f'the tokenizer of {model.folder} has {tokenizer.vocab_size} entries and reads '
      f'{tokenizer.context_length} tokens, the model {text.vocab_size} and {text.context_length}: '
      'take the tokenizer of that model'
    )
  return model


def _checked_config(config: UnclipConfig, path: epath.Path) -> UnclipConfig:
  try:
    check_config(config)
  except UnclipError as error:
    raise UnclipError(f'{path}: {error}') from error
  return config
