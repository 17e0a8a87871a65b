"""The header of a safetensors file: which tensors are in it, and where.

  8 bytes       the length of the header, little-endian
  the header    JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
  the tensors   in C order, little-endian, one behind the other to the end of the file

Read here and not by the package `safetensors`, which only opens files that are local.
"""

import contextlib
import json
import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from etils import epath

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError
from unclip_jax.weights.byte_ranges import ByteRanges, LazyTensor

_METADATA = '__metadata__'
_ENTRY = {'dtype', 'shape', 'data_offsets'}
_MAX_HEADER = 100_000_000  # bytes; the package's own limit
# Those that numpy can hold, by their names in the header.
_DTYPES = {
  'BOOL': 'bool',
  'U8': 'uint8',
  'I8': 'int8',
  'U16': 'uint16',
  'I16': 'int16',
  'F16': 'float16',
  'BF16': 'bfloat16',
  'U32': 'uint32',
  'I32': 'int32',
  'F32': 'float32',
  'U64': 'uint64',
  'I64': 'int64',
  'F64': 'float64',
}


def stored_tensors(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  """The tensors of a safetensors file, in the order in which they lie in it.

  Args:
    path: the file, local or in a store.
    stack: keeps the file open.

  Raises:
    UnclipError: a tensor is of a type that numpy lacks, or the file is a pointer of Git LFS.
    ValueError: the file is empty, its header is none, or it does not hold what that says.
    OSError: the file cannot be read.
  """
  ranges = ByteRanges(path, stack)
  git_lfs.refuse_pointer(path, ranges.read(0, git_lfs.HEAD))
  length = int.from_bytes(ranges.read(0, 8), 'little')
  start = 8 + length
  if ranges.size < 8 or length > _MAX_HEADER or start > ranges.size:
    raise ValueError(f'a header of {length} bytes in a file of {ranges.size}')
  header = json.loads(ranges.read(8, length), object_pairs_hook=no_name_twice)
  if not isinstance(header, dict):
    raise ValueError('the header is not a JSON object')
  header.pop(_METADATA, None)
  for name, entry in header.items():
    _check_entry(path, name, entry)
  tensors, end = {}, 0
  for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
    dtype, shape = jnp.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape'])
    begin, size = end, dtype.itemsize * math.prod(shape)
    end += size
    if entry['data_offsets'] != [begin, end]:
      raise ValueError(f'{name} takes the bytes {begin} to {end}, not {entry["data_offsets"]}')
    read = partial(ranges.array, start + begin, shape, dtype)
    tensors[name] = LazyTensor(path, shape, dtype, read)
  if start + end != ranges.size:
    raise ValueError(f'it should have {start + end} bytes and has {ranges.size}')
  return tensors


def _check_entry(path: epath.Path, name: str, entry: Any) -> None:
  """Raises ValueError where what the header says of a tensor is not of its form."""
  is_whole = isinstance(entry, dict) and entry.keys() == _ENTRY
  if not is_whole or not isinstance(entry['dtype'], str):
    raise ValueError(f'{name} is described by {entry!r}')
  for numbers in (entry['shape'], entry['data_offsets']):
    if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
      raise ValueError(f'{name} is described by {entry!r}')
  if entry['dtype'] not in _DTYPES:
    raise UnclipError(
      f'{path}: {name} is of the type {entry["dtype"]}, which is not read: take a file of '
      'float16, bfloat16 or float32'
    )


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object's hook: raises ValueError where two of its values have one name."""
  entries: dict[str, Any] = {}
  for name, value in pairs:
    if name in entries:
      raise ValueError(f'the name {name} twice')
    entries[name] = value
  return entries
