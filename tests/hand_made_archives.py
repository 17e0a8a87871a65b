"""Archives as torch writes them, made by hand, opcode for opcode, so that no torch is needed."""

import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.types import UnclipError
from unclip_jax.weights.tensor_files import open_tensors

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4) / 8
BIAS = np.array([1.5, -2.25, 0.125], jnp.bfloat16)
STORAGES = {
  'bfloat16': 'BFloat16Storage',
  'bool': 'BoolStorage',
  'uint8': 'ByteStorage',
  'int8': 'CharStorage',
  'float64': 'DoubleStorage',
  'float32': 'FloatStorage',
  'float16': 'HalfStorage',
  'int32': 'IntStorage',
  'int64': 'LongStorage',
  'int16': 'ShortStorage',
}


# --- Opcodes of pickle's protocol 2, each a function to the bytes that push one thing.


def plain(value: object) -> bytes:
  """Numbers, text, None, and tuples and lists of them."""
  return pickle.dumps(value, 2)[2:-1]


def word(module: str, name: str) -> bytes:
  return f'c{module}\n{name}\n'.encode()


def called(function: bytes, *args: bytes) -> bytes:
  return function + b'(' + b''.join(args) + b'tR'


def entries(items: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
  pairs = items.items() if isinstance(items, dict) else items
  return b'(' + b''.join(plain(name) + value for name, value in pairs) + b'u'


def a_dict(items) -> bytes:
  return b'}' + entries(items)


def ordered(items) -> bytes:
  return word('collections', 'OrderedDict') + b')R' + entries(items)


def script(name: str, items) -> bytes:
  """An object of a TorchScript class."""
  module, _, last = f'__torch__.{name}'.rpartition('.')
  return word(module, last) + b')\x81' + a_dict(items) + b'b'


def stored(key: str, storage: str, num_elements: int) -> bytes:
  parts = (plain('storage'), word('torch', storage), plain(key), plain('cuda:0'))
  return b'(' + b''.join(parts) + plain(num_elements) + b'tQ'


def tensor(
  key, shape, strides, *, offset=0, storage='FloatStorage', num_elements=12, marks=()
) -> bytes:
  return called(
    word('torch._utils', '_rebuild_tensor_v2'),
    stored(key, storage, num_elements),
    plain(offset),
    plain(shape),
    plain(strides),
    b'\x89',
    word('collections', 'OrderedDict') + b')R',
    *marks,
  )


def parameter(*args, **kwargs) -> bytes:
  ref = tensor(*args, **kwargs)
  hooks = word('collections', 'OrderedDict') + b')R'
  return called(word('torch._utils', '_rebuild_parameter'), ref, b'\x88', hooks)


WEIGHT_REF = tensor('0', (3, 4), (4, 1))
BIAS_REF = parameter('1', (3,), (1,), storage='BFloat16Storage', num_elements=3)
DATA = {'data/0': WEIGHT.tobytes(), 'data/1': BIAS.tobytes()}


def write_archive(
  path: Path, pushed: bytes, data=DATA, *, compression=zipfile.ZIP_STORED, root='archive'
) -> Path:
  members = {'data.pkl': b'\x80\x02' + pushed + b'.', 'byteorder': b'little', 'version': b'3\n'}
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, content in (members | data).items():
      archive.writestr(f'{root}/{name}', content)
  return path


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert actual.flags.c_contiguous
  assert actual.flags.writeable
  assert actual.tobytes() == np.ascontiguousarray(expected).tobytes()


def read_all(path: Path | str) -> dict[str, np.ndarray]:
  with open_tensors(path) as file:
    read = {name: file.read(name) for name in file.names()}
    for name, array in read.items():
      assert (file.shape(name), file.dtype(name)) == (array.shape, array.dtype)
      assert type(file.shape(name)) is tuple
  return read


def complaint(path: Path | str) -> str:
  """What opening or reading says; the file is let go of."""
  with pytest.raises(UnclipError) as caught:
    read_all(path)
  message = str(caught.value)
  assert message.isprintable(), 'not one line'
  return message
