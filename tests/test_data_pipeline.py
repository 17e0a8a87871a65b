"""The order of batches, what takes the place of a broken example, and stopping anywhere."""

import itertools
import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from made_pictures import encoded, pixels, write_shard, write_tar
from PIL import Image
from processes import environment

from unclip_jax.data.examples import BrokenExample, Example
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.data.pipeline import PictureRows, Pipeline, PipelineConfig
from unclip_jax.data.shards import TarShards
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import UnclipError

NUM_EXAMPLES = 21
PICTURE = PictureConfig(24, crop=16, random_crop=True, bsr_factor=4)
CONFIG = PipelineConfig(batch_size=8, seed=5)


class Examples:
  """In memory; example i has a picture of the level i, and captions 'i a', 'i b', ..."""

  def __init__(self, num_examples, broken=(), num_captions=1):
    self._num_examples, self._broken, self._num_captions = num_examples, broken, num_captions

  def __len__(self):
    return self._num_examples

  def __getitem__(self, index):
    if index in self._broken:
      raise BrokenExample(f'id {index}', 'is broken')
    captions = tuple(f'{index} {letter}' for letter in 'abcde'[: self._num_captions])
    return Example(np.full((8, 8, 3), index, np.uint8), captions, f'id {index}')


def plain(num_examples, size=8, **options):
  source = Examples(num_examples, **options)
  return PictureRows(source, PictureConfig(size), needs_caption=False)


def take(pipeline, count):
  return list(itertools.islice(pipeline, count))


def indices(batches):
  return [int(image[0, 0, 0]) for batch in batches for image in batch['image']]


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for ours, theirs in zip(found, expected, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value)


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """Shards of pictures, with two that are broken among them."""
  folder = tmp_path_factory.mktemp('shards')
  write_shard(folder / '0.tar', 0, 11)
  write_shard(folder / '1.tar', 11, NUM_EXAMPLES - 13)
  image = encoded(pixels(0))
  write_tar(folder / '2.tar', {'x.png': image[:100], 'x.txt': b'cut', 'y.png': image})
  texts = [f'picture {i}' for i in range(NUM_EXAMPLES)]
  tokenizer = Tokenizer.train(texts, 300, 12)
  return PictureRows(TarShards(str(folder)), PICTURE, tokenizer)


@pytest.fixture(scope='module')
def expected(rows):
  """Seven batches: two epochs and a half."""
  with Pipeline(rows, CONFIG) as pipeline:
    return take(pipeline, 7)


def test_what_a_batch_holds(rows, expected):
  batch = expected[0]
  assert batch.keys() == {'image', 'low', 'caption', 'id', 'ids', 'mask'}
  assert batch['image'].shape == (8, 16, 16, 3) and batch['image'].dtype == np.uint8
  assert batch['low'].shape == (8, 4, 4, 3) and batch['low'].dtype == np.uint8
  for image, caption, name in zip(batch['image'], batch['caption'], batch['id'], strict=True):
    number = int(name.rpartition('/')[2])
    assert caption == f'picture {number}'
    whole = pixels(number)
    crops = np.lib.stride_tricks.sliding_window_view(whole, (16, 16), (0, 1))
    assert (crops.transpose(0, 1, 3, 4, 2) == image).all(axis=(2, 3, 4)).any()
  tokenizer = pickle.loads(pickle.dumps(rows._tokenizer))
  tokens = tokenizer.encode(batch['caption'])
  np.testing.assert_array_equal(batch['ids'], tokens.ids)
  np.testing.assert_array_equal(batch['mask'], tokens.mask)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own():
  with Pipeline(plain(20), PipelineConfig(10, seed=3)) as pipeline:
    epochs = [indices(take(pipeline, 2)) for _ in range(4)]
  assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in [*epochs, list(range(20))]}) == 5
  with Pipeline(plain(20), PipelineConfig(10, seed=4)) as pipeline:
    assert indices(take(pipeline, 2)) != epochs[0]
  with Pipeline(plain(6), PipelineConfig(4, shuffle=False)) as pipeline:
    assert indices(take(pipeline, 3)) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_global_batches(rows, expected, count):
  shares = []
  for batch_rows in np.split(np.arange(8), count):
    with Pipeline(rows, CONFIG, batch_rows=batch_rows) as pipeline:
      shares.append(take(pipeline, 7))
  for batch, parts in zip(expected, zip(*shares, strict=True), strict=True):
    joined = {name: np.concatenate([part[name] for part in parts]) for name in batch}
    assert_equal([joined], [batch])


