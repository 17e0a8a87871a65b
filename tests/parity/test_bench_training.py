"""Training steps of both sides, of a Karlo of the smallest size: their first losses agree."""

import json

import pytest
import torch

from experiments import bench_training, karlo_peer
from unclip_jax.measure import peaks

SHORT = ['--threads', '1', '--rounds', '2', '--updates', '2', '--batch-size', '4']


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch):
  monkeypatch.setattr(peaks, '_SIDE', {'cpu': 64})
  monkeypatch.setattr(peaks, '_BYTES', {'cpu': 2**16})
  threads = torch.get_num_threads()
  yield
  torch.set_num_threads(threads)


def test_all_stages_of_both_sides_begin_with_the_same_loss(tmp_path, capsys):
  out = tmp_path / 'a.json'
  peer = ['--preset', 'tiny-karlo', '--peer', 'diffusers', '--no-compile']
  bench_training.main([*SHORT, *peer, '--json', str(out)])
  results = json.loads(out.read_text())
  assert [e['stage'] for e in results['stages']] == ['clip', 'prior', 'decoder', 'upsampler_0']
  for entry in results['stages']:
    (contender,) = entry['peer']['contenders'].values()
    assert contender['loss_error'] < 1e-4, entry['stage']
    assert len(contender['ratio']['values']) == 2
    assert entry['loss'] > 0.1 and entry['matmul_flops'] > 1e6
    assert entry['share_of_matmul_peak'] > 0
    shares = entry['share_of_matmul_peak'], entry['share_of_copy']
    assert entry['least_seconds'] == pytest.approx(max(shares) * entry['seconds']['median'])
    # Parameters, their average and two moments, float32.
    assert entry['argument_bytes'] > 16 * entry['parameters']
  for entry in results['stages'][2:]:
    assert entry['peer']['notes']['memory_format'] in karlo_peer.FORMATS
  for name in ('loss_error', 'argument_bytes', 'contenders', 'notes', 'ratio', 'peaks'):
    assert name in bench_training.__doc__
  text = capsys.readouterr().out
  assert f'torch {torch.__version__}' in text and 'loss error' in text


def test_stages_are_measured_alone_with_settings_of_training(tmp_path, capsys):
  out = tmp_path / 'a.json'
  options = ['--preset', 'tiny', '--stages', 'prior', '--accumulate', '2', '--remat']
  bench_training.main([*SHORT, *options, '--json', str(out), '--set', 'prior.depth=1'])
  (entry,) = json.loads(out.read_text())['stages']
  assert entry['stage'] == 'prior' and 'peer' not in entry
  assert 'remat True' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--preset', 'tiny', '--slice'], 'tiny is small as a whole'),
    (['--preset', 'tiny', '--stages', 'judge'], "there is no stage 'judge' here: take clip, prior"),
    (['--preset', 'tiny', '--accumulate', '3'], '--batch-size 4: take a multiple of 3'),
    (['--preset', 'tiny', '--peer', 'diffusers', '--accumulate', '2'], 'it makes whole updates'),
    (['--preset', 'tiny', '--peer', 'diffusers', '--stages', 'decoder'], 'diffusers|Karlo'),
  ],
)
def test_what_cannot_be_measured_is_a_line(options, message, capsys):
  with pytest.raises(SystemExit, match=message) as stop:
    bench_training.main([*SHORT, *options])
  assert str(stop.value.code).startswith('bench_training: error: ')
