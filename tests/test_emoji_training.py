"""The training scripts: they run from their options alone, and continue where they stopped."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from processes import in_a_process
from safetensors.flax import load_file

from experiments.emoji import (
  common,
  evaluate,
  origin,
  report,
  sweep,
  train_clip,
  train_decoder,
  train_prior,
  train_upsampler,
)
from experiments.emoji.options import parse_options
from unclip_jax import sharding
from unclip_jax.images import make_grid
from unclip_jax.stages import clip
from unclip_jax.systems.unclip import load
from unclip_jax.train.log import RunLog
from unclip_jax.train.state import OptimizerConfig, init_state
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest

STAGES = {
  'clip': train_clip.main,
  'prior': train_prior.main,
  'decoder': train_decoder.main,
  'upsampler_0': train_upsampler.main,
}
# Networks of one level and one block each: what is looked at is what the scripts do with them.
TINY = [
  '--preset=tiny',
  '--set=clip.text.depth=1',
  '--set=clip.vision.depth=1',
  '--set=prior.depth=1',
  '--set=decoder.unet.multipliers=[1]',
  '--set=decoder.unet.attention_levels=[0]',
  '--set=upsamplers.0.unet.multipliers=[1]',
  '--set=optimizer.warmup_steps=2',
  '--set=decoder.draft_size=8',
  '--set=upsamplers.0.low_noise=0.1',
  '--set=decoder.unet.condition_channels=3',
  '--draft-steps=2',
  '--styles=flat',
  '--groups=food-drink',
  '--pool-size=16',
  '--batch-size=4',
  '--chunk=1',
  '--save-every=2',
]


@pytest.fixture(scope='module', autouse=True)
def _few_are_held_out():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_clip, 'NUM_RETRIEVAL', 20)
    patch.setattr(train_prior, 'NUM_HELD_OUT', 16)
    patch.setattr(train_decoder, 'NUM_HELD_OUT', 8)
    yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
  """A run whose stages were all trained for four updates without a break."""
  run = tmp_path_factory.mktemp('whole')
  for main in STAGES.values():
    main([f'--run={run}', '--steps=4', *TINY])
  return run


def losses(run: Path, stage: str, name: str = 'loss') -> dict[int, str]:
  with (run / stage / 'metrics.csv').open() as file:
    return {int(row['step']): row[name] for row in csv.DictReader(file) if row[name]}


class Killed(Exception):
  pass


def test_a_killed_run_continues_with_the_same_losses_and_parameters(whole, tmp_path, monkeypatch):
  write = RunLog.write

  def write_until_killed(log, step, metrics, num_examples=0):
    write(log, step, metrics, num_examples)
    if step == 3:  # one update after a checkpoint: it is made again
      raise Killed

  for stage, main in STAGES.items():
    with monkeypatch.context() as patch:
      patch.setattr(RunLog, 'write', write_until_killed)
      with pytest.raises(Killed):
        main([f'--run={tmp_path}', '--steps=4', *TINY])
    assert sorted(losses(tmp_path, stage)) == [1, 2, 3]
    main([f'--run={tmp_path}', '--steps=4', *TINY])
    assert losses(tmp_path, stage) == losses(whole, stage)
    assert sorted(losses(whole, stage)) == [1, 2, 3, 4]
    file = f'{stage}.safetensors'
    assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


def test_a_stage_keeps_the_config_that_it_was_trained_with(whole, tmp_path):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  train = parse_options(
    [
      f'--run={tmp_path}',
      *TINY,
      '--set=decoder.unet.channels=24',
      '--set=decoder.unet.head_dim=24',
    ],
    '',
    OptimizerConfig(),
    steps=4,
    batch_size=4,
  )
  params = clip.init(train.config.clip, jax.random.key(0))
  common.export_stage(train, 'clip', params)
  assert load(tmp_path).config.decoder.unet.channels == 16


def test_a_run_knows_the_words_that_its_last_stage_read(whole, tmp_path):
  vocabulary = load(whole).vocabulary
  assert vocabulary.styles == ('flat',)
  assert 'red apple' in vocabulary.concepts and 'zebra' not in vocabulary.concepts
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  wider = [f'--run={tmp_path}', *TINY, '--labels', 'zebra']
  train = parse_options(wider, '', OptimizerConfig(), 4, 4)
  params = load(whole).params
  common.export_stage(train, 'upsampler_0', params['upsampler_0'])
  assert load(tmp_path).vocabulary == vocabulary, 'an upsampler reads no captions'
  common.export_stage(train, 'decoder', params['decoder'])
  assert set(load(tmp_path).vocabulary.concepts) - set(vocabulary.concepts) == {'zebra'}


def test_a_stage_starts_from_the_weights_that_a_model_has(whole, tmp_path):
  def start(params, init=whole):
    arguments = [] if init is None else [f'--init={init}']
    options = [f'--run={tmp_path}', *arguments, *TINY]
    train = parse_options(options, '', OptimizerConfig(), 4, 4)
    return origin.start_from(train, params, 'prior', 'network')

  theirs = load(whole).params['prior']['network']
  fresh = {**jax.tree.map(np.zeros_like, theirs), 'new': {'kernel': np.full(3, 7.0)}}
  assert start(fresh, init=None) is fresh
  started = start(fresh)
  np.testing.assert_array_equal(started.pop('new')['kernel'], 7)
  jax.tree.map(np.testing.assert_array_equal, started, theirs)
  with pytest.raises(UnclipError, match=r'prior\.network\.query.* there, and .* here'):
    start({**fresh, 'query': np.zeros(3)})
  with pytest.raises(UnclipError, match='it has no upsampler_1, only'):
    options = [f'--run={tmp_path}', f'--init={whole}', *TINY]
    train = parse_options(options, '', OptimizerConfig(), 4, 4)
    origin.start_from(train, fresh, 'upsampler_1')
  with pytest.raises(UnclipError, match='nowhere'):
    start(fresh, init='nowhere')


def test_every_script_starts_from_the_weights_of_init(whole, tmp_path):
  """Without time for an update they come out again; fresh ones of another seed would not."""
  still = ['--minutes=0', '--draft-steps=0']
  for stage, main in STAGES.items():
    main([f'--run={tmp_path}', '--steps=4', *TINY, *still, f'--init={whole}', '--seed=1'])
    assert not losses(tmp_path, stage)
    ours, theirs = (load_file(run / f'{stage}.safetensors') for run in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
      if 'statistics' not in name:  # the prior's are of the data, which another seed composes
        np.testing.assert_array_equal(ours[name], array, err_msg=f'{stage} {name}')


def test_the_second_kind_of_upsampler_learns_from_degraded_pictures(tmp_path):
  arguments = [f'--run={tmp_path}', '--steps=2', *TINY]
  train_upsampler.main([*arguments, '--set=upsamplers.0.degradation=bsr'])
  assert 'upsampler_0' in read_manifest(tmp_path).stages
  with pytest.raises(UnclipError, match="degradation is 'dirt'"):
    train_upsampler.main([*arguments, '--set=upsamplers.0.degradation=dirt'])


def test_an_upsampler_wants_pictures_as_large_as_its_output(tmp_path):
  with pytest.raises(UnclipError, match=r'64 px, too few .* --size 128'):
    train_upsampler.main([f'--run={tmp_path}', '--preset=emoji_small'])


def test_a_run_folder_is_a_model_that_draws(whole):
  assert set(read_manifest(whole).stages) == set(STAGES)
  images = load(whole).generate('a flat red apple', num_images=2)
  assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
  assert not np.array_equal(images[0], images[1])


def test_a_run_records_its_options_and_its_samples(whole):
  for stage in STAGES:
    options = json.loads((whole / stage / 'options.json').read_text())
    assert options['styles'] == ['flat'] and options['batch_size'] == 4
    assert options['optimizer']['warmup_steps'] == 2
    assert options['config']['clip']['text']['vocab_size'] == 2048
  assert len(losses(whole, 'draft', 'draft_mse')) == 2
  assert list((whole / 'decoder' / 'samples').glob('real_and_decoded_*.png'))
  assert list((whole / 'upsampler_0' / 'samples').glob('bicubic_ours_real_*.png'))


def test_a_run_is_measured_from_end_to_end(whole, tmp_path, capsys):
  """By its own CLIP: what a judge is worth is the judge's affair."""
  arguments = [f'--run={whole}', f'--judge={whole}', f'--images={tmp_path}', '--captions=30']
  evaluate.main([*arguments, '--samples=2', '--scenes=6'])
  shown = capsys.readouterr().out
  lines = [line for line in shown.splitlines() if line.startswith('|')]
  # The scenes' table has a second row of real pictures: the first counts.
  rows = {line.split('|')[1].strip(): line for line in reversed(lines)}
  for row in ('real', 'true z_i', 'prior', 'z_t as z_i', 'caption alone', 'generated'):
    assert row in rows
  names = [name.strip() for name in lines[0].split('|')]

  def figure(row, name):
    return float(rows[row].split('|')[names.index(name)].split()[0])

  assert figure('real', 'background') == figure('real', 'silhouette IoU') == 1
  assert figure('real', 'colour off by') == 0
  assert figure('prior', 'silhouette IoU') < 0.9
  assert figure('another object', 'silhouette IoU') < 0.9
  assert re.search(r'cosine to the true z_i [-\d.]+ \[', shown)
  distances = re.search(r'160 pictures of training captions: ([\d.]+); .* ([\d.]+)', shown)
  assert float(distances[1]) > float(distances[2]) > 0
  assert 'is the CLIP of the model itself: nothing here is evidence' in shown
  assert (tmp_path / 'nearest.webp').exists()


