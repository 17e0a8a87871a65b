"""A model as a folder: `unclip.json`, one safetensors file a stage, the tokenizer.

The folder is the same whether shipped, trained, converted or on a hub. `unclip.json`, version 1:

  {"format_version": 1,
   "written_by": "unclip_jax 0.1.0",             what wrote it, for people
   "config": {...},                              the configs; what is in them is for the caller
   "stages": {"prior": "prior.safetensors"},     file names, relative to the folder
   "tokenizer": "tokenizer.json",                absent where the decoder alone reads captions
   "decoder_tokenizer": "decoder_tokenizer.json", of a decoder with a text encoder of its own
   "vocabulary": "vocabulary.json"}              may be absent; see `unclip_jax.data.vocabulary`

`eps_power.safetensors` may lie beside it: of diffusion stages, by their names, float32 vectors of
the mean square of the noise that the network predicts at each timestep. Who does not know it passes
it over.
"""

import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from unclip_jax import git_lfs
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.safetensors import (
  load_params,
  load_vectors,
  save_params,
  write_atomically,
)

FORMAT_VERSION = 1
MANIFEST_NAME = 'unclip.json'
TOKENIZER_NAME, DECODER_TOKENIZER_NAME = 'tokenizer.json', 'decoder_tokenizer.json'
VOCABULARY_NAME = 'vocabulary.json'
EPS_POWER_NAME = 'eps_power.safetensors'
_KEYS = {'format_version', 'written_by', 'config', 'stages'}
_TOKENIZERS = {'tokenizer': TOKENIZER_NAME, 'decoder_tokenizer': DECODER_TOKENIZER_NAME}
_OPTIONAL_KEYS = {*_TOKENIZERS, 'vocabulary'}


class Manifest(NamedTuple):
  """What `unclip.json` says.

  Attributes:
    config: the configs, plain JSON.
    stages: stage name -> its safetensors file.
    tokenizer: the tokenizer's file, None where the decoder alone reads captions.
    written_by: the program that wrote the folder.
    vocabulary: the file of the words that it was trained on, None where there is none.
    decoder_tokenizer: the file of the tokenizer of a decoder that has one of its own.
  """

  config: dict[str, Any]
  stages: dict[str, epath.Path]
  tokenizer: epath.Path | None
  written_by: str
  vocabulary: epath.Path | None = None
  decoder_tokenizer: epath.Path | None = None