def test_workers_give_the_same_and_continue_where_others_stopped(rows, expected, tmp_path):
  """Two workers in other processes, then none, then one; the state goes through a file."""
  state, batches = tmp_path / 'state.json', []
  for num_workers, count in ((2, 4), (0, 1), (1, 2)):
    with Pipeline(rows, CONFIG, num_workers=num_workers) as pipeline:
      if state.exists():
        pipeline.set_state(json.loads(state.read_text()))
      batches += take(pipeline, count)
      state.write_text(json.dumps(pipeline.get_state()))
  assert_equal(batches, expected)


@pytest.mark.parametrize('stop', [0, 3, 6])
def test_it_continues_at_the_exact_example(rows, expected, stop):
  with Pipeline(rows, CONFIG, num_threads=2, read_ahead=3) as pipeline:
    assert_equal(take(pipeline, stop), expected[:stop])
    state = pipeline.get_state()
    take(pipeline, 1)
    pipeline.set_state(state)  # back again
    assert_equal(take(pipeline, 1), expected[stop : stop + 1])
  with Pipeline(rows, CONFIG) as other:
    other.set_state(state)
    assert_equal(take(other, 7 - stop), expected[stop:])


def test_another_number_of_processes_continues(rows, expected):
  with Pipeline(rows, CONFIG, batch_rows=[1, 4]) as pipeline:
    for batch, whole in zip(take(pipeline, 3), expected, strict=False):
      np.testing.assert_array_equal(batch['image'], whole['image'][[1, 4]])
    state = pipeline.get_state()
  with Pipeline(rows, CONFIG) as pipeline:
    pipeline.set_state(state)
    assert_equal(take(pipeline, 2), expected[3:5])


def test_broken_examples_are_replaced_counted_and_named(rows, tmp_path):
  path = tmp_path / 'run' / 'broken.jsonl'
  with Pipeline(rows, CONFIG, broken_file=path) as pipeline:
    names = [name for batch in take(pipeline, 7) for name in batch['id']]
    assert pipeline.num_broken == 2
  assert not {'2.tar/x', '2.tar/y'} & {*names}
  assert len(names) == 56
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  reasons = {line['id']: line['reason'] for line in lines}
  assert len(lines) == 2 and reasons.keys() == {'2.tar/x', '2.tar/y'}
  assert reasons['2.tar/x'].startswith('not a picture that can be read')
  assert reasons['2.tar/y'] == 'has no caption'
  # A run that continues names none again, not even after a line that was cut.
  path.write_text(path.read_text()[:-5])
  with Pipeline(rows, CONFIG, broken_file=path) as pipeline:
    take(pipeline, 7)
    assert pipeline.num_broken == 2
  *_, last = path.read_text().splitlines()
  assert json.loads(last)['id'] == lines[1]['id']


def test_replacements_are_drawn_from_all_and_the_same_again():
  broken = range(0, 100, 2)
  config = PipelineConfig(50, shuffle=False)
  with Pipeline(plain(100, broken=broken), config) as pipeline:
    batches = take(pipeline, 8)
  found = np.array(indices(batches)).reshape(-1, 2)
  np.testing.assert_array_equal(found[:, 1], np.tile(np.arange(1, 100, 2), 4))
  assert (found[:, 0] % 2 == 1).all()
  assert len({*found[:, 0]}) > 40
  with Pipeline(plain(100, broken=broken), config) as pipeline:
    pipeline.set_state(pipeline.get_state() | {'next_batch': 5})
    assert_equal(take(pipeline, 3), batches[5:])


def test_a_source_of_broken_examples_is_refused():
  with (
    Pipeline(plain(10, broken=range(10)), CONFIG) as pipeline,
    pytest.raises(UnclipError, match=r'200 examples, .* are broken, as id \d \(is broken\)'),
  ):
    next(pipeline)


def test_captions_are_drawn():
  """Of five, each about as often, other ones in other epochs."""
  rows = PictureRows(Examples(100, num_captions=5), PictureConfig(8))
  with Pipeline(rows, PipelineConfig(100, shuffle=False)) as pipeline:
    epochs = [batch['caption'] for batch in take(pipeline, 4)]
  for epoch in epochs:
    assert [int(caption.split()[0]) for caption in epoch] == list(range(100))
  letters = [[caption[-1] for caption in epoch] for epoch in epochs]
  assert len({tuple(row) for row in letters}) == 4
  counts = np.unique(np.array(letters), return_counts=True)[1]
  assert len(counts) == 5 and counts.min() > 50


