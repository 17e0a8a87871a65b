"""Weights in a store (`gs://`): each tensor is fetched by its bytes, nothing is copied to disk."""

import gc
import json
import os
import tempfile
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_store import BUCKET, FakeStore, serve
from hand_made_archives import (
  BIAS,
  BIAS_REF,
  WEIGHT,
  WEIGHT_REF,
  a_dict,
  assert_same,
  complaint,
  read_all,
  tensor,
  write_archive,
)
from safetensors import numpy as safetensors_numpy
from tiny_model import TEXTS, write_tiny_model

import unclip_jax
from unclip_jax.types import UnclipError
from unclip_jax.weights import byte_ranges
from unclip_jax.weights.safetensors import load_params
from unclip_jax.weights.tensor_files import open_tensors

BIG = np.arange(2**22, dtype=np.float32)  # 16 MiB
NAMES = 'abcd'
AHEAD = 5 * 2**20  # what fsspec fetches beyond what it is asked for


def big_safetensors(store: FakeStore) -> str:
  safetensors_numpy.save_file(dict.fromkeys(NAMES, BIG), store.folder / 'm.safetensors')
  return f'{BUCKET}/m.safetensors'


@pytest.fixture
def store(tmp_path, monkeypatch) -> FakeStore:
  def refuse(*args, **kwargs):
    raise AssertionError('something is copied to disk')

  for name in ('TemporaryDirectory', 'NamedTemporaryFile', 'mkstemp', 'mkdtemp'):
    monkeypatch.setattr(tempfile, name, refuse)
  return serve(tmp_path, monkeypatch)


def test_safetensors(store):
  tensors = {'w': WEIGHT, 'b': BIAS, 'n': np.array(7)}
  safetensors_numpy.save_file(tensors, store.folder / 'm.safetensors')
  read = read_all(f'{BUCKET}/m.safetensors')
  assert read.keys() == {'w', 'b', 'n'}
  assert_same(read['w'], WEIGHT)
  assert_same(read['b'], BIAS)
  assert_same(read['n'], np.array(7))


def test_an_archive_of_torch(store):
  refs = {
    'w': WEIGHT_REF,
    'b': BIAS_REF,
    'transposed': tensor('0', (4, 3), (1, 4)),
    'part': tensor('0', (2, 3), (4, 1), offset=5),
    'spread': tensor('0', (2, 3), (1, 0), offset=10),
    'nothing': tensor('0', (4, 0), (1, 1), offset=12),
  }
  for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    write_archive(store.folder / 'm.pt', a_dict(refs), compression=compression)
    read = read_all(f'{BUCKET}/m.pt')
    flat = WEIGHT.ravel()
    assert_same(read['w'], WEIGHT)
    assert_same(read['b'], BIAS)
    assert_same(read['transposed'], WEIGHT.T)
    assert_same(read['part'], np.stack([flat[5:8], flat[9:12]]))
    assert_same(read['spread'], np.repeat(flat[10:, None], 3, axis=1))
    assert_same(read['nothing'], np.zeros((4, 0), np.float32))


def test_the_index_of_several_files(store):
  folder = store.folder / 'clip'
  folder.mkdir()
  safetensors_numpy.save_file({'a': WEIGHT, 'b': BIAS}, folder / '1.safetensors')
  write_archive(folder / '2.bin', a_dict({'w': WEIGHT_REF}))
  places = {'a': '1.safetensors', 'b': '1.safetensors', 'w': '2.bin'}
  index = f'{BUCKET}/clip/model.safetensors.index.json'
  store.local(index).write_text(json.dumps({'weight_map': places}))
  read = read_all(index)
  assert read.keys() == {'a', 'b', 'w'}
  assert_same(read['b'], BIAS)
  assert_same(read['w'], WEIGHT)
  (folder / '2.bin').unlink()
  assert f'{index} names 2.bin, which is not there' in complaint(index)
  store.local(index).write_text(json.dumps({'weight_map': {'a': '../1.safetensors'}}))
  assert "names the file '../1.safetensors': only files inside" in complaint(index)


def test_a_model_of_ours(store):
  write_tiny_model(store.folder / 'model')
  here, there = unclip_jax.load(store.folder / 'model'), unclip_jax.load(f'{BUCKET}/model')
  assert there.config == here.config
  jax.tree.map(np.testing.assert_array_equal, dict(there.params), dict(here.params))
  np.testing.assert_array_equal(there.encode_text(TEXTS), here.encode_text(TEXTS))


def test_what_is_damaged_is_named(store):
  path = f'{BUCKET}/m.safetensors'
  assert f'there is no weights file {path}' in complaint(path)
  safetensors_numpy.save_file({'w': WEIGHT}, store.local(path))
  whole = store.local(path).read_bytes()
  store.local(path).write_bytes(whole[:-1])
  assert f'{path} is cut short' in complaint(path)
  with pytest.raises(UnclipError, match=f'{path} is cut short'):
    load_params(path, {'w': jax.ShapeDtypeStruct((3, 4), jnp.float32)})
  store.local(path).write_bytes(b'')
  assert f'{path} is empty' in complaint(path)
  assert f'{BUCKET} is a folder' in complaint(BUCKET)


@pytest.mark.parametrize('length', [0, 100])
def test_a_file_that_ends_while_it_is_open_is_named(store, length):
  path = big_safetensors(store)
  with open_tensors(path) as file:
    os.truncate(store.local(path), length)
    with pytest.raises(UnclipError, match=r'm\.safetensors: d cannot be read'):
      file.read('d')


def test_a_store_that_cannot_be_reached_is_named(monkeypatch, store):
  def fail(path):
    raise ConnectionError('no route to host\nsecond line')

  monkeypatch.setattr(store, 'info', fail)
  monkeypatch.setattr(store, 'exists', fail)
  message = complaint(f'{BUCKET}/m.safetensors')
  assert f'{BUCKET}/m.safetensors cannot be reached (no route to host)' in message


# --- What it costs.


def big_archive(store: FakeStore) -> str:
  refs = {name: tensor(name, BIG.shape, (1,), num_elements=BIG.size) for name in NAMES}
  data = {f'data/{name}': BIG.tobytes() for name in NAMES}
  write_archive(store.folder / 'm.pt', a_dict(refs), data)
  return f'{BUCKET}/m.pt'


@pytest.mark.parametrize('write', [big_safetensors, big_archive])
def test_a_tensor_is_fetched_alone_and_held_once(store, monkeypatch, write):
  monkeypatch.setattr(byte_ranges, '_BLOCK', 2**20)
  path = write(store)
  gc.collect()
  tracemalloc.start()
  try:
    with open_tensors(path) as file:
      opening = store.num_fetched
      assert opening < BIG.nbytes, 'tensors are fetched before they are asked for'
      for name in NAMES:
        np.testing.assert_array_equal(file.read(name)[::1000], BIG[::1000])
        assert tracemalloc.get_traced_memory()[1] < BIG.nbytes + 4 * AHEAD
        tracemalloc.reset_peak()
      each = (store.num_fetched - opening) / len(NAMES)
      assert each < BIG.nbytes + 2 * AHEAD, 'the same is fetched again'
  finally:
    tracemalloc.stop()


def test_an_array_of_ours_is_fetched_once(store):
  path = big_safetensors(store)
  like = dict.fromkeys(reversed(NAMES), jax.ShapeDtypeStruct(BIG.shape, jnp.float32))
  arrays = load_params(path, like)
  assert list(arrays) == sorted(NAMES)
  np.testing.assert_array_equal(arrays['d'], BIG)
  assert store.num_fetched < len(NAMES) * BIG.nbytes + 4 * AHEAD
