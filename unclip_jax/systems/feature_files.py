"""What networks have seen of folders, in files: to compare with it again, or to put parts together.

A file is numpy's .npz. For each network it has the count, mean and scatter of all pictures and the
features of those that are kept; `about` says, as JSON, which networks they are, how the pictures
were made to fit them, and the captions.
"""

import functools
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from unclip_jax.data.examples import Source
from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.evaluate.frechet import Moments
from unclip_jax.systems.evaluation import Options, PictureSet, Seen, join, look
from unclip_jax.systems.feature_networks import FeatureNetwork
from unclip_jax.systems.picture_sets import first_size, read_pictures
from unclip_jax.types import UnclipError
from unclip_jax.weights.safetensors import reach, write_atomically

SUFFIX = '.npz'
_FORMAT_VERSION = 1


def resolution_of(path: str | os.PathLike[str]) -> int:
  """The pixels a side of the pictures of a file, or of the first one in a folder.

  Raises:
    UnclipError: it is neither, or holds none.
  """
  if _is_file(path):
    return _open(reach(path))[0]['resolution']
  return first_size(PictureFolder(path))


class Part(NamedTuple):
  """A folder of pictures, or a file of what was seen of others, which has no source."""

  path: str | os.PathLike[str]
  source: Source | None


def open_parts(paths: Sequence[str | os.PathLike[str]]) -> list[Part]:
  """Finds folders, and files that end in .npz, before any picture is looked at.

  Raises:
    UnclipError: there is no such folder, it holds no pictures, or a file is damaged.
  """
  parts = []
  for path in paths:
    if _is_file(path):
      _open(reach(path))
    parts.append(Part(path, None if _is_file(path) else PictureFolder(path)))
  return parts


def gather(
  parts: Sequence[Part],
  networks: Sequence[FeatureNetwork],
  options: Options,
  tell: Callable[[str], None] = lambda line: None,
) -> PictureSet:
  """One set of folders, which are looked at, and of files of what was seen before.

  Args:
    parts: of `open_parts`.
    networks: that look.
    options: how; the resolution is given.
    tell: is told of what is under way.

  Raises:
    UnclipError: a picture cannot be read, or a file is of other networks, another resolution or
      another filter.
  """
  found = []
  for part in parts:
    if part.source is None:
      found.append(_read(reach(part.path), networks, options))
      continue
    report = functools.partial(_report, tell, part)
    pictures = read_pictures(part.source, options.resolution, options.resize)
    found.append(look(pictures, len(part.source), networks, options, report))
  return join(found, options)


def _report(tell: Callable[[str], None], part: Part, done: int) -> None:
  tell(f'{part.path}: {done} of {len(part.source)}')


def write(
  path: str | os.PathLike[str],
  found: PictureSet,
  networks: Sequence[FeatureNetwork],
  options: Options,
) -> None:
  """Writes what networks have seen; whole, or not at all.

  Raises:
    UnclipError: its name does not end in .npz, or it cannot be written.
  """
  check_name(path)
  arrays: dict[str, Any] = {'about': json.dumps(_about(found, networks, options))}
  for i, seen in enumerate(found.seen):
    arrays |= {f'{name}_{i}': value for name, value in seen.moments._asdict().items()}
    arrays[f'rows_{i}'] = seen.rows

  def save(part: os.PathLike[str]) -> None:
    with open(part, 'wb') as file:  # given a name, numpy would put its suffix behind it
      np.savez(file, **arrays)

  write_atomically(reach(path), save)


def check_name(path: str | os.PathLike[str]) -> None:
  """Raises UnclipError where a file would not be known again by its name."""
  if not _is_file(path):
    raise UnclipError(f'{path}: files of features end in {SUFFIX}')


def _is_file(path: str | os.PathLike[str]) -> bool:
  return os.fspath(path).endswith(SUFFIX)


def _about(
  found: PictureSet, networks: Sequence[FeatureNetwork], options: Options
) -> dict[str, Any]:
  return {
    'format_version': _FORMAT_VERSION,
    'resolution': options.resolution,
    'resize': options.resize,
    'networks': [_describe(network) for network in networks],
    'captions': found.captions,
  }


def _describe(network: FeatureNetwork) -> dict[str, Any]:
  return {'name': network.name, 'dims': network.dims, 'preparation': network.preparation}


def _open(path: epath.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What a file says of itself, and its arrays."""
  if not path.exists():
    raise UnclipError(f'there is no file {path}: check the path')
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    about = json.loads(str(arrays.pop('about')))
    version = about['format_version']
    about['resolution'], about['resize'], about['networks'], about['captions']
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
  ) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'{path} is not a file of features that can be read ({reason}): make it by evaluate --save'
    ) from error
  if version != _FORMAT_VERSION:
    raise UnclipError(f'{path} is of format version {version}: make it anew by evaluate --save')
  return about, arrays


def _read(path: epath.Path, networks: Sequence[FeatureNetwork], options: Options) -> PictureSet:
  about, arrays = _open(path)
  for name in ('resolution', 'resize'):
    if about[name] != getattr(options, name):
      raise UnclipError(
        f'{path} is of pictures of {name} {about[name]}, wanted is {getattr(options, name)}: give '
        f'--{name} {about[name]}, or make it anew'
      )
  seen = []
  for network in networks:
    wanted = _describe(network)
    if wanted not in about['networks']:
      there = ', '.join(f'{one["name"]} at {one["preparation"]}' for one in about['networks'])
      raise UnclipError(
        f'{path} has no features of {network.name} at {network.preparation}, only of {there}: take '
        'that network, or make it anew'
      )
    seen.append(_seen(path, arrays, about['networks'].index(wanted), len(about['captions'])))
  return PictureSet(tuple(seen), tuple(map(tuple, about['captions'])))


def _seen(path: epath.Path, arrays: dict[str, np.ndarray], i: int, kept: int) -> Seen:
  try:
    count, mean, scatter, rows = (
      arrays[f'{name}_{i}'] for name in ('count', 'mean', 'scatter', 'rows')
    )
  except KeyError as error:
    raise UnclipError(f'{path} lacks {error}: make it anew by evaluate --save') from error
  d = mean.shape[-1]
  if count.ndim or mean.ndim != 1 or scatter.shape != (d, d) or rows.shape != (kept, d):
    raise UnclipError(f'{path} has arrays that do not fit: make it anew by evaluate --save')
  return Seen(Moments(int(count), mean, scatter), rows)
