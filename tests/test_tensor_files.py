"""Tensor files of other programs: what is in them comes out, damage is named."""

import gc
import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hand_made_archives import (
  BIAS,
  BIAS_REF,
  STORAGES,
  WEIGHT,
  WEIGHT_REF,
  a_dict,
  assert_same,
  complaint,
  read_all,
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


@pytest.mark.parametrize(
  ('header', 'part'),
  [
    ('[]', 'is not a JSON object'),
    ('{"x"', 'JSONDecodeError'),
    ('{"x": 3}', 'x is described by 3'),
    ('{"x": {"dtype": "F32", "shape": [0]}}', 'x is described by'),
    ('{"x": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}', 'x is described by'),
    ('{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}', 'x is described by'),
    ('{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', 'x is described by'),
    ('{"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', 'x is described by'),
    ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', 'x takes the bytes 0 to 8'),
    ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', 'x takes the bytes 0 to 4'),
    ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', 'x takes the bytes 0 to 4'),
    ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 'it should have'),
    ('{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', 'it should have'),
  ],
)
def test_a_header_of_safetensors_that_is_wrong_is_named(tmp_path, header, part):
  path = write_header(tmp_path, header)
  path.write_bytes(path.read_bytes() + bytes(8))
  message = complaint(path)
  assert f'{path} is cut short, damaged or of another format' in message
  assert part in message


def test_words_about_the_file_and_gaps_in_its_order_do_no_harm(tmp_path):
  """Other programs write tensors in another order than their names, and empty ones anywhere."""
  one = '{"dtype": "U8", "shape": [2], "data_offsets": [%d, %d]}'
  none = '{"dtype": "F32", "shape": [0, 3], "data_offsets": [2, 2]}'
  parts = f'"z": {one % (0, 2)}, "b": {one % (2, 4)}, "c": {none}'
  path = write_header(tmp_path, f'{{"__metadata__": {{"format": "pt"}}, {parts}}}')
  path.write_bytes(path.read_bytes() + bytes([1, 2, 3, 4]))
  read = read_all(path)
  assert list(read) == ['z', 'c', 'b']
  assert_same(read['z'], np.array([1, 2], np.uint8))
  assert_same(read['b'], np.array([3, 4], np.uint8))
  assert read['c'].shape == (0, 3)


def test_a_safetensors_name_given_twice_is_named(tmp_path):
  one = '"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
  assert 'the name x twice' in complaint(write_header(tmp_path, f'{{{one}, {one}}}'))
  assert read_all(write_header(tmp_path, f'{{{one}}}'))['x'].shape == (0,)


def test_a_file_of_the_user_s_home(safetensors, monkeypatch):
  monkeypatch.setenv('HOME', str(safetensors.parent))
  assert_same(read_all('~/model.safetensors')['w'], WEIGHT)


# --- No tensor file at all.


def test_places_that_hold_no_file(tmp_path):
  assert 'there is no weights file' in complaint(tmp_path / 'nope.safetensors')
  assert 'there is no weights file' in complaint(tmp_path / 'nope.index.json')
  assert 'is a folder' in complaint(tmp_path)
  (tmp_path / 'x.safetensors').mkdir()
  assert 'is a folder' in complaint(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('name', ['x.safetensors', 'x.bin', 'x.safetensors.index.json'])
def test_an_empty_file_is_named(tmp_path, name):
  (tmp_path / name).write_bytes(b'')
  assert f'{tmp_path / name} is empty' in complaint(tmp_path / name)


@pytest.mark.parametrize(
  'content',
  [
    b'\x89PNG\r\n\x1a\n' + bytes(64),
    b'<!doctype html><html></html>',
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


POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize('name', ['x.safetensors', 'x.bin', 'x.safetensors.index.json'])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
  (tmp_path / name).write_text(POINTER)
  assert f'{tmp_path / name} is a pointer of Git LFS' in complaint(tmp_path / name)
  assert 'run `git lfs pull`' in complaint(tmp_path / name)


def test_a_shard_that_is_a_pointer_of_git_lfs_is_named(sharded):
  (sharded.parent / 'm-2.safetensors').write_text(POINTER)
  assert 'm-2.safetensors is a pointer of Git LFS' in complaint(sharded)


def test_a_file_that_may_not_be_read_is_named(archive, monkeypatch):
  def deny(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(epath.Path()), 'open', deny)
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


# Only Linux lists what a process has mapped: elsewhere there is nothing to ask.
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