def test_settings_are_compared_with_the_rest_of_the_models_own(
  whole, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(sweep, 'SETTINGS', {'guidance_scale': (1.0, 3.0), 'num_steps': (2,)})
  sweep.main(
    [f'--run={whole}', f'--judge={whole}', f'--images={tmp_path}', '--captions=10', '--samples=2']
  )
  shown = capsys.readouterr().out
  cells = {
    line.split('|')[1].strip(): line.split('|')[2:]
    for line in shown.splitlines()
    if line.startswith('|')
  }
  settings = ('guidance_scale 1', 'guidance_scale 3', 'num_steps 2')
  assert {f'{s}, {sampler}' for s in settings for sampler in ('ddpm', 'ddim')} < set(cells)
  assert cells['guidance_scale 1, ddim'] != cells['guidance_scale 3, ddim']
  assert (tmp_path / 'sweep.png').stat().st_size > 5000


@pytest.mark.parametrize('script', [evaluate, sweep, report])
@pytest.mark.parametrize('options', [None, '{', '{}', '[]'])
def test_what_is_not_a_whole_run_is_not_measured(script, options, tmp_path):
  if options is not None:
    (tmp_path / 'decoder').mkdir()
    (tmp_path / 'decoder' / 'options.json').write_text(options)
  message = 'options.json is missing' if options is None else 'is not the options of a training'
  with pytest.raises(UnclipError, match=re.escape(message)):
    script.main([f'--run={tmp_path}', f'--images={tmp_path}'])


def test_a_run_is_reported_with_samples_that_nobody_picked(whole, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(report, 'COLUMNS', 3)
  monkeypatch.setattr(report, 'COMPARED', 2)
  report.main([f'--run={whole}', f'--images={tmp_path}'])
  shown = capsys.readouterr().out
  for stage in (*STAGES, 'draft'):
    assert re.search(rf'^\| {stage} \| \d+ \|', shown, re.MULTILINE)
  names = re.findall(rf'\({tmp_path.name}/(\S+)\)', shown)
  assert len(names) == 5 and all((tmp_path / name).exists() for name in names)
  with Image.open(tmp_path / 'compared.webp') as image:
    assert image.size == make_grid(np.zeros((6, 32, 32, 3), np.uint8), 2).shape[1::-1]


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--preset=huge', "no preset 'huge'"),
    ('--set=decoder.unet.chanels=8', "no field 'chanels'"),
    ('--set=decoder.unet.channels=wide', 'decoder.unet.channels: expected int'),
    ('--set=optimizer.momentum=0.5', "no field 'momentum'"),
    ('--steps=0', '--steps 0: take 1 or more'),
    ('--pool-size=2', '--pool-size 2: take at least the 4 of --batch-size'),
    ('--steps=many', r"--steps: invalid int value: 'many' \(see --help\)"),
    ('--scene-fraction=7', '--scene-fraction 7: take a fraction from 0 to 1'),
    ('--set=optimizer.warmup_steps=9999', r'a warm-up of 9999 steps .*--set optimizer\.FIELD'),
    ('--dtype=float8', '--dtype float8'),
    ('--stage=1', 'has 1 upsamplers'),
    ('--styles=oil', 'oil'),
    ('--accumulate=3', '--accumulate 3: take a number that divides the 4 of --batch-size'),
    ('--model-devices=2', '1 devices do not divide into groups of 2'),
  ],
)
def test_an_option_that_makes_no_sense_is_named(argument, message, tmp_path):
  with pytest.raises(UnclipError, match=message):
    train_clip.main([f'--run={tmp_path}', *TINY, argument])
  assert not (tmp_path / 'unclip.json').exists()


