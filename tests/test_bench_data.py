"""The benchmark of the input pipeline at a tiny size: what it reports follows from what it took."""

import json

import numpy as np
import pytest

from experiments import bench_data
from unclip_jax.data.shards import TarShards
from unclip_jax.types import UnclipError


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bench') / 'shards'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench_data, 'SYNTHETIC', (2, 3))
    bench_data.write_synthetic(folder)
  return folder


def test_synthetic_pictures_compress_as_photographs_do(shards):
  source = TarShards(str(shards))
  assert [example.captions for example in source] == [
    (f'picture {i} of shard {shard}',) for shard in range(2) for i in range(3)
  ]
  sizes = [len(example.image) for example in source]
  assert len({*sizes}) == 6
  # At quality 90 a photograph takes 1.5 to 4 bits a pixel.
  assert 1.5 < 8 * np.mean(sizes) / (512 * 384) < 4


def test_it_reports_rates_and_what_they_feed(shards, tmp_path, capsys):
  options = ['--workers', '0', '--batch-size', '3', '--batches', '2', '--rounds', '3']
  args = ['--shards', str(shards), *options, '--json', str(tmp_path / 'a.json')]
  bench_data.main([*args, '--examples-per-second', '1'])
  report = json.loads((tmp_path / 'a.json').read_text())
  (result,) = report['results']
  rate = result['ours']['examples_per_second']
  assert rate['least'] <= rate['median'] <= rate['most'] and len(rate['values']) == 3
  assert result['ours']['per_core'] == rate['median']
  assert report['about']['num_examples'] == 6 and report['about']['needed'] == 1
  assert '0 workers give' in capsys.readouterr().out


def test_what_feeds_a_step():
  lines = bench_data.feeding(100.0, {1: 30.0, 4: 80.0, 8: 120.0})
  assert lines[0] == '100.0 examples/s are needed: 4 cores at 30.0 each'
  assert lines[1].endswith('1 workers give 0.30 of it: falls short, the step waits 70% of the time')
  assert lines[2].endswith('4 workers give 0.80 of it: falls short, the step waits 20% of the time')
  assert lines[3].endswith('8 workers give 1.20 of it: fed')


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--batches', '0'], '--batch-size, --batches and --rounds are 1 or more'),
    (['--bsr', '--peer', 'webdataset'], '--bsr has no peer'),
    (['--step-seconds', '0'], '--step-seconds is more than 0'),
  ],
)
def test_arguments_that_are_refused(shards, more, message):
  with pytest.raises(UnclipError, match=message):
    bench_data.main(['--shards', str(shards), *more])
