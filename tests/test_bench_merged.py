"""Runs that measured different stages, put together; their figures are written by hand here."""

import json
from pathlib import Path

import pytest

from experiments import bench_sampling

STAGES = ('clip', 'prior', 'decoder', 'upsampler_0')
PEAKS = {
  'flops_per_second': 1e12,
  'bytes_per_second': 1e11,
  'skinny_bytes_per_second': 1e10,
  'skinny_rows': 6,
}


def spread(value):
  return {'median': value, 'least': value, 'most': value, 'values': [value]}


def about(**changed):
  own = {
    'date': '2026-11-27 09:00 UTC',
    'model': 'a model',
    'dtype': 'float32',
    'steps': dict.fromkeys(STAGES[1:], 4),
    'samplers': dict.fromkeys(STAGES[1:], 'ddpm'),
    'guided': ['prior'],
    'rounds': 1,
    'model_devices': 1,
    'num_devices': 1,
    'device': 'cpu',
    'platform': 'cpu',
    'machine': 'Linux',
    'threads': 2,
    'load': 0.0,
    'versions': {'jax': '1'},
    'peer': {'versions': {}, 'threads': 2, 'device': 'cpu', 'attention': 'theirs'},
  }
  return own | changed


def entry(stage, batch=1, **changed):
  contender = {
    'seconds': spread(6.0),
    'ratio': spread(3.0),
    'largest_error': 0.0,
    'rms_error': 0.0,
  }
  own = {
    'stage': stage,
    'batch_size': batch,
    'devices': 1,
    'steps': None if stage == 'clip' else 4,
    'compile_seconds': 1.0,
    'seconds': spread(2.0),
    'images_per_second': 0.5,
    'flops': 1e9,
    'matmul_flops': 1e9,
    'analytic_flops': 1e9,
    'bytes': 1e9,
    'share_of_matmul_peak': 0.5,
    'share_of_copy': 0.5,
    'program_bytes': 1,
    'peak_bytes': None,
    'peer': {'name': 'p', 'notes': {}, 'contenders': {'eager': contender}},
  }
  return own | changed


@pytest.fixture
def write(tmp_path):
  def write(name, *stages, **changed):
    path = tmp_path / f'{name}.json'
    path.write_text(
      json.dumps({'about': about(**changed), 'peaks': PEAKS, 'stages': stages, 'end_to_end': []})
    )
    return str(path)

  return write


def merged(tmp_path, *files):
  bench_sampling.main(['--merge', *files, '--json', str(tmp_path / 'all.json')])
  return json.loads((tmp_path / 'all.json').read_text())


def test_stages_come_in_their_order_with_their_sum(write, tmp_path, capsys):
  files = [
    write(stage, entry(stage), date=f'2026-11-27 1{i}:00 UTC', load=i)
    for i, stage in enumerate(reversed(STAGES))
  ]
  found = merged(tmp_path, *files)
  assert [each['stage'] for each in found['stages']] == list(STAGES)
  (whole,) = found['end_to_end']
  assert whole['seconds']['median'] == 8.0
  assert whole['peer']['contenders']['eager']['ratio']['median'] == 3.0
  out = capsys.readouterr().out
  assert 'as the sum of the stages' in out
  assert 'upsampler_0 2026-11-27 10:00 UTC' in out and 'clip 2026-11-27 13:00 UTC' in out


@pytest.mark.parametrize(
  'last', [None, entry('upsampler_0', devices=2), {**entry('upsampler_0'), 'peer': None}]
)
def test_what_is_lacking_beside_the_peer_on_one_device_leaves_no_sum(write, tmp_path, last):
  if last is not None and last['peer'] is None:
    del last['peer']
  stages = [*map(entry, STAGES[:3]), *([] if last is None else [last])]
  found = merged(tmp_path, write('one', *stages, entry('upsampler_0', batch=2)))
  assert found['end_to_end'] == []


def test_a_model_without_a_stage_of_karlos_is_merged_without_a_sum(write, tmp_path):
  """An autoregressive prior does not denoise, and a decoder may read by an encoder of its own."""
  steps = {'decoder': 4}
  stages = [entry(stage) for stage in ('decoder', 'decoder_text', 'prior', 'clip')]
  found = merged(tmp_path, write('one', *stages, steps=steps))
  assert [each['stage'] for each in found['stages']] == ['clip', 'prior', 'decoder_text', 'decoder']


def test_runs_that_cannot_be_merged_are_named(write, tmp_path):
  one = write('one', entry('clip'))
  with pytest.raises(SystemExit, match=r'other.json: clip at batch 1 is in another file'):
    merged(tmp_path, one, write('other', entry('clip')))
  with pytest.raises(SystemExit, match='dtype float16, another file float32'):
    merged(tmp_path, one, write('other', entry('prior'), dtype='float16'))
  stopped = json.loads(Path(write('stopped', entry('prior'))).read_text())
  del stopped['peaks']
  (tmp_path / 'stopped.json').write_text(json.dumps(stopped))
  with pytest.raises(SystemExit, match=r'stopped.json is of a run that was stopped'):
    merged(tmp_path, one, str(tmp_path / 'stopped.json'))
  (tmp_path / 'broken.json').write_text('{}')
  for name in ('nothing', 'broken'):
    with pytest.raises(SystemExit, match='holds no figures'):
      merged(tmp_path, one, str(tmp_path / f'{name}.json'))
