"""Fine-tuning: a run that starts as a copy of a model, and adapters beside weights that stay."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny_decoders import STABLE
from tiny_model import CONFIG, make_params, write_tiny_model

from experiments.emoji import (
  common,
  origin,
  train_clip,
  train_decoder,
  train_prior,
  train_upsampler,
)
from experiments.emoji.options import parse_options
from experiments.emoji.tuning import begin_tuning
from unclip_jax.config_json import override, to_json
from unclip_jax.configs import GlideUpsamplerConfig
from unclip_jax.systems.unclip import load
from unclip_jax.train.log import RunLog
from unclip_jax.train.lora import init_lora, merge_lora
from unclip_jax.train.state import OptimizerConfig, init_state, make_optimizer
from unclip_jax.types import UnclipError
from unclip_jax.weights.checkpoint import Checkpoints
from unclip_jax.weights.folder import write_model
from unclip_jax.weights.lora import load_lora, save_lora

PRIOR = make_params()['prior']['network']
DATA = ['--styles=flat', '--groups=food-drink', '--pool-size=16', '--batch-size=4']
SHORT = [
  *DATA,
  '--steps=4',
  '--chunk=1',
  '--save-every=100',
  '--set=optimizer.warmup_steps=0',
  '--set=optimizer.learning_rate=0.01',
]
# What compares optimisers' states builds the same one.
OPTIMIZER = OptimizerConfig(learning_rate=0.01)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def tuned(base, tmp_path_factory):
  """A run whose prior was given adapters by four updates without a break."""
  run = tmp_path_factory.mktemp('tuned') / 'run'
  train_prior.main([f'--run={run}', f'--init={base}', '--lora=2', '--lora-alpha=3', *SHORT])
  return run


def options(base, run, *others):
  return parse_options(
    [f'--init={base}', f'--run={run}', '--chunk=1', *DATA, *others], '', OPTIMIZER, 4, 4,
    has_lora=True,
  )  # fmt: skip


def test_the_run_is_the_model_with_adapters_merged_and_nothing_else_changed(base, tuned):
  stage, scale, adapters = load_lora(tuned / 'prior' / 'lora.safetensors')
  assert (stage, scale) == ('prior', 1.5)
  assert all(np.any(pair['b']) for pair in adapters.values())
  before, after = load(base), load(tuned)
  assert after.config == before.config and after.params.keys() == before.params.keys()
  network = merge_lora(before.params['prior']['network'], adapters, scale)
  expected = before.params | {
    'prior': {'network': network, 'statistics': before.params['prior']['statistics']}
  }
  jax.tree.map(np.testing.assert_array_equal, dict(after.params), dict(expected))
  texts = ['a red apple, flat style']
  np.testing.assert_array_equal(
    after.tokenizer.encode(texts).ids, before.tokenizer.encode(texts).ids
  )


def test_a_checkpoint_holds_adapters_and_no_weight_of_the_network(tuned):
  adapters = init_lora(PRIOR, 2, jax.random.key(0))
  state = init_state(adapters, make_optimizer(OPTIMIZER, 4))
  with Checkpoints(tuned / 'prior' / 'checkpoints') as checkpoints:
    assert int(checkpoints.restore(state).step) == 4  # it refuses what is more, or less


class Killed(Exception):
  pass


def test_a_killed_run_continues_with_the_same_adapters(base, tuned, tmp_path, monkeypatch):
  write = RunLog.write

  def write_until_killed(log, step, metrics, num_examples=0):
    write(log, step, metrics, num_examples)
    if step == 3:  # one update after a checkpoint: it is made again
      raise Killed

  arguments = [f'--run={tmp_path / "run"}', f'--init={base}', '--lora=2', '--lora-alpha=3']
  arguments += [*SHORT, '--save-every=2']
  with monkeypatch.context() as patch:
    patch.setattr(RunLog, 'write', write_until_killed)
    with pytest.raises(Killed):
      train_prior.main(arguments)
  train_prior.main(arguments)
  for file in ('prior/lora.safetensors', 'prior.safetensors'):
    assert (tmp_path / 'run' / file).read_bytes() == (tuned / file).read_bytes()


def test_training_goes_on_from_adapters_that_were_saved(base, tuned, tmp_path):
  file = tuned / 'prior' / 'lora.safetensors'
  still = ['--set=optimizer.learning_rate=0', '--steps=1']
  arguments = [f'--run={tmp_path / "run"}', f'--init={base}', f'--init-lora={file}']
  train_prior.main([*arguments, *SHORT, *still])
  written = tmp_path / 'run' / 'prior' / 'lora.safetensors'
  assert load_lora(written)[:2] == ('prior', 1.5)
  jax.tree.map(np.testing.assert_array_equal, load_lora(written)[2], load_lora(file)[2])


def test_a_fine_tune_takes_config_tokenizer_and_statistics_of_its_model(base, tmp_path):
  train = options(base, tmp_path / 'run', '--set=prior.text_drop=0.25')
  assert train.fine_tunes and train.config == override(CONFIG, ['prior.text_drop=0.25'])
  origin.begin(train, 'prior')
  z_i = np.random.default_rng(0).normal(size=(8, CONFIG.prior.embed_dim)).astype('f')
  for run, is_kept in ((tmp_path / 'run', True), (tmp_path / 'other', False)):
    if not is_kept:  # of another CLIP the embeddings mean something else
      params = jax.tree.map(lambda x: 2 * x, make_params()['clip'])
      write_model(run, to_json(CONFIG), {'clip': params}, base / 'tokenizer.json')
    statistics = origin.prior_statistics(options(base, run), z_i)
    expected = make_params()['prior']['statistics']['std'] if is_kept else z_i.std(axis=0)
    np.testing.assert_allclose(statistics.std, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--lora=2'], '--lora: .* give it by --init MODEL'),
    (['--init-lora=x'], '--init-lora: .* give it by --init MODEL'),
    (['--init=BASE', '--lora=0'], '--lora 0: take a rank of 1 or more'),
    (['--init=BASE', '--lora=two'], '--lora: invalid int value'),
    (['--init=BASE', '--lora=2', '--lora-alpha=-1'], '--lora-alpha -1: take a number above 0'),
    (['--init=BASE', '--lora=2', '--lora-alpha=nan'], '--lora-alpha nan: take a number above 0'),
    (['--init=BASE', '--lora-alpha=1'], '--lora-alpha: it scales the adapters of --lora'),
    (['--init=BASE', '--lora=2', '--preset=tiny'], '--lora: .* leave --preset out'),
    (['--init=BASE', '--lora=2', '--accumulate=2'], '--lora: adapters see whole batches'),
    (['--init=BASE', '--lora=2', '--init-lora=x'], 'leave --lora and --lora-alpha out'),
    (['--init=BASE', '--init-lora=nothing'], 'there are no adapters nothing'),
    (['--init=BASE', '--lora=2', '--set=prior.depth=3'], r'it has no prior\.network\..*block_1'),
  ],
)  # fmt: skip
def test_options_of_adapters_that_make_no_sense_are_named(arguments, message, base, tmp_path):
  arguments = [argument.replace('BASE', str(base)) for argument in arguments]
  with pytest.raises(UnclipError, match=message) as caught:
    train_prior.main([f'--run={tmp_path / "run"}', *SHORT, *arguments])
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('script', [train_clip, train_upsampler])
def test_the_other_stages_have_no_adapters(script, base, tmp_path):
  with pytest.raises(UnclipError, match=r'unrecognized arguments: --lora=2'):
    script.main([f'--run={tmp_path}', f'--init={base}', '--lora=2', *SHORT])


def test_adapters_of_something_else_are_refused(base, tuned, tmp_path):
  decoders, narrow = tmp_path / 'decoder.safetensors', tmp_path / 'narrow.safetensors'
  save_lora(decoders, init_lora(make_params()['decoder'], 2, jax.random.key(0)), 1.0, 'decoder')
  (name, pair), *_ = init_lora(PRIOR, 2, jax.random.key(0)).items()
  save_lora(narrow, {name: {'a': pair['a'][1:], 'b': pair['b']}}, 1.0, 'prior')

  def begin(*arguments, run=tmp_path / 'run'):
    train = options(base, run, *arguments)
    origin.begin(train, 'prior')
    return begin_tuning(train, 'prior', PRIOR, jax.random.key(0))

  assert begin('--lora=2').trained.keys() == init_lora(PRIOR, 2, jax.random.key(0)).keys()
  with pytest.raises(UnclipError, match='it is for the decoder, not the prior'):
    begin(f'--init-lora={decoders}')
  with pytest.raises(UnclipError, match=r'--init-lora .*narrow.*: the adapter of .* has .* inputs'):
    begin(f'--init-lora={narrow}')
  with pytest.raises(UnclipError, match='it is the folder of --run'):
    begin('--lora=2', run=base)
  shutil.copytree(tuned, tmp_path / 'other')
  clip = jax.tree.map(lambda x: 2 * x, make_params()['clip'])
  common.export_stage(options(base, tmp_path / 'other'), 'clip', clip)
  with pytest.raises(UnclipError, match='its CLIP is not that of --init'):
    begin('--lora=2', run=tmp_path / 'other')


def test_a_stage_of_another_kind_is_not_trained(base, tmp_path):
  train = options(base, tmp_path / 'run')
  up = CONFIG.upsamplers[0]
  glide = GlideUpsamplerConfig(
    up.image_size, up.low_size, up.unet, up.diffusion, up.sampling, CONFIG.clip.text
  )
  config = dataclasses.replace(CONFIG, upsamplers=(glide,))
  with pytest.raises(UnclipError, match='its upsampler_0 is of another kind'):
    origin.begin(dataclasses.replace(train, config=config), 'upsampler_0')


def test_a_model_that_lacks_what_training_needs_is_named(base, tmp_path):
  no_tower = override(CONFIG, ['clip.vision=null'])
  no_prior = override(CONFIG, ['prior=null'])
  for name, config, main, message in (
    ('no_tower', no_tower, train_decoder.main, 'without the image tower of its CLIP'),
    ('no_prior', no_prior, train_prior.main, 'it has no prior'),
  ):
    stages = {} if config.prior is None else {'prior': make_params()['prior']}
    write_model(tmp_path / name, to_json(config), stages, base / 'tokenizer.json')
    with pytest.raises(UnclipError, match=message):
      main([f'--run={tmp_path / "run"}', f'--init={tmp_path / name}', *SHORT])
    assert not (tmp_path / 'run').exists()


def test_a_model_is_opened_with_adapters_from_a_file(base, tuned, tmp_path):
  file = tuned / 'prior' / 'lora.safetensors'
  merged, expected = load(base, lora=file), load(tuned)
  jax.tree.map(np.testing.assert_array_equal, dict(merged.params), dict(expected.params))
  twice = load(base, lora=[file, file], lora_strength=0.5)
  for ours, theirs in zip(*map(jax.tree.leaves, (twice.params, expected.params)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  without = load(base, lora=file, lora_strength=0, offload=True)
  jax.tree.map(np.testing.assert_array_equal, dict(without.params), dict(load(base).params))
  _, scale, adapters = load_lora(file)
  for stage, match in (('upsampler_7', 'is for a upsampler_7'), ('decoder', 'another model')):
    save_lora(tmp_path / 'other.safetensors', adapters, scale, stage)
    with pytest.raises(UnclipError, match=match):
      load(base, lora=tmp_path / 'other.safetensors')


def test_a_prior_is_tuned_whose_decoder_has_a_text_encoder_of_its_own(tmp_path):
  base, run = tmp_path / 'base', tmp_path / 'run'
  write_tiny_model(base, STABLE)
  write_model(
    base,
    to_json(STABLE),
    make_params(STABLE),
    base / 'tokenizer.json',
    decoder_tokenizer_file=base / 'tokenizer.json',
  )
  train_prior.main([f'--run={run}', f'--init={base}', '--lora=2', *SHORT])
  before, after = load(base), load(run)
  assert after.config == before.config and after.params.keys() == before.params.keys()
  for name in before.params.keys() - {'prior'}:
    jax.tree.map(np.testing.assert_array_equal, after.params[name], before.params[name])
  kernels = [model.params['prior']['network'] for model in (before, after)]
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, kernels), strict=True))
  texts = ['a red apple']
  np.testing.assert_array_equal(
    after.decoder_tokenizer.encode(texts).ids, before.decoder_tokenizer.encode(texts).ids
  )