def test_without_a_caption():
  source = Examples(4, num_captions=0)
  with Pipeline(PictureRows(source, PictureConfig(8), needs_caption=False), CONFIG) as pipeline:
    assert next(pipeline)['caption'] == [''] * 8
  with pytest.raises(BrokenExample, match='has no caption'):
    PictureRows(source, PictureConfig(8)).read(0, np.random.default_rng(0))


def test_a_shard_that_vanishes_ends_it_in_a_worker_too(tmp_path):
  path = write_shard(tmp_path / '0.tar', 0, 9)
  rows = PictureRows(TarShards(str(path)), PictureConfig(24))
  path.unlink()
  for num_workers in (0, 1):
    with (
      Pipeline(rows, CONFIG, num_workers=num_workers) as pipeline,
      pytest.raises(UnclipError, match=r'0\.tar can no longer be read') as error,
    ):
      next(pipeline)
    assert not isinstance(error.value, BrokenExample)


def test_workers_end_with_their_parent(tmp_path):
  """Also where that is killed: else they would stay, with the memory that they hold."""
  path = write_shard(tmp_path / '0.tar', 0, 4)
  code = f"""
import multiprocessing, time
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.data.pipeline import PictureRows, Pipeline, PipelineConfig
from unclip_jax.data.shards import TarShards
rows = PictureRows(TarShards({str(path)!r}), PictureConfig(8))
pipeline = Pipeline(rows, PipelineConfig(2), num_workers=1)
next(pipeline)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""
  env = environment(tmp_path / 'cache')
  with subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE) as parent:
    (worker,) = parent.stdout.readline().split()
    parent.kill()
  deadline = time.monotonic() + 60
  while (state := run_ps(worker)) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not state


def run_ps(pid: bytes) -> str:
  """The state of a process, nothing where it has ended."""
  said = subprocess.run(['ps', '-o', 'stat=', '-p', pid], capture_output=True, text=True).stdout
  return '' if said.startswith('Z') else said.strip()


def test_a_broken_example_comes_through_a_pickle():
  error = pickle.loads(pickle.dumps(BrokenExample('x', 'why')))
  assert (error.id, error.reason, str(error)) == ('x', 'why', 'x: why')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_rows': [0, 8]}, '2 rows of a batch of 8: take one or more of 0 to 7'),
    ({'batch_rows': []}, '0 rows of a batch of 8'),
    ({'num_workers': -1}, '-1 workers'),
    ({'read_ahead': 0}, '0 batches ahead'),
  ],
)
def test_arguments_that_are_refused(options, message):
  with pytest.raises(UnclipError, match=message):
    Pipeline(plain(4), CONFIG, **options)


def test_configs_and_states_that_are_refused(tmp_path):
  with pytest.raises(UnclipError, match='batch_size 0'):
    PipelineConfig(0)
  with pytest.raises(UnclipError, match='seed -1'):
    PipelineConfig(1, seed=-1)
  with pytest.raises(UnclipError, match='there are no examples'):
    Pipeline(plain(0), CONFIG)
  with Pipeline(plain(1000), CONFIG) as pipeline:
    state = pipeline.get_state()
    for change, message in (
      ({'seed': 6}, 'had seed 6 before and has 5 now'),
      ({'num_examples': 1001}, 'had num_examples 1,001 before and has 1,000 now'),
      ({'batch_size': 4}, 'had batch_size 4 before and has 8 now'),
      ({'shuffle': 0}, 'had shuffle 0 before and has 1 now'),
      ({'next_batch': -1}, 'cannot begin at batch -1'),
      ({'next_batch': None}, 'lacks next_batch: it is damaged'),
    ):
      with pytest.raises(UnclipError, match=message):
        pipeline.set_state(state | change)
  (tmp_path / 'file').write_text('')
  with (
    Pipeline(plain(4, broken=(0,)), CONFIG, broken_file=tmp_path / 'file' / 'x') as pipeline,
    pytest.raises(UnclipError, match=r'cannot write .*file/x'),
  ):
    next(pipeline)


def test_a_picture_with_too_many_pixels_is_left_out(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24 * 24)
  monkeypatch.setattr(Image, '_decompression_bomb_check', lambda size: None)

  class Two(Examples):
    def __getitem__(self, index):
      return super().__getitem__(index)._replace(image=encoded(pixels(index, 24 + index)))

  rows = PictureRows(Two(2), PictureConfig(8))
  with Pipeline(rows, CONFIG) as pipeline:
    assert {*next(pipeline)['id']} == {'id 0'}
    assert pipeline.num_broken == 1
