"""Bad losses in a training script: it stops with a snapshot that shows them, or skips them."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.emoji import bad_steps, common, replay, train_upsampler
from experiments.emoji.bad_steps import MOST_SKIPPED, SKIPPED_NAME, make_watch
from experiments.emoji.options import parse_options
from unclip_jax.systems.bad_step import read_bad_step, write_bad_step
from unclip_jax.train.guard import FEWEST
from unclip_jax.train.state import (
  OptimizerConfig,
  epoch_indices,
  gather,
  init_state,
  make_optimizer,
  make_train_step,
)
from unclip_jax.types import UnclipError

STEPS, KEY = 48, jax.random.key(3)
ARGS = ['--preset=tiny', '--batch-size=4', '--pool-size=16', f'--steps={STEPS}', '--chunk=2']
CAPTIONS = [f'a cat, number {i}' for i in range(16)]


def is_wild(key):
  """Whether the loss of a step is to be far off: of about every eighth."""
  return jax.random.uniform(jax.random.fold_in(key, 1)) < 0.13


def loss_fn(params, batch, key):
  loss = jnp.mean((batch['x'] @ params['w'] - 1) ** 2)
  return jnp.where(is_wild(key), 1000 * (1 + loss), loss), {'largest': params['w'].max()}


def train(run, *options, rate=1e-3):
  """The loop of the scripts, for a network of one layer; what it would log."""
  config = parse_options([f'--run={run}', *ARGS, *options], '', OptimizerConfig(), STEPS, 4)
  tokens = config.tokenizer.encode(CAPTIONS)
  x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  pool = {'x': jnp.asarray(x), 'ids': jnp.asarray(tokens.ids)}
  optimizer = make_optimizer(OptimizerConfig(learning_rate=rate), STEPS)
  step = common.make_step(config, loss_fn, optimizer)
  updates = common.make_updates(config, step, gather)
  watch = make_watch(config, run, step, gather)
  state, logged = init_state({'w': jnp.ones((4, 1))}, optimizer), {}
  while int(state.step) < STEPS:
    state, metrics = updates(state, pool, KEY)
    logged[int(state.step)] = watch(state, metrics, pool, KEY)
  return logged


def test_spikes_are_left_out_counted_and_noted(tmp_path):
  logged = train(tmp_path, '--on-bad-loss=skip', '--spike-factor=50')
  text = (tmp_path / SKIPPED_NAME).read_text()
  noted = {one['step']: one for one in map(json.loads, text.splitlines())}
  key_order, _, key_step = jax.random.split(KEY, 3)
  wild = [i for i in range(STEPS) if is_wild(jax.random.fold_in(key_step, i))]
  assert [*noted] == [i for i in wild if i > FEWEST + 1] and len(noted) >= 2
  limits = [float(one['what'].rpartition(' ')[2]) for one in noted.values()]
  for after, metrics in logged.items():
    skipped = [i for i in (after - 2, after - 1) if i in noted]
    assert metrics['skipped'] == len(skipped)
    assert len(metrics.get('loss', ())) == len(metrics.get('largest', ())) == 2 - len(skipped)
    assert after <= FEWEST or 'loss' not in metrics or max(metrics['loss']) < min(limits)
    assert not {'bad', 'loss_limit'} & metrics.keys()
  for step, one in noted.items():
    assert re.fullmatch(r'loss is \d{4,}\.\d+, a spike above the limit of \d+\.\d+', one['what'])
    indices = [int(i) for i in epoch_indices(key_order, jnp.int32(step), 16, 4)]
    assert one['examples'] == [{'id': i, 'caption': f'a cat, number {i}'} for i in indices]
  # A run that was killed and makes its steps again notes them once.
  train(tmp_path, '--on-bad-loss=skip', '--spike-factor=50')
  assert (tmp_path / SKIPPED_NAME).read_text() == text


@pytest.mark.parametrize('chunk', [1, 8])
def test_a_spike_stops_the_run_with_all_that_shows_it(tmp_path, capsys, chunk):
  train(tmp_path, '--on-bad-loss=skip', '--spike-factor=50')
  first = json.loads((tmp_path / SKIPPED_NAME).read_text().splitlines()[0])
  folder = tmp_path / f'bad_step_{first["step"]}'
  with pytest.raises(UnclipError, match=re.escape(first['what'])) as error:
    train(tmp_path, '--spike-factor=50', f'--chunk={chunk}')
  assert f' at step {first["step"]}: take ' in str(error.value) and str(folder) in str(error.value)
  assert '--on-bad-loss skip' in str(error.value)
  bad_step = read_bad_step(folder)
  assert bad_step.about == first
  assert int(bad_step.inputs['state.step']) == first['step']
  metrics = bad_step.run()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, float(first['metrics'][name]), rtol=1e-5)
  assert metrics['loss'] > 1000
  capsys.readouterr()
  replay.main([str(folder)])
  shown = capsys.readouterr().out
  assert f'step {first["step"]}: {first["what"]}' in shown
  for example in first['examples']:
    assert f'example {example["id"]}: {example["caption"]}' in shown
  in_run, again = re.findall(r'loss (\S+)', shown.split('in the run:')[1])
  assert float(again) == pytest.approx(float(in_run), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
  with pytest.raises(UnclipError, match=r'(loss|grad_norm) is (nan|inf) at step 1: .*bad_step_1'):
    train(tmp_path, rate=1e30)
  replay.main([str(tmp_path / 'bad_step_1')])
  assert re.search(r'once more: .* (nan|inf)', capsys.readouterr().out)


def test_nothing_but_bad_losses_ends_a_run_that_skips(tmp_path):
  last = MOST_SKIPPED
  with pytest.raises(UnclipError, match=f'at step {last}, the last of {last} or more bad ones'):
    train(tmp_path, '--on-bad-loss=skip', '--chunk=1', rate=1e30)
  metrics = read_bad_step(tmp_path / f'bad_step_{last}').run()
  assert not np.isfinite([metrics['loss'], metrics['grad_norm']]).all()


def test_a_snapshot_that_cannot_be_written_is_no_reason_to_hide_the_loss(tmp_path, monkeypatch):
  def full(*_):
    raise UnclipError('no space')

  monkeypatch.setattr(bad_steps, 'write_bad_step', full)
  with pytest.raises(
    UnclipError, match=r'is (nan|inf) at step 1: take .* \(it is not kept: no space'
  ):
    train(tmp_path, rate=1e30)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  def loss_fn(params, batch, key):
    rows, frozen = batch
    noise = jax.random.normal(key, rows['x'].shape)
    loss = jnp.mean((rows['x'].astype(jnp.float32) + noise) @ params['w'] @ frozen['v'])
    return loss, {'largest': jnp.abs(params['w']).max()}

  step = make_train_step(loss_fn, optax.adamw(0.1), 0.9)
  state = init_state({'w': jnp.ones((4, 3))}, optax.adamw(0.1))._replace(step=jnp.int32(7))
  draw = np.random.default_rng(0)
  batch = (
    {'x': jnp.asarray(draw.normal(size=(5, 4)), jnp.bfloat16), 'mask': jnp.ones(5, bool)},
    {'v': jnp.asarray(draw.normal(size=(3, 2)), jnp.float32)},
  )
  folder, key = tmp_path_factory.mktemp('bad') / 'bad_step_7', jax.random.key(3)
  for about in ({'step': 6}, {'step': 7, 'what': 'loss is odd'}):
    write_bad_step(folder, step, state, batch, key, about)
  return folder, jax.jit(step)(state, batch, key)[1]


def test_a_snapshot_makes_the_step_again_from_its_files_alone(written):
  folder, metrics = written
  bad_step = read_bad_step(folder)
  assert bad_step.about == {'step': 7, 'what': 'loss is odd'}
  again = bad_step.run()
  assert again.keys() == metrics.keys() == {'loss', 'grad_norm', 'largest'}
  for name, value in metrics.items():
    np.testing.assert_allclose(again[name], value, rtol=1e-5)


def test_what_is_no_snapshot_is_named(written, tmp_path):
  with pytest.raises(UnclipError, match=r'holds no bad step: it has no about\.json'):
    read_bad_step(tmp_path)
  folder = shutil.copytree(written[0], tmp_path / 'copy')
  path = folder / 'program.bin'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UnclipError, match=r'copy is damaged \(.*bring back a copy'):
    read_bad_step(folder)


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--spike-factor=1', '--spike-factor 1: take a number above 1'),
    ('--spike-factor=nan', '--spike-factor nan: take a number above 1'),
    ('--keep=0', '--keep 0: take 1 or more'),
    ('--on-bad-loss=cry', "argument --on-bad-loss: invalid choice: 'cry'"),
  ],
)
def test_an_option_that_makes_no_sense_is_named(argument, message, tmp_path):
  with pytest.raises(UnclipError, match=message):
    train_upsampler.main([f'--run={tmp_path}', *ARGS, argument])
