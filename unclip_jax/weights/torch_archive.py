"""Tensors in torch's own files, found without torch and without running anything that is in them.

`torch.save` (from torch 1.6 on) and TorchScript, OpenAI's CLIP for instance, write a zip file:

  <root>/data.pkl      a pickle: the names, and for each tensor its storage, offset, shape, strides
  <root>/data/0 ...    the storages, raw and uncompressed, so that they can be read alone
  <root>/byteorder     `little` or `big`; files from before torch 2.1 have none and are little
  <root>/code/...      TorchScript alone: programs, which nothing here looks at

A pickle is a program too. The unpickler below knows the few words that describe tensors and
refuses all others, before anything is imported or called.
"""

import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from unclip_jax.types import UnclipError
from unclip_jax.weights.byte_ranges import ByteRanges, LazyTensor

# Of a shape or a stride: eight bytes times it is still an int64.
_LIMIT = 2**60


def archive_tensors(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  """The tensors of a zip file of `torch.save` or TorchScript.

  The names of a TorchScript module are its attributes' on the way, joined by dots, as its
  state_dict has them; attributes that are no tensors (flags, numbers, lists) are left out.

  Args:
    path: the file, local or in a store.
    stack: keeps the file open.

  Raises:
    UnclipError: the file is no such archive, is big-endian, asks for more than tensors, lacks
      their bytes, or holds something else in a tensor's place.
    Exception: it is damaged; of any kind.
  """
  ranges = ByteRanges(path, stack)
  archive = stack.enter_context(zipfile.ZipFile(ranges.file))
  members = {info.filename: info for info in archive.infolist()}
  if len(members) != len(archive.infolist()):
    raise UnclipError(f'{path} holds two files of one name: download it again')
  roots = [name.partition('/')[0] for name in members if re.fullmatch(r'[^/]*/data\.pkl', name)]
  if len(roots) != 1:
    raise UnclipError(
      f'{path} is a zip file that torch did not write (it has {len(roots)} data.pkl): give a file '
      'of tensors'
    )
  members = {name.removeprefix(f'{roots[0]}/'): info for name, info in members.items()}
  if 'byteorder' in members and (order := archive.read(members['byteorder'])) != b'little':
    raise UnclipError(f'{path} is of the byte order {order!r}: save it anew on another machine')
  opened = _Archive(path, archive, ranges, members)
  loaded = _Unpickler(path, archive.read(members['data.pkl'])).load()
  is_module = isinstance(loaded, _ScriptObject)
  refs = _OrderedDict(_attributes(loaded)) if is_module else state_dict(path, loaded, _Ref)
  return {name: opened.lazy(name, ref) for name, ref in refs.items()}


# --- What a pickle may say.


class _StorageType(NamedTuple):
  dtype: np.dtype


class _Storage(NamedTuple):
  dtype: np.dtype
  key: str
  num_elements: int


class _Ref(NamedTuple):
  """A tensor as a pickle describes it: offset and strides in elements, as torch counts."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Function(NamedTuple):
  """What a pickle may call. Immutable: a pickle can also set attributes of what it is given."""

  call: Callable[..., Any]

  def __call__(self, *args: Any) -> Any:
    return self.call(*args)


class _ScriptObject:
  """An object of a TorchScript class: its attributes, and nothing that it could do."""

  __slots__ = ('attributes',)

  def __new__(cls, *args: object) -> '_ScriptObject':
    bag = super().__new__(cls)
    bag.attributes = {}
    return bag

  def __setstate__(self, state: object) -> None:
    if not isinstance(state, dict):
      raise pickle.UnpicklingError('an object with a state of its own')
    self.attributes = state


class _OrderedDict(dict):
  """Stands for OrderedDict: takes no name twice, and no attributes, such as _metadata."""

  __slots__ = ()

  def __init__(self, pairs: Any = ()) -> None:
    super().__init__()
    for name, value in pairs:
      self[name] = value

  def __setitem__(self, name: Any, value: Any) -> None:
    if name in self:
      raise pickle.UnpicklingError(f'the name {name} twice')
    super().__setitem__(name, value)

  def __setstate__(self, state: object) -> None:
    pass


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Ref:
  numbers = (offset, *shape, *strides)
  if (
    not isinstance(storage, _Storage)
    or len(shape) != len(strides)
    or not all(type(number) is int and 0 <= number < _LIMIT for number in numbers)
  ):
    raise pickle.UnpicklingError(f'a tensor of the shape {shape}, strides {strides}')
  # Behind gradient and hooks: that torch conjugates or negates it whenever it is used.
  if marks := [mark for mark in rest[2:] if mark]:
    raise pickle.UnpicklingError(f'a tensor marked as {marks}')
  return _Ref(storage, offset, tuple(shape), tuple(strides))


_FIRST = _Function(lambda value, *_: value)
_KNOWN: Mapping[tuple[str, str], Any] = {
  ('collections', 'OrderedDict'): _OrderedDict,
  ('torch._utils', '_rebuild_tensor_v2'): _Function(_rebuild_tensor),
  ('torch._utils', '_rebuild_parameter'): _FIRST,
  # Lists of TorchScript, such as a convolution's padding: attributes that are no tensors.
  ('torch.jit._pickle', 'build_boollist'): _FIRST,
  ('torch.jit._pickle', 'build_doublelist'): _FIRST,
  ('torch.jit._pickle', 'build_intlist'): _FIRST,
  ('torch.jit._pickle', 'build_tensorlist'): _FIRST,
  ('torch.jit._pickle', 'restore_type_tag'): _FIRST,
  ('torch', 'BFloat16Storage'): _StorageType(jnp.dtype(jnp.bfloat16)),
  ('torch', 'BoolStorage'): _StorageType(np.dtype('bool')),
  ('torch', 'ByteStorage'): _StorageType(np.dtype('uint8')),
  ('torch', 'CharStorage'): _StorageType(np.dtype('int8')),
  ('torch', 'DoubleStorage'): _StorageType(np.dtype('<f8')),
  ('torch', 'FloatStorage'): _StorageType(np.dtype('<f4')),
  ('torch', 'HalfStorage'): _StorageType(np.dtype('<f2')),
  ('torch', 'IntStorage'): _StorageType(np.dtype('<i4')),
  ('torch', 'LongStorage'): _StorageType(np.dtype('<i8')),
  ('torch', 'ShortStorage'): _StorageType(np.dtype('<i2')),
}


class _Unpickler(pickle.Unpickler):
  """Knows the words above. C code behind it asks `find_class` for every other thing to call."""

  def __init__(self, path: epath.Path, content: bytes) -> None:
    for word, arg, _ in pickletools.genops(content):
      # As long as the largest index, and that is up to the file, is the table behind it.
      if 'PUT' in word.name and arg > len(content):
        raise pickle.UnpicklingError(f'{word.name} of {arg}')
    super().__init__(io.BytesIO(content))
    self._path = path

  def find_class(self, module: str, name: str) -> Any:
    if module.partition('.')[0] == '__torch__':
      return _ScriptObject
    if (module, name) not in _KNOWN:
      raise refusal(self._path, f'{module}.{name}')
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    _, kind, key, _, num_elements = pid  # the word 'storage', ..., the device that it was on, ...
    return _Storage(kind.dtype, key, num_elements)


def refusal(path: epath.Path, word: str) -> UnclipError:
  """The error for a pickle that asks for more than tensors."""
  return UnclipError(
    f'{path} is refused: it would run {word!r}, which is not needed to describe tensors; take a '
    'file of tensors alone, safetensors for instance'
  )


def _attributes(
  module: _ScriptObject, prefix: str = '', above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, _Ref]]:
  if id(module) in above:
    raise pickle.UnpicklingError(f'{prefix} a module inside of itself')
  for name, value in module.attributes.items():
    if isinstance(value, _Ref):
      yield prefix + name, value
    elif isinstance(value, _ScriptObject):
      yield from _attributes(value, f'{prefix}{name}.', above | {id(module)})


def state_dict(path: epath.Path, loaded: Any, kind: type) -> dict[str, Any]:
  """The tensors of a dict of them, or of one under 'state_dict' with other things beside it."""
  if not isinstance(loaded, dict):
    raise UnclipError(
      f'{path} holds a {type(loaded).__name__.strip("_")}, not tensors by their names: give a '
      'state dict'
    )
  if isinstance(loaded.get('state_dict'), dict):
    for name, value in loaded.items():
      if isinstance(value, kind):
        raise UnclipError(
          f'{path} holds the tensor {name} beside its state_dict: save the one that is meant'
        )
    loaded = loaded['state_dict']
  for name, value in loaded.items():
    if not isinstance(name, str):
      raise UnclipError(f'{path} holds {name!r} in place of a name: give a state dict')
    if not isinstance(value, kind):
      raise UnclipError(
        f'{path}: {name} is a {type(value).__name__.strip("_")}, not a tensor: save the state dict '
        'alone'
      )
  return loaded


# --- Where the bytes are.


class _Archive(NamedTuple):
  path: epath.Path
  archive: zipfile.ZipFile
  ranges: ByteRanges
  members: Mapping[str, zipfile.ZipInfo]

  def lazy(self, name: str, ref: _Ref) -> LazyTensor:
    storage = ref.storage
    info = self.members.get(f'data/{storage.key}')
    if info is None:
      raise UnclipError(
        f'{self.path} lacks data/{storage.key}, the bytes of {name}: download it again'
      )
    held = min(info.file_size // storage.dtype.itemsize, storage.num_elements)
    steps = (step * (size - 1) for size, step in zip(ref.shape, ref.strides, strict=True))
    needed = 0 if 0 in ref.shape else ref.offset + sum(steps) + 1
    if needed > held:
      raise UnclipError(
        f'{self.path}: {name} takes {needed} elements of data/{storage.key}, which holds {held}: '
        'download it again'
      )
    return LazyTensor(self.path, ref.shape, storage.dtype, lambda: self.read(info, ref))

  def read(self, info: zipfile.ZipInfo, ref: _Ref) -> np.ndarray:
    dtype = ref.storage.dtype
    strides = [dtype.itemsize * step for step in ref.strides]
    start = dtype.itemsize * ref.offset
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
      return self.ranges.array(self._start(info) + start, ref.shape, dtype, strides)
    # Compressed, by someone who packed the file anew; or encrypted, which raises.
    content = self.archive.read(info)
    return np.array(np.ndarray(ref.shape, dtype, content, start, strides), order='C')

  def _start(self, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its header, whose length the index does not tell."""
    header = self.ranges.read(info.header_offset, 30)
    lengths = (int.from_bytes(header[at : at + 2], 'little') for at in (26, 28))
    start = info.header_offset + len(header) + sum(lengths)
    if header[:4] != b'PK\x03\x04':
      raise zipfile.BadZipFile(f'{info.filename} is not where it should be')
    return start