def write_model(
  folder: os.PathLike[str] | str,
  config_json: Mapping[str, Any],
  params: Mapping[str, Params],
  tokenizer_file: os.PathLike[str] | str | None,
  dtype: Any = None,
  written_by: str = 'unclip_jax',
  keep: Sequence[str] = (),
  vocabulary: Mapping[str, Any] | None = None,
  ending: Literal['.safetensors', '.orbax'] = '.safetensors',
  decoder_tokenizer_file: os.PathLike[str] | str | None = None,
  eps_power: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Writes a model folder. Each file appears whole or not at all, `unclip.json` as the last.

  Args:
    folder: made if missing; other files in it are left alone.
    config_json: what JSON can hold.
    params: stage name -> its parameters.
    tokenizer_file: copied; None is a model whose decoder alone reads captions.
    dtype: what floating arrays are cast to, see `save_params`; None keeps theirs.
    written_by: program and version.
    keep: names of stages whose files are there already and stay part of the model.
    vocabulary: what JSON can hold, the content of vocabulary.json; None is a model without one.
    ending: of the stages, safetensors files or Orbax checkpoints, which are folders.
    decoder_tokenizer_file: copied, of a decoder with a text encoder of its own.
    eps_power: as for `write_eps_power`. What is there of a stage that is written anew goes.

  Raises:
    UnclipError: a parameter holds a NaN, or a file cannot be read or written.
  """
  folder = epath.Path(folder)
  given = {'tokenizer': tokenizer_file, 'decoder_tokenizer': decoder_tokenizer_file}
  tokenizers = {name: epath.Path(file) for name, file in given.items() if file is not None}
  manifest = {
    'format_version': FORMAT_VERSION,
    'written_by': written_by,
    'config': dict(config_json),
    'stages': {name: f'{name}{ending}' for name in sorted({*params, *keep})},
    **{name: _TOKENIZERS[name] for name in tokenizers},
  }
  if vocabulary is not None:
    manifest['vocabulary'] = VOCABULARY_NAME
  text = json.dumps(manifest, indent=2, allow_nan=False) + '\n'
  words = json.dumps(vocabulary, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
  for name in manifest['stages'].values():
    inside(folder, name)
  for file in tokenizers.values():
    if not file.exists():
      raise UnclipError(f'there is no tokenizer {file}: check the path')
  _keep_eps_power(folder, dict(eps_power or {}), params)
  for name, stage_params in params.items():
    if ending == '.orbax':
      from unclip_jax.weights.checkpoint import save_tree  # takes seconds to import

      save_tree(folder / f'{name}{ending}', stage_params, dtype)
    else:
      save_params(folder / f'{name}{ending}', stage_params, dtype)
  for name, file in tokenizers.items():
    # Copied aside first, as it may be the very file that is replaced.
    write_atomically(folder / _TOKENIZERS[name], functools.partial(_copy, file))
  if vocabulary is not None:
    write_atomically(folder / VOCABULARY_NAME, lambda part: _write_text(part, words))
  write_atomically(folder / MANIFEST_NAME, lambda part: _write_text(part, text))


def read_manifest(folder: os.PathLike[str] | str) -> Manifest:
  """Reads and checks `unclip.json`; the other files are only known to be there.

  Raises:
    UnclipError: the folder or a file is missing, or the manifest is not valid; the message names
      the file and what is wrong with it.
  """
  folder = epath.Path(folder)
  path = folder / MANIFEST_NAME
  if not folder.is_dir():
    raise UnclipError(f'there is no model folder {folder}: check the path')
  if not path.exists():
    raise UnclipError(
      f'{folder} is not a model: it has no {MANIFEST_NAME}; give the folder that does'
    )
  try:
    text = path.read_text(encoding='utf-8')
    git_lfs.refuse_pointer(path, text)
    fields = json.loads(text)
  except UnclipError:
    raise
  except (RecursionError, ValueError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): download it again') from error
  except OSError as error:
    raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
  if not isinstance(fields, dict):
    raise UnclipError(f'{path} is not a JSON object: download it again')
  _check_version(path, fields.get('format_version'))
  unknown = sorted(fields.keys() - _KEYS - _OPTIONAL_KEYS)
  missing = sorted(_KEYS - fields.keys())
  if unknown or missing:
    what = f'has unknown keys: {", ".join(unknown)}' if unknown else f'lacks {", ".join(missing)}'
    raise UnclipError(f'{path} {what}: correct it or download it again')
  if not isinstance(fields['config'], dict) or not isinstance(fields['stages'], dict):
    raise UnclipError(f'{path}: config and stages must be JSON objects: download it again')
  stages = {name: inside(folder, file) for name, file in fields['stages'].items()}
  others = {name: inside(folder, fields[name]) for name in _OPTIONAL_KEYS if name in fields}
  for file in (*stages.values(), *others.values()):
    if not file.exists():
      raise UnclipError(f'{path} names {file.name}, which is not there: download it again')
  tokenizer, vocabulary = others.get('tokenizer'), others.get('vocabulary')
  return Manifest(
    fields['config'],
    stages,
    tokenizer,
    str(fields['written_by']),
    vocabulary,
    others.get('decoder_tokenizer'),
  )


def read_stage(
  folder: os.PathLike[str] | str, name: str, expected: Params, dtype: Any = None
) -> Params:
  """Reads the parameters of a stage; as `load_params`, which says what is raised.

  Args:
    folder: of the model.
    name: of the stage.
    expected: nested dicts of `jax.ShapeDtypeStruct`s, the names and shapes wanted.
    dtype: of the floating arrays returned; None takes that of `expected`.
  """
  stages = read_manifest(folder).stages
  if name not in stages:
    raise UnclipError(
      f'the model {folder} has no stage {name!r}: it has {", ".join(stages) or "none"}'
    )
  return load_params(stages[name], expected, dtype)


def read_eps_power(folder: os.PathLike[str] | str) -> dict[str, np.ndarray]:
  """Of stages, float32 [T] the mean square of predicted noise, of a folder without them {}.

  Raises:
    UnclipError: the file is damaged.
  """
  path = epath.Path(folder) / EPS_POWER_NAME
  return load_vectors(path) if path.exists() else {}


def write_eps_power(folder: os.PathLike[str] | str, eps_power: Mapping[str, np.ndarray]) -> None:
  """Adds to a model folder what was measured of its stages, [T] each; that of others stays.

  Raises:
    UnclipError: one holds a NaN, or the file there cannot be read, or not be written.
  """
  folder = epath.Path(folder)
  save_params(folder / EPS_POWER_NAME, {**read_eps_power(folder), **eps_power})


def _keep_eps_power(
  folder: epath.Path, given: dict[str, np.ndarray], written: Mapping[str, Params]
) -> None:
  """Of the statistics those that are given, and those of stages that stay as they are."""
  path = folder / EPS_POWER_NAME
  if not path.exists():
    kept = given
  else:
    there = read_eps_power(folder)
    kept = {name: power for name, power in there.items() if name not in written} | given
    if not kept:
      path.unlink()
  if kept:
    save_params(path, kept)


def _check_version(path: epath.Path, version: object) -> None:
  if type(version) is not int or version < 1:
    raise UnclipError(f'{path}: format_version is {version!r}, not a whole number from 1 on')
  if version > FORMAT_VERSION:
    raise UnclipError(
      f'{path} is of format version {version}, this program reads up to {FORMAT_VERSION}: upgrade '
      'with pip install -U unclip-jax'
    )


def inside(folder: epath.Path, name: object, listing: str = MANIFEST_NAME) -> epath.Path:
  """Refuses names that lead out of the folder: a downloaded model must not read other files.

  Links are not followed: a hub's cache keeps the files elsewhere and links to them.

  Args:
    folder: that of the model.
    name: what should be the name of a file in it.
    listing: the file of the folder that gives the name, for the message.

  Raises:
    UnclipError: it is none, or leads out of the folder.
  """
  outside = (
    not isinstance(name, str)
    or not name
    or PurePosixPath(name).is_absolute()
    or bool(PureWindowsPath(name).anchor)
    or '..' in PureWindowsPath(name).parts
    or '://' in name
  )
  if outside:
    raise UnclipError(
      f'{folder / listing} names the file {name!r}: only files inside of the folder are read'
    )
  return folder / name


def _copy(source: epath.Path, target: Path) -> None:
  with source.open('rb') as reader, target.open('wb') as writer:
    shutil.copyfileobj(reader, writer)


def _write_text(target: Path, text: str) -> None:
  target.write_text(text, encoding='utf-8')
