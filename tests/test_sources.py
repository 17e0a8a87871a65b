import contextlib
import io
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_pictures import encoded, pixels

from experiments.emoji.compose import SHIPPED, decode
from unclip_jax.data.examples import BrokenExample
from unclip_jax.data.pictures import PictureConfig, make_picture
from unclip_jax.data.sources import TfdsExamples, data_source
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


# --- Pictures and captions.


class Captioned(tfds.core.GeneratorBasedBuilder):
  """Features as of coco_captions, and pictures in another feature, too."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First version.'}

  def _info(self):
    text = tfds.features.Text()
    features = {
      'image': tfds.features.Image(encoding_format='png'),
      'captions': tfds.features.Sequence({'id': np.int64, 'text': text}),
      'caption': text,
      'deep': {
        'image': tfds.features.Image(encoding_format='png'),
        'words': tfds.features.Sequence(text),
      },
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    def png(seed):
      return io.BytesIO(encoded(pixels(seed)))  # an array would need TensorFlow

    for i in range(3):
      captions = [{'id': 10 * i + j, 'text': f'{i} {j} é'} for j in range(i)]
      deep = {'image': png(10 + i), 'words': ['', f'word {i} ']}
      yield i, {'image': png(i), 'captions': captions, 'caption': f'one {i}', 'deep': deep}


@pytest.fixture(scope='module')
def captioned(tmp_path_factory) -> Path:
  tfds.disable_progress_bar()
  builder = Captioned(data_dir=tmp_path_factory.mktemp('tfds'), file_format='array_record')
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  return builder.data_path


def test_examples_of_a_data_set(captioned):
  def image(example):
    assert isinstance(example.image, bytes)  # not decoded yet
    rng = np.random.default_rng(0)
    return make_picture(example.image, example.id, PictureConfig(24), rng).image

  nested = TfdsExamples(captioned, 'train', caption='captions/text')
  numbers = []
  for example in nested:
    number = next(i for i in range(3) if (image(example) == pixels(i)).all())
    assert example.captions == tuple(f'{number} {j} é' for j in range(number))
    numbers.append(number)
  assert sorted(numbers) == [0, 1, 2]
  flat = TfdsExamples(captioned, 'train')
  assert [example.captions for example in flat] == [(f'one {i}',) for i in numbers]
  deep = TfdsExamples(captioned, 'train', 'deep/image', 'deep/words')
  assert [example.captions for example in deep] == [(f'word {i}',) for i in numbers]
  assert all((image(deep[j]) == pixels(10 + i)).all() for j, i in enumerate(numbers))
  assert len({example.id for example in flat}) == 3
  assert list(pickle.loads(pickle.dumps(flat))) == list(flat)


def test_features_that_are_not_there(captioned):
  for name in ('picture', 'captions/words', 'image/x'):
    with pytest.raises(UnclipError, match=rf"no feature '{name}': choose one of .*captions/text"):
      TfdsExamples(captioned, 'train', image=name)


def test_examples_of_the_emoji(directory):
  source = TfdsExamples(directory, 'val_concepts', 'sprite', 'label')
  records = data_source(directory, 'val_concepts')
  assert len(source) == len(records)
  assert source[5].image == records[5]['sprite']
  assert source[5].captions == (records[5]['label'].decode(),)
  sprite = decode(source[5].image)
  made = make_picture(source[5].image, '', PictureConfig(len(sprite)), np.random.default_rng(0))
  alpha = sprite[..., 3:] / 255
  assert np.abs(made.image - (sprite[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_damaged_record_is_one_broken_example(directory):
  content = bytearray((directory / SHARD).read_bytes())
  content[100_000:101_000] = bytes(1000)
  (directory / SHARD).write_bytes(content)
  source = TfdsExamples(directory, 'val_concepts', 'sprite', 'label')
  broken = 0
  for index in range(len(source)):
    try:
      assert source[index].captions
    except BrokenExample as error:
      assert error.id == f'emoji/val_concepts/{index}'
      broken += 1
  assert 0 < broken < len(source) / 2
