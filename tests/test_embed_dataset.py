"""Embeddings of a data set: those of the model itself, whole after a kill, read in training."""

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_pictures import encoded, pixels, write_shard, write_tar
from PIL import Image
from processes import environment
from tiny_model import CONFIG, load_tiny
from trained_processes import losses

from experiments import embed_dataset
from experiments.emoji import common, origin, train_ar_prior, train_decoder, train_prior
from experiments.emoji.options import parse_options
from experiments.emoji.stored import StoredRows, open_embeddings, sample_embeddings
from unclip_jax import sharding
from unclip_jax.data.embeddings import EmbeddingRows, shard_name, shard_range
from unclip_jax.data.pipeline import Pipeline, PipelineConfig
from unclip_jax.train.state import OptimizerConfig
from unclip_jax.types import UnclipError

SIZE = CONFIG.clip.vision.image_size
GOOD = (0, 1, 2, 3, 4, 5, 6, 7, 8)
NUM_SHARDS = 4


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A model, and shards of 9 good examples and one that is broken in the middle."""
  place = tmp_path_factory.mktemp('place')
  write_shard(place / 'data' / '0.tar', 0, 5)
  cut = {'x.png': encoded(pixels(0))[:90], 'x.txt': b'cut'}
  write_tar(place / 'data' / '1.tar', cut)
  write_shard(place / 'data' / '2.tar', 5, 4)
  return place


@pytest.fixture(scope='module')
def model(place):
  return load_tiny(place / 'model')


def arguments(place: Path, out: Path, *more: object) -> list[str]:
  given = ['--model', place / 'model', '--shards', place / 'data', '--out', out]
  sizes = ['--batch-size', 2, '--examples-per-shard', 3]
  return [*map(str, given), *map(str, sizes), *map(str, more)]


@pytest.fixture(scope='module')
def whole(place, model):
  out = place / 'whole'
  embed_dataset.main(arguments(place, out))
  return out


def test_they_are_those_of_the_model(place, model, whole):
  rows = EmbeddingRows(whole)
  columns = rows.columns(['z_i', 'z_t', 'ids', 'mask', 'states', 'caption', 'id'])
  assert columns['caption'] == [f'picture {i}' for i in GOOD]
  assert columns['id'] == [f'{0 if i < 5 else 2}.tar/{i:09d}' for i in GOOD]
  images = np.stack([embed_pixels(i) for i in GOOD])
  np.testing.assert_allclose(columns['z_i'], model.encode_image(images), atol=1e-5)
  np.testing.assert_allclose(columns['z_t'], model.encode_text(columns['caption']), atol=1e-5)
  tokens = model.tokenizer.encode(columns['caption'])
  np.testing.assert_array_equal(columns['ids'], tokens.ids)
  np.testing.assert_array_equal(columns['mask'], tokens.mask)
  text = CONFIG.clip.text
  assert columns['states'].shape == (9, text.context_length, text.width)
  assert columns['z_i'].std() > 0.01
  assert rows.meta['num_examples'] == 10 and rows.meta['embed_dim'] == CONFIG.clip.embed_dim
  assert rows.meta['dtype'] == 'float32' and rows.meta['model'] == str(place / 'model')


def embed_pixels(number: int) -> np.ndarray:
  """What CLIP is shown of a picture: reduced by Pillow as open_clip's and OpenAI's code does."""
  image = Image.fromarray(pixels(number)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
  return np.asarray(image)


def test_what_is_broken_is_named_beside_its_shard(whole):
  names = {path.name for path in whole.iterdir()}
  shards = {shard_name(i, NUM_SHARDS) for i in range(NUM_SHARDS)}
  assert names == {*shards, 'embeddings.json', f'{shard_name(2, NUM_SHARDS)}.broken.jsonl'}
  line = json.loads((whole / f'{shard_name(2, NUM_SHARDS)}.broken.jsonl').read_text())
  assert line['id'] == '1.tar/x' and 'not a picture' in line['reason']


def test_shards_cover_the_source_once():
  for num_examples, count in itertools.product((1, 7, 10, 1000), (1, 3, 7)):
    ranges = [shard_range(i, count, num_examples) for i in range(count)]
    assert [*itertools.chain(*ranges)] == [*range(num_examples)]
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def assert_same(found: Path, expected: Path) -> None:
  names = ('z_i', 'z_t', 'ids', 'mask', 'id')
  ours, theirs = EmbeddingRows(found).columns(names), EmbeddingRows(expected).columns(names)
  for name in names:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_job_that_is_killed_continues(place, whole):
  out = place / 'killed'
  args = arguments(place, out, '--with', 'z_t', 'tokens', 'states')
  code = '\n'.join(
    [
      'import os, signal',
      'from experiments import embed_dataset as job',
      'write = job.write_records',
      'def killed(path, records):',
      '  if "00002-of" in path.name:',
      '    path.write_bytes(b"half of it")',
      '    os.kill(os.getpid(), signal.SIGKILL)',
      '  write(path, records)',
      'job.write_records = killed',
      f'job.main({args!r})',
    ]
  )
  process = subprocess.run([sys.executable, '-c', code], env=environment(place / 'cache'))
  assert process.returncode == -signal.SIGKILL
  done = [out / shard_name(i, NUM_SHARDS) for i in (0, 1)]
  assert sorted(out.glob('*.array_record')) == done
  assert len(list(out.glob('.*.part'))) == 1
  with pytest.raises(UnclipError, match=r'killed lacks 2 of 4 shards, as .*00002-of-00004'):
    EmbeddingRows(out)
  before = [path.stat().st_mtime_ns for path in done]
  embed_dataset.main(args)
  assert [path.stat().st_mtime_ns for path in done] == before
  assert not list(out.glob('.*'))
  assert_same(out, whole)


def test_processes_share_the_shards(place, whole, tmp_path):
  extras = ('--with', 'z_t', 'tokens', 'states', '--num-processes', 2)
  embed_dataset.main(arguments(place, tmp_path, *extras, '--process-id', 1))
  made = [shard_name(i, NUM_SHARDS) for i in (1, 3)]
  assert sorted(path.name for path in tmp_path.glob('*.array_record')) == made
  embed_dataset.main(arguments(place, tmp_path, *extras, '--process-id', 0, '--workers', 1))
  assert_same(tmp_path, whole)


def test_another_job_does_not_mix_with_it(place, whole):
  with pytest.raises(UnclipError, match=r"embeddings of dtype 'float32', wanted is 'bfloat16'"):
    embed_dataset.main(
      arguments(place, whole, '--dtype', 'bfloat16', '--with', 'z_t', 'tokens', 'states')
    )
  with pytest.raises(UnclipError, match=r'embeddings of with .*: choose another --out'):
    embed_dataset.main(arguments(place, whole, '--with', 'z_t'))


def test_a_pipeline_reads_them(whole):
  rows = EmbeddingRows(whole)
  columns = rows.columns(['z_i', 'caption'])
  config = PipelineConfig(6, seed=1)
  with Pipeline(rows, config) as pipeline:
    batches = list(itertools.islice(pipeline, 3))
  assert sorted(itertools.chain(*(batch['caption'] for batch in batches))) == sorted(
    2 * columns['caption']
  )
  for batch in batches:
    places = [columns['caption'].index(caption) for caption in batch['caption']]
    np.testing.assert_array_equal(batch['z_i'], columns['z_i'][places])
  with Pipeline(rows, config, batch_rows=[3, 4, 5]) as pipeline:
    np.testing.assert_array_equal(next(pipeline)['z_i'], batches[0]['z_i'][3:])


@pytest.fixture(scope='module')
def without_states(place, model):
  """What most of a record is left out: a tenth of the bytes."""
  out = place / 'without_states'
  embed_dataset.main(arguments(place, out, '--with', 'tokens'))
  return out


def options(place: Path, run: Path, *more: object) -> list[str]:
  return [f'--run={run}', f'--init={place / "model"}', '--batch-size=4', *map(str, more)]


def assert_rows_of_the_pool(found: dict, expected: dict) -> None:
  """Each is that of the pool with the same caption."""
  assert found.keys() == expected.keys()
  known = np.asarray(expected['ids'])
  places = [np.flatnonzero((known == row).all(1))[0] for row in np.asarray(found['ids'])]
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    wanted = np.asarray(array, np.float32)[places]
    np.testing.assert_allclose(np.asarray(found[name], np.float32), wanted, atol=1e-5, rtol=0.01)


@pytest.mark.parametrize('stored', ['whole', 'without_states'])
def test_a_prior_is_given_what_it_is_given_of_emoji(stored, place, tmp_path, request):
  given = options(place, tmp_path / 'run', '--embeddings', request.getfixturevalue(stored))
  train = parse_options(given, '', OptimizerConfig(), 20, 4, has_embeddings=True)
  origin.begin(train, 'prior')
  captions = [f'picture {i}' for i in GOOD]
  images = np.stack([embed_pixels(i) for i in GOOD])
  expected = common.encode_pool(train, train.tokenizer, captions, images)
  stream, held_out = open_embeddings(train, 'prior', sharding.make_mesh(), 4)
  assert_rows_of_the_pool(held_out, expected)
  assert np.array_equal(held_out['ids'], expected['ids'][5:])
  for step in (0, 1):
    assert_rows_of_the_pool(stream.batch(step), expected)
    assert {row['caption'] for row in stream.examples(step)} < {*captions[:5]}
  sample = sample_embeddings(train, 4, ['z_i', 'z_t'])
  for name, column in sample.items():
    np.testing.assert_allclose(column, expected[name][:5], atol=1e-5)
  with pytest.raises(UnclipError, match='9 examples, of which 9 are held out: take more'):
    open_embeddings(train, 'prior', sharding.make_mesh(), 9)


SHORT = ['--steps=2', '--chunk=1', '--set=optimizer.warmup_steps=0']


@pytest.mark.usefixtures('_few_are_held_out')
def test_a_prior_is_trained_on_them(place, without_states, tmp_path):
  train_prior.main(options(place, tmp_path, *SHORT, '--embeddings', without_states))
  assert [*losses(tmp_path, 'prior')] == [1, 2]


def test_other_processes_can_read_them(whole):
  rows = StoredRows(EmbeddingRows(whole), ['z_i', 'states'])
  ours, theirs = (each.read(3, None) for each in (rows, pickle.loads(pickle.dumps(rows))))
  assert theirs['id'] == '0.tar/000000003' and ours.keys() == theirs.keys()
  np.testing.assert_array_equal(ours['states'], theirs['states'])


@pytest.mark.usefixtures('_few_are_held_out')
def test_an_ar_prior_takes_components_of_those_that_are_not_held_out(
  place, without_states, tmp_path
):
  arguments = options(place, tmp_path, *SHORT, '--embeddings', without_states)
  with pytest.raises(UnclipError, match='5 embeddings are too few for components of 16 dimensions'):
    train_ar_prior.main([*arguments, '--set=prior.num_components=4'])


def test_those_of_another_clip_are_refused(place, whole, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(whole, other)
  meta = json.loads((other / 'embeddings.json').read_text())
  (other / 'embeddings.json').write_text(json.dumps(meta | {'parameters': '0'}))
  with pytest.raises(UnclipError, match=r"they are of another CLIP .* than the run's"):
    train_prior.main(options(place, tmp_path / 'run', '--embeddings', other))


@pytest.fixture
def _few_are_held_out(monkeypatch):
  for script in (train_prior, train_ar_prior, train_decoder):
    monkeypatch.setattr(script, 'NUM_HELD_OUT', 4)


@pytest.mark.usefixtures('_few_are_held_out')
def test_a_decoder_is_given_their_pictures_too(place, whole, tmp_path):
  """The pictures as without `--embeddings`, each beside its own stored one."""
  stored = EmbeddingRows(whole).columns(['id', 'z_i', 'ids', 'mask'])
  rows_by_id = []
  for more in ((), ('--embeddings', whole)):
    given = options(place, tmp_path, '--shards', place / 'data', *more)
    train = parse_options(given, '', OptimizerConfig(), 20, 4, has_embeddings=True, has_source=True)
    origin.begin(train, 'decoder')
    stream, _ = train_decoder.load_data(train, sharding.make_mesh())
    rows_by_id.append({})
    for step in range(5):
      batch = {name: np.asarray(value) for name, value in stream.batch(step).items()}
      for i, about in enumerate(stream.examples(step)):
        rows_by_id[-1][about['id']] = {name: column[i] for name, column in batch.items()}
  seen, read = rows_by_id
  assert len(seen.keys() & read.keys()) >= 4
  for name in seen.keys() & read.keys():
    assert seen[name].keys() == read[name].keys()
    np.testing.assert_array_equal(seen[name]['image'], read[name]['image'])
    place_there = stored['id'].index(name)
    for column in ('z_i', 'ids', 'mask'):
      np.testing.assert_array_equal(read[name][column], stored[column][place_there])


@pytest.mark.usefixtures('_few_are_held_out')
def test_embeddings_of_other_pictures_are_refused(place, whole, tmp_path):
  given = options(place, tmp_path / 'run', '--embeddings', whole)
  with pytest.raises(UnclipError, match='--embeddings: the pictures that they are of are needed'):
    train_decoder.main(given)
  for name, count, message in (
    ('few', 5, 'the source has 5 examples, 10 were embedded'),
    ('others', 10, r'number \d+ of its source, which is others\.tar/'),
  ):
    write_shard(tmp_path / name / f'{name}.tar', 0, count)
    more = [*given, f'--shards={tmp_path / name}']
    train = parse_options(more, '', OptimizerConfig(), 20, 4, has_embeddings=True, has_source=True)
    origin.begin(train, 'decoder')
    with pytest.raises(UnclipError, match=message):
      train_decoder.load_data(train, sharding.make_mesh())


def test_what_cannot_be_read_is_named(whole, tmp_path):
  with pytest.raises(UnclipError, match=r'has no embeddings\.json: give a folder'):
    EmbeddingRows(tmp_path)
  with pytest.raises(UnclipError, match=r"has no 'w', only caption, id, .*: run embed_dataset"):
    EmbeddingRows(whole).columns(['w'])
  out = tmp_path / 'out'
  shutil.copytree(whole, out)
  os.truncate(out / shard_name(1, NUM_SHARDS), 100)
  with pytest.raises(UnclipError, match=r'00001-of-00004\.array_record is cut short or damaged'):
    EmbeddingRows(out)
  meta = json.loads((out / 'embeddings.json').read_text())
  for text, message in (
    ('{', 'is damaged'),
    ('{}', 'does not say how many shards'),
    (json.dumps(meta | {'format': 2}), 'is of format 2, this version reads 1'),
  ):
    (out / 'embeddings.json').write_text(text)
    with pytest.raises(UnclipError, match=message):
      EmbeddingRows(out)


def test_arguments_that_are_refused(place, tmp_path):
  for more, message in (
    (('--batch-size', 0), '--batch-size and --examples-per-shard are 1 or more'),
    (('--process-id', 1), '--process-id 1 of 1: number the processes from 0'),
    (('--shards', tmp_path / '9.tar'), r'there is no .*9\.tar'),
    (('--model', tmp_path / 'nothing'), 'nothing'),
  ):
    with pytest.raises(UnclipError, match=message):
      embed_dataset.main(arguments(place, tmp_path / 'out', *more))
  assert not (tmp_path / 'out').exists()