def test_a_prior_without_its_clip_is_told_what_is_missing(tmp_path):
  with pytest.raises(UnclipError, match=r'first run python -m experiments\.emoji\.train_clip'):
    train_prior.main([f'--run={tmp_path / "empty"}', *TINY])


def test_a_script_says_a_mistake_in_one_line():
  script = [sys.executable, '-m', 'experiments.emoji.train_clip', '--preset=huge']
  result = subprocess.run(script, capture_output=True, text=True, check=False)
  assert result.returncode == 1
  assert result.stderr.startswith("error: there is no preset 'huge'")
  assert len(result.stderr.splitlines()) == 1


def test_float_pixels_round_trip():
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(common.to_uint8(common.to_float(jax.numpy.asarray(levels))), levels)


def train_an_upsampler_in_parts(run):
  """Half of the updates of `whole`, over two groups of two devices."""
  sharding.FSDP_MIN_SIZE = 64  # nothing is large here
  split = ['--fsdp', '--model-devices=2', '--remat']
  train_upsampler.main([f'--run={run}', '--steps=2', *TINY, *split])


def test_a_run_of_four_devices_is_that_of_one_and_continues_on_one(whole, tmp_path):
  in_a_process(train_an_upsampler_in_parts, tmp_path, num_devices=4)
  assert json.loads((tmp_path / 'upsampler_0' / 'options.json').read_text())['fsdp'] is True
  train_upsampler.main([f'--run={tmp_path}', '--steps=4', *TINY])
  ours, wanted = losses(tmp_path, 'upsampler_0'), losses(whole, 'upsampler_0')
  assert sorted(ours) == [1, 2, 3, 4]
  for step, loss in wanted.items():
    assert float(ours[step]) == pytest.approx(float(loss), rel=1e-4)


def test_a_step_takes_a_batch_in_the_parts_that_the_options_say():
  train = parse_options([*TINY, '--accumulate=2'], '', OptimizerConfig(), 4, 4)

  def loss_fn(params, batch, key):
    return params['w'] * batch.mean(), {'rows': len(batch)}

  step = common.make_step(train, loss_fn, optax.sgd(1.0))
  state = init_state({'w': jax.numpy.float32(1)}, optax.sgd(1.0))
  state, metrics = step(state, jax.numpy.arange(4.0), jax.random.key(0))
  assert float(metrics['rows']) == 2 and float(metrics['loss']) == 1.5
  assert float(state.params['w']) == -0.5
