"""Tensors in the files that other programs write, the input of conversions.

A file is opened by what it is: safetensors, a zip file of torch (`torch_archive`), torch's format
from before 1.6, or the JSON index of a model in several of them. Opening reads names and shapes
alone; each tensor is read when it is asked for, by its bytes, out of a file that stays mapped into
memory or lies in a store (`gs://` for instance). Only the old format of torch needs torch, and is
read into memory at once.
"""

import contextlib
import importlib
import json
import os
import pickle
import re
from collections.abc import KeysView, Mapping
from types import ModuleType, TracebackType
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from etils import epath

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError
from unclip_jax.weights.byte_ranges import LazyTensor
from unclip_jax.weights.folder import inside
from unclip_jax.weights.safetensors import reach
from unclip_jax.weights.safetensors_file import no_name_twice, stored_tensors
from unclip_jax.weights.torch_archive import archive_tensors, refusal, state_dict

_NAMES_SHOWN = 3
# How the old format begins: a pickle of protocol 2 of the number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_ZIP_MAGIC = b'PK\x03\x04'
# Before it, a file could corrupt memory in spite of weights_only (CVE-2026-24747).
_SAFE_TORCH = (2, 10)


class TensorFile:
  """The tensors of an open file, or of the files of one model. A context manager.

  An array that was read is the caller's own and outlives the file. Whether it holds a NaN is not
  looked at.

  Attributes:
    path: what was opened.
  """

  def __init__(
    self, path: epath.Path, tensors: Mapping[str, LazyTensor], stack: contextlib.ExitStack
  ) -> None:
    self.path = path
    self._tensors = tensors
    self._stack = stack

  def __enter__(self) -> 'TensorFile':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._stack.close()

  def names(self) -> KeysView[str]:
    """The names of the tensors, in the order in which they lie in their files."""
    return self._tensors.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises UnclipError where there is none of the name."""
    return self._tensor(name).shape

  def dtype(self, name: str) -> np.dtype:
    """The type of a tensor, bfloat16 by ml_dtypes. Raises as `shape`."""
    return self._tensor(name).dtype

  def read(self, name: str) -> np.ndarray:
    """A tensor, an array of its own in C order.

    Raises:
      UnclipError: there is none of the name, or the file is damaged.
    """
    tensor = self._tensor(name)
    try:
      return tensor.read()
    except Exception as error:  # of zip files, of safetensors, of mapped memory
      raise UnclipError(
        f'{tensor.file}: {name} cannot be read ({error}): download it again'
      ) from error

  def _tensor(self, name: str) -> LazyTensor:
    if name not in self._tensors:
      raise UnclipError(f'{self.path} lacks {name}: it is of another model, or not whole')
    return self._tensors[name]


def open_tensors(path: os.PathLike[str] | str) -> TensorFile:
  """Opens a file of tensors, to be used in a `with` statement.

  Args:
    path: of a .safetensors file; of a .bin, .pt, .pth, .th or .ckpt file of torch, where what it
      is counts and not its name; or of the `.index.json` beside the files of one model. `gs://` and
      the like work, and nothing is copied to this machine's disk.

  Raises:
    UnclipError: the file is missing, empty, a pointer of Git LFS, cut short, of another format, or
      damaged; its store cannot be reached; its pickle asks for more than tensors; two tensors have
      one name; a tensor lies outside of the file; an index and its files disagree; or only torch
      can read it, which is not installed.
  """
  path = reach(path)
  with contextlib.ExitStack() as stack:
    tensors = (_sharded if path.suffix == '.json' else _one_file)(path, stack)
    return TensorFile(path, tensors, stack.pop_all())


def _one_file(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  head = _head(path)
  try:
    if path.suffix == '.safetensors' or head[8:9] == b'{':
      return stored_tensors(path, stack)
    if head.startswith(_ZIP_MAGIC):
      return archive_tensors(path, stack)
    if head.startswith(_LEGACY_MAGIC):
      return _legacy(path)
  except UnclipError:
    raise
  except Exception as error:  # as many kinds as there are ways to be damaged
    reason = f'{type(error).__name__}: {error}'.partition('\n')[0]
    raise UnclipError(
      f'{path} is cut short, damaged or of another format ({reason}): copy or download it again'
    ) from error
  raise UnclipError(
    f'{path} is not a file of tensors (it begins with {head[:8]!r}): give a safetensors file, or '
    'one that torch.save wrote'
  )


def _head(path: epath.Path) -> bytes:
  if path.is_dir():
    raise UnclipError(f'{path} is a folder: give the file, or the .index.json of several')
  if not path.exists():
    raise UnclipError(f'there is no weights file {path}: check the path, or download it again')
  try:
    with path.open('rb') as file:
      head = file.read(git_lfs.HEAD)
  except OSError as error:
    _cannot_read(path, error)
  if not head:
    raise UnclipError(f'{path} is empty: copy or download it again')
  git_lfs.refuse_pointer(path, head)
  return head


def _cannot_read(path: epath.Path, error: OSError) -> NoReturn:
  raise UnclipError(
    f'cannot read {path} ({error.strerror or error}): check that it is a file and may be read'
  ) from error


# --- Several files.


def shards(path: epath.Path) -> tuple[epath.Path, ...]:
  """The files that the index of a model names; none where `path` is no index.

  Raises:
    UnclipError: the index is damaged.
  """
  if path.suffix != '.json':
    return ()
  return tuple(path.parent / file for file in _read_index(path))


def _read_index(path: epath.Path) -> dict[str, set[str]]:
  """The names of the tensors in each file, by the names of the files, which are all there."""
  _head(path)
  try:
    index = json.loads(path.read_text(encoding='utf-8'), object_pairs_hook=no_name_twice)
  except OSError as error:
    _cannot_read(path, error)
  except (ValueError, RecursionError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): download it again') from error
  places = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(places, dict) or not places:
    raise UnclipError(f'{path} has no weight_map of names to files: give the index of a model')
  named: dict[str, set[str]] = {}
  for name, file in places.items():
    inside(path.parent, file, path.name)
    named.setdefault(file, set()).add(name)
  for file in named:
    if not (path.parent / file).exists():
      raise UnclipError(f'{path} names {file}, which is not there: download it again')
  return named


def _sharded(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  tensors: dict[str, LazyTensor] = {}
  for file, names in _read_index(path).items():
    shard = path.parent / file
    found = _one_file(shard, stack)
    if missing := sorted(names - found.keys()):
      raise UnclipError(f'{shard} lacks {_some(missing)}, which {path.name} says it has')
    if extra := sorted(found.keys() - names):
      raise UnclipError(f'{shard} has {_some(extra)}, which {path.name} does not say of it')
    tensors |= found
  return tensors


def _some(names: list[str]) -> str:
  more = len(names) - _NAMES_SHOWN
  return ', '.join(names[:_NAMES_SHOWN]) + (f' and {more} more' if more > 0 else '')


# --- Torch's format from before 1.6.


def _legacy(path: epath.Path) -> dict[str, LazyTensor]:
  torch = _import_torch(path)
  try:
    # It cannot be mapped: where a tensor begins is only known from those before it.
    with path.open('rb') as file:
      loaded = torch.load(file, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    if asked := re.search(r'GLOBAL (\w[\w.]*\w)', str(error)):
      raise refusal(path, asked[1]) from error
    # Its first line is advice, to load the file without protection.
    said = re.search(r'WeightsUnpickler error: (.+)', str(error))
    raise pickle.UnpicklingError(said[1] if said else 'its pickle is not valid') from error
  tensors = state_dict(path, loaded, torch.Tensor)
  return {name: _of_torch(torch, path, name, tensor) for name, tensor in tensors.items()}


def _import_torch(path: epath.Path) -> ModuleType:
  remedy = f"pip install 'torch>={'.'.join(map(str, _SAFE_TORCH))}', or have the file saved anew"
  try:
    # At run time and by its name: importing the package must not need torch.
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise UnclipError(
      f"{path} is of torch's format from before 1.6, which torch alone reads: {remedy}"
    ) from error
  version = tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2])
  if version < _SAFE_TORCH:
    raise UnclipError(f'{path} is not safe to open with torch {torch.__version__}: {remedy}')
  return torch


def _of_torch(torch: ModuleType, path: epath.Path, name: str, tensor: Any) -> LazyTensor:
  try:
    # numpy has no bfloat16 of its own; torch gives it the bits.
    is_brain = tensor.dtype == torch.bfloat16
    array = (tensor.view(torch.int16) if is_brain else tensor).detach().numpy()
  except (RuntimeError, TypeError) as error:
    raise UnclipError(f'{path}: {name} is not a plain tensor ({error}): save it as one') from error
  array = array.view(jnp.bfloat16) if is_brain else array
  return LazyTensor(path, array.shape, array.dtype, lambda: np.array(array, order='C'))
