import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.emoji.compose import SHIPPED
from unclip_jax.data.sources import data_source
from unclip_jax.types import UnclipError

SHARD = 'emoji-val_concepts.array_record-00000-of-00001'


@pytest.fixture
def directory(tmp_path) -> Path:
  for name in ('dataset_info.json', 'features.json', SHARD):
    shutil.copy(SHIPPED / name, tmp_path / name)
  return tmp_path


def test_records_are_read_without_tensorflow(directory):
  records = data_source(directory, 'val_concepts')
  info = json.loads((SHIPPED / 'dataset_info.json').read_text())
  lengths = {split['name']: int(split['shardLengths'][0]) for split in info['splits']}
  assert len(records) == lengths['val_concepts']
  assert set(records[0]) >= {'sprite', 'style', 'label', 'keywords'}
  assert records[3] == records[3]
  assert 'tensorflow' not in sys.modules


def test_grain_transformations_apply(directory):
  records = data_source(directory, 'val_concepts')
  styles = records.shuffle(seed=3).map(lambda record: record['style']).batch(4)
  assert styles[0].shape == (4,)
  np.testing.assert_array_equal(styles[0], styles[0])


def test_missing_folder(tmp_path):
  with pytest.raises(UnclipError, match=r'nowhere.*build it first'):
    data_source(tmp_path / 'nowhere', 'train')


def test_unknown_split(directory):
  with pytest.raises(UnclipError, match=r"no split 'test'.*val_pairs"):
    data_source(directory, 'test')


def test_missing_shard(directory):
  with pytest.raises(UnclipError, match=r'emoji-train\.array_record.* is missing'):
    data_source(directory, 'train')


@pytest.mark.parametrize('size', [0, 1, 1000, 65536, 200_000, -1])
def test_shard_cut_short(directory, size):
  whole = (directory / SHARD).read_bytes()
  (directory / SHARD).write_bytes(whole[:size])
  with pytest.raises(UnclipError, match=f'{SHARD} is cut short') as error:
    data_source(directory, 'val_concepts')
  assert '\n' not in str(error.value)


def test_shard_of_another_data_set(directory):
  shutil.copy(SHIPPED / SHARD.replace('val_concepts', 'val_pairs'), directory / SHARD)
  with pytest.raises(UnclipError, match=f'{SHARD} holds .* of .* records'):
    data_source(directory, 'val_concepts')


def test_damaged_record(directory):
  content = bytearray((directory / SHARD).read_bytes())
  content[100_000:101_000] = bytes(1000)
  (directory / SHARD).write_bytes(content)
  records = data_source(directory, 'val_concepts')
  with pytest.raises(UnclipError, match=r"in split 'val_concepts' of .* is damaged"):
    for index in range(len(records)):
      records[index]


def test_damaged_description(directory):
  path = directory / 'dataset_info.json'
  whole = path.read_text()
  path.write_text(whole[:100])
  with pytest.raises(UnclipError, match=r'dataset_info\.json is damaged'):
    data_source(directory, 'val_concepts')
  path.write_text(whole.replace('array_record', 'tfrecord'))
  with pytest.raises(UnclipError, match='stored as tfrecord'):
    data_source(directory, 'val_concepts')
  path.write_text(whole)
  (directory / 'features.json').unlink()
  with pytest.raises(UnclipError, match=r'features\.json is missing'):
    data_source(directory, 'val_concepts')
