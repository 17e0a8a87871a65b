"""CLIP from the files of others: transformers' folder, open_clip's folder, OpenAI's archive."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from unclip_jax.configs import ClipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import open_clip, openai_clip, transformers_clip
from unclip_jax.weights.foreign_config import read_json
from unclip_jax.weights.foreign_folder import CONFIG_NAME, find_weights
from unclip_jax.weights.rules import read_params
from unclip_jax.weights.tensor_files import open_tensors

_ENDINGS = ('.pt', '.bin', '.safetensors')


class ForeignClip(NamedTuple):
  """A CLIP, opened as far as its config.

  Attributes:
    path: of the file that says what it is.
    written_by: the program that wrote it.
    config: of both towers.
    tokenizer: of the captions.
    weights: the file, or the index of several, that holds the tensors.
    read: given the parameters expected (`jax.ShapeDtypeStruct`s), reads them.
  """

  path: epath.Path
  written_by: str
  config: ClipConfig
  tokenizer: Tokenizer
  weights: epath.Path
  read: Callable[[Params], Params]


def is_folder_of_open_clip(folder: epath.Path) -> bool:
  """Whether a folder is open_clip's. One of transformers may have the config of open_clip too."""
  if not (folder / open_clip.CONFIG_NAME).exists():
    return False
  return open_clip.find_weights(folder) is not None or not (folder / CONFIG_NAME).exists()


def open_transformers(folder: epath.Path) -> ForeignClip:
  """Opens the folder of a `CLIPModel` of transformers.

  Raises:
    UnclipError: it is none, or asks for what ours does not do.
  """
  path = folder / CONFIG_NAME
  values = read_json(path)
  if (kind := values.get('model_type')) != 'clip':
    raise UnclipError(f'{path}: model_type is {kind!r}: only clip can be opened')
  clip = transformers_clip.read_model_config(folder)
  weights = find_weights(folder)

  def read(expected: Params) -> Params:
    with open_tensors(weights) as tensors:
      rules = transformers_clip.rules(clip)
      return read_params(tensors, rules, expected, str(weights), transformers_clip.IGNORED)

  tokenizer = Tokenizer.from_transformers(folder)
  return ForeignClip(path, 'transformers (CLIPModel)', clip, tokenizer, weights, read)


def open_open_clip(folder: epath.Path) -> ForeignClip:
  """Opens a folder of open_clip.

  Raises:
    UnclipError: its weights are missing, or it asks for what ours does not do.
  """
  weights = open_clip.find_weights(folder)
  if weights is None:
    names = ' or '.join(open_clip.WEIGHTS_NAMES)
    raise UnclipError(f'{folder} has no {names}: copy or download the model again')
  return _open_with_config(weights, folder / open_clip.CONFIG_NAME)


def open_file(path: epath.Path) -> ForeignClip:
  """Opens a file of tensors: an archive of OpenAI, or a file beside a config of open_clip.

  Raises:
    UnclipError: it is neither, or its shapes are those of another model.
  """
  if path.suffix not in _ENDINGS:
    raise UnclipError(
      f'{path} is a file: give the folder of a model, or a CLIP ({", ".join(_ENDINGS)})'
    )
  config_path = path.parent / open_clip.CONFIG_NAME
  with open_tensors(path) as tensors:
    names = tensors.names()
    if not openai_clip.is_clip(names):
      raise UnclipError(
        f'{path} holds no CLIP by the names of OpenAI and open_clip: give the folder of a model'
      )
    if openai_clip.is_openai(names):
      clip = openai_clip.read_config(tensors, str(path))
      return _make(path, path, 'OpenAI (CLIP)', clip)
  if not config_path.exists():
    # Another activation, or another number of heads, would give wrong embeddings.
    raise UnclipError(
      f'{path} is no archive of OpenAI, and says neither its heads nor its activation: put the '
      f'{open_clip.CONFIG_NAME} of the model beside it'
    )
  return _open_with_config(path, config_path)


def _open_with_config(weights: epath.Path, path: epath.Path) -> ForeignClip:
  with open_tensors(weights) as tensors:
    clip = open_clip.read_config(read_json(path), str(path), tensors, str(weights))
  return _make(path, weights, 'open_clip', clip)


def _make(path: epath.Path, weights: epath.Path, written_by: str, clip: ClipConfig) -> ForeignClip:
  tokenizer = Tokenizer.clip(clip.text.context_length, pad_id=0)
  read = functools.partial(_read, weights, clip)
  return ForeignClip(path, written_by, clip, tokenizer, weights, read)


def _read(weights: epath.Path, clip: ClipConfig, expected: Params) -> Params:
  with open_tensors(weights) as tensors:
    is_linear = openai_clip.LINEAR_PROJECTION in tensors.names()
    rules = openai_clip.rules(clip, linear_projection=is_linear)
    return read_params(tensors, rules, expected, str(weights), openai_clip.IGNORED)
