"""The command that measures, and the script: what they write, and what they refuse."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bench import ONE_LEVEL, SMALL_PEAKS, small_peaks
from tiny_model import write_tiny_model

from experiments import bench_sampling
from unclip_jax.cli import main
from unclip_jax.measure import report
from unclip_jax.systems import bench
from unclip_jax.types import UnclipError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module', autouse=True)
def _small_peaks():
  with small_peaks():
    yield


def run(*args: object) -> int:
  try:
    main(['bench', *map(str, args)])
  except SystemExit as stop:
    return stop.code or 0
  return 0


def test_the_command_writes_what_it_is_asked_for(tmp_path, capsys):
  write_tiny_model(tmp_path / 'model')
  files = {name: tmp_path / f'out.{name}' for name in ('json', 'png')}
  status = run(
    *('--model', tmp_path / 'model', '--stages', 'clip', '--batch-sizes', '1,2', '--rounds', 1),
    *(
      '--unguided',
      '--steps',
      '3,2,2',
      '--json',
      files['json'],
      '--plot',
      files['png'],
      '--profile',
      tmp_path / 'p',
    ),
  )
  assert status == 0
  assert 'against' not in capsys.readouterr().out
  results = json.loads(files['json'].read_text())
  assert [(e['stage'], e['batch_size']) for e in results['stages']] == [('clip', 1), ('clip', 2)]
  assert results['about']['steps'] == {'prior': 3, 'decoder': 2, 'upsampler_0': 2}
  assert results['about']['guided'] == [] and results['peaks']['skinny_rows'] == 3 * 2
  assert files['png'].exists()
  assert list((tmp_path / 'p').rglob('*.xplane.pb'))


def test_a_batch_that_two_devices_do_not_divide_is_filled_up(tmp_path):
  path = tmp_path / 'a.json'
  code = f"""
from unclip_jax.measure import peaks
peaks._SIDE, peaks._BYTES = {SMALL_PEAKS['_SIDE']}, {SMALL_PEAKS['_BYTES']}
from unclip_jax import config_json, presets
presets.PRESETS = {{'tiny': config_json.override(presets.TINY, {ONE_LEVEL})}}
from experiments.bench_sampling import main
small = ['--preset', 'tiny', '--rounds', '1', '--stages']
main([*small, *'clip --batch-sizes 3 --devices 1 2'.split(), '--json', {str(path)!r}])
shared = '--batch-sizes 1 --steps 1 1 1 --devices 2 --model-devices 2'
main([*small, 'prior', 'end_to_end', *shared.split(), '--json', {str(tmp_path / 'b.json')!r}])
"""
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'
  environment = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  one, two = json.loads(path.read_text())['stages']
  assert (one['devices'], two['devices']) == (1, 2)
  assert two['matmul_flops'] == pytest.approx(4 / 3 * one['matmul_flops'])
  assert '2 devices share one copy of the parameters' in ' '.join(done.stdout.split())
  shared = json.loads((tmp_path / 'b.json').read_text())
  assert shared['about']['model_devices'] == 2 and shared['end_to_end'][0]['devices'] == 2
  (prior,) = shared['stages']
  # One picture is not filled up to two; what is too small to be split, both compute.
  assert 1 <= prior['matmul_flops'] / prior['analytic_flops'] < 1.9


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    (('--preset', 'carlo'), "no preset 'carlo'"),
    (
      ('--preset', 'tiny', '--stages', 'prior,painter'),
      "no stage 'painter' here: take clip, prior",
    ),
    (('--preset', 'tiny', '--batch-sizes', '0'), 'whole numbers from 1'),
    (('--preset', 'tiny', '--batch-sizes', '2,1,2'), 'batch size 2 is asked for twice'),
    (('--preset', 'tiny', '--json', '/dev/null', '--plot', '/dev/null'), 'names of their own'),
    (('--preset', 'tiny', '--batch-sizes', 'many'), 'whole numbers from 1'),
    (('--preset', 'tiny', '--devices', '4000'), 'ask for 1'),
    (('--preset', 'tiny', '--model-devices', '2'), '1 devices do not divide into groups of 2'),
    (('--preset', 'tiny', '--model-devices', '0'), 'share the parameters'),
    (('--preset', 'tiny', '--rounds', '0'), 'the number of rounds is 0'),
    (('--preset', 'tiny', '--steps', '3,3'), 'give 3 numbers, of prior, decoder, upsampler'),
    (('--preset', 'tiny', '--steps', '3,3,2000'), 'upsampler'),
    (('--preset', 'tiny', '--sampler', 'magic'), "no sampler 'magic'"),
    (('--preset', 'tiny', '--dtype', 'int8'), "no dtype 'int8'"),
    (('--preset', 'tiny', '--model', 'default'), 'not both'),
  ],
)
def test_what_cannot_be_measured_is_said_in_one_line(args, said, capsys):
  assert run(*args) in (1, 2)
  (line,) = capsys.readouterr().err.splitlines()
  assert said in line


@pytest.mark.parametrize('option', ['--json', '--plot', '--profile'])
def test_a_path_that_cannot_be_written_is_found_before_anything_is_measured(
  option, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(bench, 'measure', lambda *_: pytest.fail('it was measured'))
  (tmp_path / 'file').write_text('')
  assert run('--preset', 'tiny', option, tmp_path / 'file' / 'out') == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path / 'file' / 'out') in line and 'take another path' in line


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_is(tmp_path):
  (tmp_path / 'old').write_text('kept')
  assert report.check_writable(tmp_path / 'old').read_text() == 'kept'
  assert not report.check_writable(tmp_path / 'new').exists()


def test_plots_without_matplotlib_name_the_extra(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  assert run('--preset', 'tiny', '--plot', 'a.png') == 1
  assert "pip install 'unclip-jax[train]'" in capsys.readouterr().err


def test_a_plot_of_no_known_kind_is_refused_before(capsys):
  assert run('--preset', 'tiny', '--plot', 'a.doc') == 1
  assert 'a.doc: there are no plots of this kind: take .png' in capsys.readouterr().err


def test_a_peer_without_its_packages_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'accelerate', None)
  monkeypatch.delitem(sys.modules, 'experiments.karlo_peer', raising=False)
  with pytest.raises(SystemExit, match=r"accelerate: pip install 'unclip-jax\[parity\]'"):
    bench_sampling.main(['--preset', 'tiny', '--peer', 'diffusers'])


def test_a_disk_that_fills_up_leaves_the_figures_of_before(tmp_path):
  """A limit on the size of files stands in for it."""
  path = tmp_path / 'a.json'
  path.write_text('before')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
  try:
    with pytest.raises(UnclipError, match='free some space'):
      report.write_json(path, {'figures': [0] * 100})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_text() == 'before'
  assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_continued_is_said(tmp_path):
  with pytest.raises(SystemExit, match='name it'):
    bench_sampling.main(['--preset', 'tiny', '--resume'])
  for held in ('[]', '{"about": [], "stages": []}', '{"about": {}, "stages": [{}]}'):
    (tmp_path / 'a.json').write_text(held)
    with pytest.raises(SystemExit, match='holds no figures'):
      bench_sampling.main(['--preset', 'tiny', '--resume', '--json', str(tmp_path / 'a.json')])


@pytest.mark.parametrize('size', ['0', '-1'])
def test_the_script_refuses_what_the_command_does(size):
  with pytest.raises(SystemExit, match='the batch size is'):
    bench_sampling.main(['--preset', 'tiny', '--batch-sizes', size])
