"""The training of an autoregressive prior beside the stages of a model, and its comparison."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_model import CONFIG, TEXTS, write_tiny_model

from experiments.emoji import evaluate, train_ar_prior, train_prior
from unclip_jax import load
from unclip_jax.config_json import override
from unclip_jax.configs import ArPriorConfig
from unclip_jax.train.log import RunLog
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import write_eps_power

SHORT = [
  *('--styles=flat', '--groups=food-drink', '--pool-size=32', '--batch-size=4'),
  *('--steps=4', '--chunk=1', '--save-every=2'),
  *('--set=optimizer.warmup_steps=0', '--set=optimizer.learning_rate=0.01'),
]
SMALL = ['width=24', 'depth=1', 'num_heads=2', 'num_components=5', 'num_buckets=16']
SHORT += [f'--set=prior.{each}' for each in SMALL]


# Room for whole captions.
BASE = override(
  CONFIG,
  [
    *(f'{each}.context_length=48' for each in ('clip.text', 'prior', 'decoder.text')),
    'decoder.sampling.num_steps=2',
    'upsamplers.0.sampling.num_steps=2',
  ],
)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = write_tiny_model(tmp_path_factory.mktemp('base'), BASE)
  steps = BASE.prior.diffusion.num_steps
  write_eps_power(folder, {name: np.full(steps, 0.5, 'f') for name in ('prior', 'decoder')})
  return folder


@pytest.fixture(scope='module')
def trained(base, tmp_path_factory):
  """A run of four updates without a break."""
  run = tmp_path_factory.mktemp('trained') / 'run'
  train_ar_prior.main([f'--run={run}', f'--init={base}', *SHORT])
  return run


def test_the_run_is_the_model_with_another_prior_and_nothing_else_changed(base, trained):
  before, after = load(base), load(trained)
  prior = after.config.prior
  assert isinstance(prior, ArPriorConfig) and (prior.embed_dim, prior.text_width) == (16, 24)
  assert (prior.num_components, prior.num_buckets) == (5, 16)
  assert dataclasses.replace(after.config, prior=before.config.prior) == before.config
  assert after.eps_power.keys() == {'decoder'}
  assert set(after.params['prior']) == {'network', 'quantiser'}
  others = [{**model.params, 'prior': None} for model in (before, after)]
  jax.tree.map(np.testing.assert_array_equal, *others)
  components = np.asarray(after.params['prior']['quantiser']['components'])
  np.testing.assert_allclose(components @ components.T, np.eye(5), atol=0.01)
  assert after.generate(TEXTS[:1], size=16).shape == (1, 16, 16, 3)


class Killed(Exception):
  pass


def test_a_killed_run_continues_with_the_same_parameters(
  base, trained, tmp_path, monkeypatch, capsys
):
  write, run = RunLog.write, tmp_path / 'run'

  def write_until_killed(log, step, metrics, num_examples=0):
    write(log, step, metrics, num_examples)
    if step == 3:  # one update after a checkpoint: it is made again
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(RunLog, 'write', write_until_killed)
    with pytest.raises(Killed):
      train_ar_prior.main([f'--run={run}', f'--init={base}', *SHORT])
  assert not isinstance(load(run).config.prior, ArPriorConfig)  # a copy, until it is done
  train_ar_prior.main([f'--run={run}', f'--init={base}', *SHORT])
  assert '5 of 16 components leave' in ''.join(capsys.readouterr())
  ours, theirs = ((each / 'prior.safetensors').read_bytes() for each in (run, trained))
  assert ours == theirs


def test_training_goes_on_from_one_of_its_kind(base, trained, tmp_path):
  still = ['--set=optimizer.learning_rate=0', '--steps=1', '--seed=1']
  train_ar_prior.main([f'--run={tmp_path / "run"}', f'--init={trained}', *SHORT, *still])
  params = (load(run).params['prior'] for run in (trained, tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, *params)


def test_no_prior_is_lost_and_none_is_taken_for_the_other(base, trained, tmp_path):
  shutil.copytree(base, tmp_path / 'own')
  for init in ([f'--init={tmp_path / "own"}'], ['--preset=tiny_ar']):
    with pytest.raises(UnclipError, match='its diffusion prior would be lost'):
      train_ar_prior.main([f'--run={tmp_path / "own"}', *init, *SHORT])
  with pytest.raises(UnclipError, match='its prior is of another kind'):
    train_prior.main([f'--run={tmp_path / "new"}', f'--init={trained}'])
  with pytest.raises(UnclipError, match='the preset: its prior is of another kind'):
    train_prior.main([f'--run={tmp_path / "new"}', '--preset=tiny_ar'])


def test_both_priors_are_measured_through_one_decoder(base, trained, tmp_path):
  model = load(base)
  rival = evaluate.with_prior_of(model, str(trained))
  assert rival.config.prior.num_candidates == model.config.prior.num_candidates == 2
  assert rival.params['decoder'] is model.params['decoder']
  assert rival.params['prior'].keys() == {'network', 'quantiser'}
  with pytest.raises(UnclipError, match='it has no autoregressive prior'):
    evaluate.with_prior_of(model, str(base))
  run = shutil.copytree(base, tmp_path / 'measured')
  options = {'styles': ['flat'], 'groups': ['food-drink'], 'labels': []}
  (run / 'options.json').write_text(json.dumps(options))
  parser = evaluate.make_parser(None, samples=2)
  arguments = [f'--run={run}', f'--judge={run}', f'--images={tmp_path}', '--captions=4']
  bench = evaluate.open_bench(parser.parse_args(arguments), seed=1)
  rows, values = evaluate.compare_sources(bench, rival)
  assert rows['AR prior'].keys() == rows['prior'].keys() > {'R@1 same ground', 'diversity'}
  assert not np.array_equal(values['AR prior']['colour off by'], values['prior']['colour off by'])
  shown = evaluate.find_the_weakest(bench, rows, rival)
  assert shown['AR prior'].startswith('cosine to the true z_i') and 'same picture' in shown['prior']
