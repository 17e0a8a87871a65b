"""Karlo's original release: a folder of the files that its own code reads."""

import contextlib
import functools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import karlo_original
from unclip_jax.weights.foreign_folder import Joined
from unclip_jax.weights.karlo_original import CLIP, DECODER, PRIOR, STATISTICS, SUPER_RES
from unclip_jax.weights.rules import Rule, Tensors, read_params
from unclip_jax.weights.tensor_files import open_tensors

WRITTEN_BY = 'kakaobrain (Karlo)'
# Each part's file by its name, and what it is called in the release.
_FILES = {
  CLIP: ('*.pt', 'ViT-L-14.pt'),
  PRIOR: ('*prior*.ckpt', 'prior-ckpt-step=01000000-of-01000000.ckpt'),
  STATISTICS: ('*stats*.th', 'ViT-L-14_stats.th'),
  DECODER: ('*decoder*.ckpt', 'decoder-ckpt-step=01000000-of-01000000.ckpt'),
  SUPER_RES: ('*sr*.ckpt', 'improved-sr-ckpt-step=1.2M.ckpt'),
}
_MARKS = (PRIOR, DECODER, SUPER_RES)


class Release(NamedTuple):
  """A release, opened as far as its config.

  Attributes:
    config: of the stages.
    tokenizer: of the captions.
    stages: by their names, what reads the parameters of one given those expected, and its files.
  """

  config: UnclipConfig
  tokenizer: Tokenizer
  stages: Mapping[str, tuple[Callable[[Params], Params], tuple[epath.Path, ...]]]


def is_release(folder: epath.Path) -> bool:
  """Whether a folder holds Karlo's checkpoints, by the names of its files."""
  return all(any(folder.glob(_FILES[part][0])) for part in _MARKS)


def open_release(folder: epath.Path) -> Release:
  """Opens a folder of which `is_release` is true.

  Raises:
    UnclipError: a file is missing, there are two for one part, or one is damaged or of another
      model; names it.
  """
  paths = {part: _find(folder, part) for part in _FILES}
  with _open(paths) as parts:
    config = karlo_original.read_config(parts, str(folder))
  rules = karlo_original.rules(config)
  stages = {}
  for name, part_names in karlo_original.STAGE_PARTS.items():
    files = {part: paths[part] for part in part_names}
    read = functools.partial(_read, files, rules[name], str(folder))
    stages[name] = (read, tuple(files.values()))
  tokenizer = Tokenizer.clip(config.clip.text.context_length, pad_id=0)
  return Release(config, tokenizer, stages)


def _find(folder: epath.Path, part: str) -> epath.Path:
  pattern, name = _FILES[part]
  found = sorted(folder.glob(pattern))
  if not found:
    raise UnclipError(f'{folder} has no {name}: Karlo needs it, download it as well')
  if len(found) > 1:
    names = ' and '.join(path.name for path in found)
    raise UnclipError(f'{folder} has {names}, of which one can be the {part}: move one away')
  return found[0]


def _read(
  paths: Mapping[str, epath.Path], rules: list[Rule], where: str, expected: Params
) -> Params:
  with _open(paths) as parts:
    return read_params(Joined(parts), rules, expected, where, karlo_original.IGNORED)


@contextlib.contextmanager
def _open(paths: Mapping[str, epath.Path]) -> Iterator[dict[str, Tensors]]:
  with contextlib.ExitStack() as stack:
    parts: dict[str, Tensors] = {}
    for part, path in paths.items():
      is_pair = part == STATISTICS
      parts[part] = _read_statistics(path) if is_pair else stack.enter_context(open_tensors(path))
    yield parts


class _Statistics:
  """Mean and standard deviation of CLIP's image embeddings, as tensors of these names."""

  def __init__(self, mean: np.ndarray, std: np.ndarray) -> None:
    self._arrays = {'mean': mean, 'std': std}

  def names(self) -> list[str]:
    """Of both."""
    return list(self._arrays)

  def shape(self, name: str) -> tuple[int, ...]:
    """Of one."""
    return self._arrays[name].shape

  def read(self, name: str) -> np.ndarray:
    """One of them."""
    return self._arrays[name]


def _read_statistics(path: epath.Path) -> _Statistics:
  """The file that `torch.save((mean, std), path)` writes.

  `tensor_files` finds tensors by their names, and these have none. torch numbers what it stores in
  the order in which it meets it: the first bytes are the mean, the second the deviation.
  """
  try:
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
      names = sorted(name for name in archive.namelist() if re.fullmatch(r'[^/]+/data/\d+', name))
      arrays = [np.frombuffer(archive.read(name), '<f4') for name in names]
  except Exception as error:  # of zip files, of what they are packed with, of numpy
    raise UnclipError(f'{path} cannot be read ({error}): download it again') from error
  if len(arrays) != 2 or arrays[0].shape != arrays[1].shape or not (arrays[1] > 0).all():
    raise UnclipError(
      f'{path} is not a mean and a standard deviation in float32: give the file of Karlo'
    )
  return _Statistics(*arrays)
