"""Torch's archives: what is in them comes out, nothing in them runs, damage is named.

Those that torch itself writes are read in tests/parity/test_torch_files.py.
"""

import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hand_made_archives import (
  BIAS,
  BIAS_REF,
  DATA,
  LEGACY,
  STORAGES,
  WEIGHT,
  WEIGHT_REF,
  a_dict,
  assert_same,
  called,
  complaint,
  ordered,
  parameter,
  plain,
  read_all,
  script,
  stored,
  tensor,
  word,
  write_archive,
)
from safetensors import numpy as safetensors_numpy

from unclip_jax.types import UnclipError
from unclip_jax.weights.tensor_files import open_tensors


@pytest.fixture
def archive(tmp_path):
  return write_archive(tmp_path / 'model.pt', a_dict({'w': WEIGHT_REF, 'b': BIAS_REF}))


@pytest.fixture
def safetensors(tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors_numpy.save_file({'w': WEIGHT, 'b': BIAS, 'n': np.array(7)}, path)
  return path


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
