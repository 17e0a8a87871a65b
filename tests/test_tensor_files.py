"""Tensor files of other programs: what is in them comes out, nothing in them runs, damage is named.

The archives are written here by hand, opcode for opcode, so that no torch is needed. Those that
torch itself writes are read in tests/parity/test_tensor_files.py.
"""

import gc
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

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


@pytest.fixture
def archive(tmp_path):
  return write_archive(tmp_path / 'model.pt', a_dict({'w': WEIGHT_REF, 'b': BIAS_REF}))


@pytest.fixture
def safetensors(tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors_numpy.save_file({'w': WEIGHT, 'b': BIAS, 'n': np.array(7)}, path)
  return path


# --- Safetensors.


def test_safetensors_come_out_as_they_are(safetensors):
  read = read_all(safetensors)
  assert read.keys() == {'w', 'b', 'n'}
  assert_same(read['w'], WEIGHT)
  assert_same(read['b'], BIAS)
  assert_same(read['n'], np.array(7))


@pytest.mark.parametrize('dtype', [*STORAGES, 'uint16', 'uint32', 'uint64'])
def test_every_type_of_safetensors(tmp_path, dtype):
  wanted = np.array([0, 1, 1, 0, 1]).astype(jnp.dtype(dtype))
  safetensors_numpy.save_file({'x': wanted}, tmp_path / 'x.safetensors')
  assert_same(read_all(tmp_path / 'x.safetensors')['x'], wanted)


def test_a_type_that_numpy_lacks_is_named(tmp_path):
  path = write_header(tmp_path, '{"x": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}')
  path.write_bytes(path.read_bytes() + bytes(3))
  assert 'x is of the type F8_E4M3' in complaint(path)


def test_what_a_file_is_counts_and_not_its_name(safetensors, archive):
  assert_same(read_all(safetensors.rename(safetensors.with_name('a.bin')))['w'], WEIGHT)
  assert_same(read_all(archive.rename(archive.with_name('b')))['w'], WEIGHT)
  # But this name promises that there is no pickle inside.
  lying = archive.with_name('b').rename(archive.with_name('c.safetensors'))
  assert 'cut short, damaged or of another format' in complaint(lying)


@pytest.mark.parametrize('part', [0.01, 0.3, 0.9, 0.999])
def test_truncated_safetensors_are_named(safetensors, part):
  whole = safetensors.read_bytes()
  safetensors.write_bytes(whole[: int(len(whole) * part)])
  assert f'{safetensors} is cut short' in complaint(safetensors)


def write_header(folder: Path, header: str) -> Path:
  path = folder / 'x.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header.encode())
  return path


def test_a_safetensors_name_given_twice_is_named(tmp_path):
  one = '"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
  assert 'the name x twice' in complaint(write_header(tmp_path, f'{{{one}, {one}}}'))
  assert read_all(write_header(tmp_path, f'{{{one}}}'))['x'].shape == (0,)


def test_a_file_of_the_user_s_home(safetensors, monkeypatch):
  monkeypatch.setenv('HOME', str(safetensors.parent))
  assert_same(read_all('~/model.safetensors')['w'], WEIGHT)


# --- Torch's archives.


@pytest.mark.parametrize('make', [a_dict, ordered])
def test_a_state_dict_comes_out_as_it_is(tmp_path, make):
  path = write_archive(tmp_path / 'm.pt', make({'a.w': WEIGHT_REF, 'a.b': BIAS_REF}))
  read = read_all(path)
  assert read.keys() == {'a.w', 'a.b'}
  assert_same(read['a.w'], WEIGHT)
  assert_same(read['a.b'], BIAS)


@pytest.mark.parametrize('dtype', STORAGES)
def test_every_type_of_storage(tmp_path, dtype):
  wanted = np.array([0, 1, 1, 0, 1]).astype(jnp.dtype(dtype))
  ref = tensor('0', (5,), (1,), storage=STORAGES[dtype], num_elements=5)
  path = write_archive(tmp_path / 'm.pt', a_dict({'x': ref}), {'data/0': wanted.tobytes()})
  assert_same(read_all(path)['x'], wanted)


def test_views_of_one_storage(tmp_path):
  refs = {
    'whole': tensor('0', (12,), (1,)),
    'part': tensor('0', (2, 3), (4, 1), offset=5),
    'transposed': tensor('0', (4, 3), (1, 4)),
    'spread': tensor('0', (2, 3), (1, 0), offset=10),
    'scalar': tensor('0', (), (), offset=7),
    'nothing': tensor('0', (4, 0), (1, 1), offset=12),
    'bits': tensor('0', (48,), (1,), storage='ByteStorage', num_elements=48),
  }
  read = read_all(write_archive(tmp_path / 'm.pt', a_dict(refs)))
  flat = WEIGHT.ravel()
  assert_same(read['whole'], flat)
  assert_same(read['part'], np.stack([flat[5:8], flat[9:12]]))
  assert_same(read['transposed'], WEIGHT.T)
  assert_same(read['spread'], np.repeat(flat[10:, None], 3, axis=1))
  assert_same(read['scalar'], flat[7].reshape(()))
  assert_same(read['nothing'], np.zeros((4, 0), np.float32))
  assert_same(read['bits'], flat.view(np.uint8))


def test_an_archive_that_was_compressed_again(tmp_path):
  items = a_dict({'w': WEIGHT_REF, 'part': tensor('0', (2, 2), (4, 1), offset=1)})
  path = write_archive(tmp_path / 'm.pt', items, compression=zipfile.ZIP_DEFLATED)
  read = read_all(path)
  assert_same(read['w'], WEIGHT)
  assert_same(read['part'], WEIGHT[:2, 1:3])


def test_an_empty_tensor_of_an_empty_storage(tmp_path):
  ref = a_dict({'x': tensor('0', (0, 3), (3, 1), num_elements=0)})
  for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    path = write_archive(tmp_path / 'm.pt', ref, {'data/0': b''}, compression=compression)
    assert_same(read_all(path)['x'], np.zeros((0, 3), np.float32))


def test_bytes_are_found_behind_headers_of_any_length(tmp_path):
  """Torch pads them, so that storages begin at multiples of 64 bytes."""
  path = tmp_path / 'm.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    for at, (name, content) in enumerate({'data.pkl': b'', **DATA}.items()):
      info = zipfile.ZipInfo(f'm/{name}')
      info.extra = struct.pack('<HH', 0x4246, 5 * at + 3) + bytes(5 * at + 3)
      content = content or b'\x80\x02' + a_dict({'w': WEIGHT_REF, 'b': BIAS_REF}) + b'.'
      archive.writestr(info, content)
  assert_same(read_all(path)['w'], WEIGHT)
  assert_same(read_all(path)['b'], BIAS)


def test_names_of_a_module_are_those_of_its_state_dict(tmp_path):
  """As in OpenAI's CLIP: classes of any name, flags, numbers and lists beside the tensors."""
  lists = called(word('torch.jit._pickle', 'build_intlist'), plain([2, 2]))
  tagged = called(word('torch.jit._pickle', 'restore_type_tag'), plain([1.5]), plain('List[float]'))
  inner = {'weight': WEIGHT_REF, 'bias': BIAS_REF, 'training': b'\x89', 'padding': lists}
  module = {
    'training': b'\x88',
    'input_resolution': plain(224),
    'nothing': plain(None),
    'scales': tagged,
    'logit_scale': parameter('0', (), (), offset=3),
    'visual': script(
      'torch.nn.Sequential', {'0': script('os.system', inner), '1': script('os.system', {})}
    ),
    'again': script('___torch_mangle_5.Linear', {'weight': WEIGHT_REF}),
  }
  read = read_all(write_archive(tmp_path / 'ViT.pt', script('CLIP', module), root='ViT-L-14'))
  assert read.keys() == {'logit_scale', 'visual.0.weight', 'visual.0.bias', 'again.weight'}
  assert_same(read['logit_scale'], np.array(WEIGHT.ravel()[3]))
  assert_same(read['visual.0.weight'], WEIGHT)
  assert_same(read['visual.0.bias'], BIAS)


def test_a_checkpoint_s_state_dict_is_unwrapped(tmp_path):
  wrapped = {'epoch': plain(3), 'state_dict': ordered({'w': WEIGHT_REF}), 'loops': a_dict({})}
  read = read_all(write_archive(tmp_path / 'm.ckpt', a_dict(wrapped)))
  assert read.keys() == {'w'}
  assert_same(read['w'], WEIGHT)


def test_archives_need_no_torch(archive, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  assert_same(read_all(archive)['w'], WEIGHT)


def of_w(*args, **kwargs) -> bytes:
  """A state dict of one tensor, named w."""
  return a_dict({'w': tensor(*args, **kwargs)})


TWICE = b'(' + plain('w') + WEIGHT_REF + b't'
NO_STORAGE = called(word('torch._utils', '_rebuild_tensor_v2'), *map(plain, (1, 2, (), ())))
AMBIGUOUS = script('Net', {'a.w': WEIGHT_REF, 'a': script('Net', {'w': BIAS_REF})})
ITSELF = word('__torch__', 'Net') + b')\x81q\x05' + a_dict({'self': b'h\x05'}) + b'b'
OWN_STATE = word('__torch__', 'Net') + b')\x81' + plain((1, 2)) + b'b'
WRAPPER = {'state_dict': a_dict({'w': WEIGHT_REF}), 'ema': WEIGHT_REF}
SAID = [
  (a_dict({'w': WEIGHT_REF, 'epoch': plain(3)}), 'epoch is a int, not a tensor'),
  (a_dict({'model': ordered({'w': WEIGHT_REF})}), 'model is a OrderedDict, not a tensor'),
  (a_dict({'net': script('Net', {})}), 'net is a ScriptObject, not a tensor'),
  (a_dict({'state_dict': a_dict({'step': plain(5)})}), 'step is a int, not a tensor'),
  (a_dict(WRAPPER), 'holds the tensor ema beside its state_dict'),
  (b'](' + WEIGHT_REF + b'e', 'holds a list, not tensors by their names'),
  (WEIGHT_REF, 'holds a Ref, not tensors by their names'),
  (b'}(K\x05' + WEIGHT_REF + b'u', 'holds 5 in place of a name'),
  (ordered([('w', WEIGHT_REF), ('w', BIAS_REF)]), 'the name w twice'),
  (called(word('collections', 'OrderedDict'), b'](' + TWICE + TWICE + b'e'), 'the name w twice'),
  (AMBIGUOUS, 'the name a.w twice'),
  (ITSELF, 'a module inside of itself'),
  (OWN_STATE, 'a state of its own'),
  (of_w('0', (4, 4), (4, 1)), 'w takes 16 elements of data/0, which holds 12'),
  (of_w('0', (3, 4), (5, 1)), 'w takes 14 elements of data/0, which holds 12'),
  (of_w('0', (3, 4), (4, 1), offset=1), 'w takes 13 elements of data/0, which holds 12'),
  (of_w('1', (3, 4), (4, 1)), 'w takes 12 elements of data/1, which holds 1'),
  (of_w('0', (3, 4), (4, 1), num_elements=11), 'w takes 12 elements of data/0, which holds 11'),
  (of_w('9', (1,), (1,)), 'lacks data/9, the bytes of w'),
  (of_w('../byteorder', (1,), (1,)), 'lacks data/../byteorder'),
  (of_w('0', (1,), (1,), offset=-1), 'a tensor of the shape (1,)'),
  (of_w('0', (2,), (-1,), offset=3), 'strides (-1,)'),
  (of_w('0', (1,), (2**70,)), 'a tensor of the shape (1,)'),
  (of_w('0', (3,), (4, 1)), 'a tensor of the shape (3,), strides (4, 1)'),
  (of_w('0', (1.5,), (1,)), 'a tensor of the shape (1.5,)'),
  (of_w('0', (1,) * 70, (1,) * 70), 'w cannot be read'),
  (of_w('0', (2**50,), (0,)), 'w cannot be read'),
  (of_w('0', (1,), (1,), marks=(a_dict({'neg': b'\x88'}),)), "a tensor marked as [{'neg': True}]"),
  (a_dict({'w': NO_STORAGE}), 'a tensor of the shape'),
  (a_dict({'w': b'(K\x01K\x02tQ'}), 'cut short, damaged'),
  (a_dict({'w': b'r\xff\xff\xff\xff' + WEIGHT_REF}), 'LONG_BINPUT of 4294967295'),
  (b'', 'cut short, damaged'),
]


@pytest.mark.parametrize(('pushed', 'part'), SAID, ids=[part for _, part in SAID])
def test_what_an_archive_should_not_hold(tmp_path, pushed, part):
  path = write_archive(tmp_path / 'm.pt', pushed)
  message = complaint(path)
  assert str(path) in message
  assert part in message


def test_a_big_endian_archive_is_refused(tmp_path):
  path = write_archive(tmp_path / 'm.pt', a_dict({'w': WEIGHT_REF}), DATA | {'byteorder': b'big'})
  assert "byte order b'big'" in complaint(path)


def test_an_archive_from_before_byte_orders_were_written(tmp_path):
  path = tmp_path / 'm.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('m/data.pkl', b'\x80\x02' + a_dict({'w': WEIGHT_REF}) + b'.')
    archive.writestr('m/data/0', DATA['data/0'])
  assert_same(read_all(path)['w'], WEIGHT)


@pytest.mark.parametrize('names', [['m/x'], ['m/data.pkl', 'n/data.pkl'], ['m/code/data.pkl']])
def test_a_zip_file_of_something_else_is_named(tmp_path, names):
  with zipfile.ZipFile(tmp_path / 'm.pt', 'w') as archive:
    for name in names:
      archive.writestr(name, b'\x80\x02}.')
  assert 'a zip file that torch did not write' in complaint(tmp_path / 'm.pt')


@pytest.mark.filterwarnings('ignore:Duplicate name:UserWarning')
def test_two_members_of_one_name_are_refused(tmp_path):
  path = write_archive(tmp_path / 'm.pt', a_dict({'w': WEIGHT_REF}))
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('archive/data/0', bytes(48))
  assert 'two files of one name' in complaint(path)


@pytest.mark.parametrize('part', [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_named(archive, part):
  whole = archive.read_bytes()
  archive.write_bytes(whole[: int(len(whole) * part)])
  assert f'{archive} is cut short' in complaint(archive)


def test_a_truncated_pickle_is_named(tmp_path):
  pushed = b'\x80\x02' + a_dict({'w': WEIGHT_REF}) + b'.'
  for length in range(len(pushed)):
    path = write_archive(tmp_path / 'm.pt', b'', DATA | {'data.pkl': pushed[:length]})
    assert 'm.pt is cut short, damaged' in complaint(path)


def test_a_header_that_was_overwritten_is_named(archive):
  content = bytearray(archive.read_bytes())
  with zipfile.ZipFile(archive) as members:
    at = members.getinfo('archive/data/0').header_offset
  content[at : at + 4] = b'junk'
  archive.write_bytes(content)
  with open_tensors(archive) as file:
    with pytest.raises(UnclipError, match=r'model\.pt: w cannot be read'):
      file.read('w')
    assert_same(file.read('b'), BIAS)


def test_bytes_that_are_encrypted_are_not_taken_for_tensors(archive):
  content = bytearray(archive.read_bytes())
  entry = content.rindex(b'PK\x01\x02', 0, content.rindex(b'archive/data/0'))
  content[entry + 8] |= 1
  archive.write_bytes(content)
  with open_tensors(archive) as file, pytest.raises(UnclipError, match=r'w cannot .*encrypted'):
    file.read('w')


# --- Pickles that would run something.


class Payload:
  """Unpickled, it makes a file."""

  def __init__(self, target: Path) -> None:
    self.target = target

  def __reduce__(self):
    return (shutil.copyfile, (__file__, str(self.target)))


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('wrap', [dict, list, lambda items: {'state_dict': dict(items)}])
def test_a_payload_does_not_run(tmp_path, protocol, wrap):
  target = tmp_path / 'made'
  content = pickle.dumps(wrap([('w', Payload(target))]), protocol)
  path = tmp_path / 'm.pt'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('m/data.pkl', content)
  message = complaint(path)
  assert f'{path} is refused: it would run' in message
  assert "run 'shutil.copyfile'" in message
  assert not target.exists()
  pickle.loads(content)
  assert target.exists(), 'it is no payload'


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    ('os', 'system'),
    ('builtins', 'eval'),
    ('torch', 'load'),
    ('torch', 'FloatStorage.from_file'),
    ('torch._utils', '_rebuild_tensor_v3'),
    ('torch.jit._pickle', 'build_everything'),
    ('collections', 'defaultdict'),
    ('__torch__x', 'Net'),
    ('unclip_jax.weights.torch_archive', 'np.fromfile'),
  ],
)
@pytest.mark.parametrize('make', [a_dict, lambda items: script('Net', items)])
def test_other_words_are_refused_by_name(tmp_path, module, name, make):
  items = {'w': WEIGHT_REF, 'x': called(word(module, name), plain('true'))}
  message = complaint(write_archive(tmp_path / 'm.pt', make(items)))
  assert f"is refused: it would run '{module}.{name}'" in message


@pytest.mark.parametrize(
  'target',
  [
    word('torch._utils', '_rebuild_tensor_v2'),
    word('torch', 'FloatStorage'),
    word('__torch__', 'Net'),
    word('collections', 'OrderedDict'),
    stored('0', 'FloatStorage', 12),
    WEIGHT_REF,
  ],
)
@pytest.mark.parametrize('state', [a_dict({'call': b'N'}), b'N' + a_dict({'call': b'N'}) + b'\x86'])
def test_a_pickle_does_not_change_what_it_is_given(tmp_path, archive, target, state):
  path = write_archive(tmp_path / 'm.pt', target + state + b'b0' + a_dict({'w': WEIGHT_REF}))
  assert 'cut short, damaged' in complaint(path)
  assert_same(read_all(archive)['w'], WEIGHT)


def test_calling_a_script_s_class_does_nothing(tmp_path):
  made = called(word('__torch__.os', 'system'), plain(f'touch {tmp_path}/made'))
  read = read_all(write_archive(tmp_path / 'm.pt', script('Net', {'w': WEIGHT_REF, 'x': made})))
  assert read.keys() == {'w'}
  assert os.listdir(tmp_path) == ['m.pt']


def test_the_old_format_needs_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'old.pth'
  path.write_bytes(LEGACY + pickle.dumps({'w': Payload(tmp_path / 'made')}, 2))
  message = complaint(path)
  assert f'{path} is of' in message
  assert 'before 1.6' in message
  assert "pip install 'torch>=" in message
  assert os.listdir(tmp_path) == ['old.pth']


def test_the_old_format_is_not_given_to_a_torch_that_is_not_safe(tmp_path, monkeypatch):
  class Torch:
    __version__ = '2.9.1+cpu'

  monkeypatch.setitem(sys.modules, 'torch', Torch)
  (tmp_path / 'old.pth').write_bytes(LEGACY)
  assert 'not safe to open with torch 2.9.1+cpu' in complaint(tmp_path / 'old.pth')


# --- No tensor file at all.


def test_places_that_hold_no_file(tmp_path):
  assert 'there is no weights file' in complaint(tmp_path / 'nope.safetensors')
  assert 'there is no weights file' in complaint(tmp_path / 'nope.index.json')
  assert 'is a folder' in complaint(tmp_path)
  (tmp_path / 'x.safetensors').mkdir()
  assert 'is a folder' in complaint(tmp_path / 'x.safetensors')
  assert 'copy it here first' in complaint('gs://bucket/model.safetensors')


@pytest.mark.parametrize('name', ['x.safetensors', 'x.bin', 'x.safetensors.index.json'])
def test_an_empty_file_is_named(tmp_path, name):
  (tmp_path / name).write_bytes(b'')
  assert f'{tmp_path / name} is empty' in complaint(tmp_path / name)


@pytest.mark.parametrize(
  'content',
  [
    b'\x89PNG\r\n\x1a\n' + bytes(64),
    b'<!doctype html><html></html>',
    b'version https://git-lfs.github.com/spec/v1\n',
    b'x',
    pickle.dumps({'w': WEIGHT}),
  ],
)
def test_a_file_of_another_format_is_named(tmp_path, content):
  (tmp_path / 'x.bin').write_bytes(content)
  message = complaint(tmp_path / 'x.bin')
  assert f'{tmp_path / "x.bin"} is not a file of tensors' in message
  assert repr(content[:8]) in message
  (tmp_path / 'x.safetensors').write_bytes(content)
  assert 'x.safetensors is cut short, damaged or of another' in complaint(
    tmp_path / 'x.safetensors'
  )


def test_a_file_that_may_not_be_read_is_named(archive, monkeypatch):
  def deny(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(Path, 'open', deny)
  assert f'cannot read {archive} (Permission denied)' in complaint(archive)


def test_a_tensor_that_is_not_there_is_named(safetensors, archive):
  for path in (safetensors, archive):
    with open_tensors(path) as file:
      for ask in (file.shape, file.dtype, file.read):
        with pytest.raises(UnclipError, match=rf'{path.name} lacks head\.bias'):
          ask('head.bias')


# --- Several files.


@pytest.fixture
def sharded(tmp_path):
  safetensors_numpy.save_file({'a': WEIGHT, 'b': BIAS}, tmp_path / 'm-1.safetensors')
  safetensors_numpy.save_file({'c': WEIGHT.T.copy()}, tmp_path / 'm-2.safetensors')
  places = {'a': 'm-1.safetensors', 'b': 'm-1.safetensors', 'c': 'm-2.safetensors'}
  return write_index(tmp_path, places)


def write_index(folder: Path, places: object) -> Path:
  path = folder / 'm.safetensors.index.json'
  path.write_text(json.dumps({'metadata': {'total_size': 99}, 'weight_map': places}))
  return path


def replace_in(index: Path, **places: str | None) -> None:
  old = json.loads(index.read_text())['weight_map']
  write_index(index.parent, {k: v for k, v in (old | places).items() if v is not None})


def test_shards_are_one_file(sharded):
  read = read_all(sharded)
  assert read.keys() == {'a', 'b', 'c'}
  assert_same(read['a'], WEIGHT)
  assert_same(read['b'], BIAS)
  assert_same(read['c'], WEIGHT.T)


def test_shards_may_be_archives_and_links(tmp_path):
  """A hub's cache keeps the files elsewhere, under other names."""
  folder = tmp_path / 'snapshot'
  folder.mkdir()
  write_archive(tmp_path / '0a1b', a_dict({'w': WEIGHT_REF}))
  (folder / 'pytorch_model-00001-of-00001.bin').symlink_to(tmp_path / '0a1b')
  blob = tmp_path / '2c3d'
  blob.write_text(json.dumps({'weight_map': {'w': 'pytorch_model-00001-of-00001.bin'}}))
  index = folder / 'pytorch_model.bin.index.json'
  index.symlink_to(blob)
  assert_same(read_all(index)['w'], WEIGHT)


@pytest.mark.parametrize(
  'name',
  [
    '/etc/passwd',
    '../m-1.safetensors',
    'sub/../../m-1.safetensors',
    '..\\m-1.safetensors',
    'C:m-1.safetensors',
    'gs://bucket/m-1.safetensors',
    '',
    7,
    ['m-1.safetensors'],
  ],
)
def test_a_shard_outside_of_the_folder_is_refused(sharded, name):
  replace_in(sharded, a=name)
  message = complaint(sharded)
  assert f'{sharded} names the file {name!r}: only files inside' in message


def test_an_index_and_its_files_that_disagree(sharded):
  replace_in(sharded, d='m-2.safetensors')
  assert 'm-2.safetensors lacks d, which m.safetensors.index.json' in complaint(sharded)
  replace_in(sharded, d=None, b=None)
  assert 'm-1.safetensors has b, which m.safetensors.index.json' in complaint(sharded)
  replace_in(sharded, b='m-2.safetensors')
  assert 'm-1.safetensors has b' in complaint(sharded)
  replace_in(sharded, b='m-1.safetensors', d='m-3.safetensors')
  assert f'{sharded} names m-3.safetensors, which is not there' in complaint(sharded)


def test_many_missing_names_make_one_line(sharded):
  replace_in(sharded, **{f'd{i}': 'm-2.safetensors' for i in range(20)})
  assert 'lacks d0, d1, d10 and 17 more' in complaint(sharded)


def test_a_tensor_of_two_shards_is_refused(sharded):
  both = {'a': WEIGHT, 'c': WEIGHT}
  safetensors_numpy.save_file(both, sharded.parent / 'm-2.safetensors')
  assert 'm-2.safetensors has a' in complaint(sharded)


def test_a_damaged_shard_is_named(sharded):
  shard = sharded.parent / 'm-2.safetensors'
  shard.write_bytes(shard.read_bytes()[:-1])
  assert f'{shard} is cut short' in complaint(sharded)


def test_an_index_that_names_itself_is_refused(sharded):
  replace_in(sharded, a=sharded.name)
  assert 'is not a file of tensors' in complaint(sharded)


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('{"weight_map": {"a": "m-1.safe', 'is not valid JSON'),
    ('{"weight_map": {"a": "m-1", "a": "m-2"}}', 'the name a twice'),
    ('\xff\xfe', 'is not valid JSON'),
    ('[' * 10**5, 'is not valid JSON'),
    ('[]', 'has no weight_map'),
    ('{"architectures": ["CLIPModel"]}', 'has no weight_map'),
    ('{"weight_map": ["a"]}', 'has no weight_map'),
    ('{"weight_map": {}}', 'has no weight_map'),
  ],
)
def test_a_damaged_index_is_named(sharded, text, part):
  sharded.write_bytes(text.encode('latin-1'))
  message = complaint(sharded)
  assert str(sharded) in message
  assert part in message


# --- What it costs.

BIG = np.arange(2**20, dtype=np.float32)  # 4 MiB


def big_safetensors(folder: Path) -> Path:
  safetensors_numpy.save_file(dict.fromkeys('abcd', BIG), folder / 'm.safetensors')
  return folder / 'm.safetensors'


def big_archive(folder: Path) -> Path:
  refs = {name: tensor(name, (2**10, 2**10), (1, 2**10), num_elements=2**20) for name in 'abcd'}
  return write_archive(
    folder / 'm.pt', a_dict(refs), {f'data/{name}': BIG.tobytes() for name in 'abcd'}
  )


@pytest.mark.parametrize('write', [big_safetensors, big_archive])
def test_the_host_holds_one_tensor(tmp_path, write):
  path = write(tmp_path)
  gc.collect()
  tracemalloc.start()
  try:
    with open_tensors(path) as file:
      file.shape('a')
      assert tracemalloc.get_traced_memory()[1] < BIG.nbytes / 8, 'read before it is asked for'
      for name in 'abcd':
        assert file.read(name).nbytes == BIG.nbytes
      assert tracemalloc.get_traced_memory()[1] < 1.1 * BIG.nbytes
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize('write', [big_safetensors, big_archive])
def test_an_array_outlives_its_file(tmp_path, write):
  path = write(tmp_path)
  with open_tensors(path) as file:
    array = file.read('b')
  path.unlink()
  array += 1
  assert sorted(array.ravel()) == sorted(BIG + 1)


def open_files() -> str:
  """What this process has open or mapped."""
  links = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]
  names = [os.readlink(link) for link in links if os.path.lexists(link)]
  return '\n'.join([*names, Path('/proc/self/maps').read_text()])


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='asks Linux what is open')
@pytest.mark.parametrize('damage', ['none', 'a shard cut short', 'a refused archive'])
def test_nothing_stays_open(sharded, damage):
  shard = sharded.parent / 'm-3.bin'
  write_archive(shard, a_dict({'w': WEIGHT_REF}))
  replace_in(sharded, w='m-3.bin')
  if damage == 'a shard cut short':
    shard.write_bytes(shard.read_bytes()[:-1])
  elif damage == 'a refused archive':
    write_archive(shard, a_dict({'w': word('os', 'system')}))
  if damage == 'none':
    with open_tensors(sharded):
      assert str(shard) in open_files()
  else:
    complaint(sharded)
  gc.collect()
  assert str(sharded.parent) not in open_files()
