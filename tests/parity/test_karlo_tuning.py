"""A tiny Karlo of diffusers, fine-tuned on the emoji and written back for diffusers."""

import shutil

import jax
import karlo_twin
import numpy as np
import pytest
import safetensors.numpy
from tuned_loss import training_loss

from experiments.emoji import train_decoder, train_prior
from unclip_jax.systems.convert import convert
from unclip_jax.systems.unclip import load
from unclip_jax.train.lora import merge_lora
from unclip_jax.weights.lora import load_lora

STAGES = {'prior': train_prior.main, 'decoder': train_decoder.main}
# Where the stages lie in diffusers' folder.
COMPONENTS = {'prior': {'prior'}, 'decoder': {'decoder', 'text_proj'}}
# The layers of attention, as diffusers names what adapters change there.
ADAPTED = ('.to_q.', '.to_k.', '.to_v.', '.add_k_proj.', '.add_v_proj.', '.to_out.0.')
DATA = ['--styles=flat', '--groups=food-drink', '--pool-size=16', '--batch-size=8']
OPTIONS = [
  *DATA,
  '--steps=30',
  '--chunk=10',
  '--ema-decay=0.5',
  '--set=optimizer.learning_rate=0.01',
  '--set=optimizer.warmup_steps=0',
]


@pytest.fixture(scope='module')
def karlo(tmp_path_factory):
  """The folder for captions, with the image tower that the other pipeline has beside it."""
  folder = tmp_path_factory.mktemp('karlo')
  karlo_twin.make_pipelines(folder)
  for name in ('image_encoder', 'feature_extractor'):
    shutil.copytree(folder / 'variation' / name, folder / 'text' / name)
  standardise(folder / 'text')
  return folder / 'text'


def standardise(folder):
  """Gives the prior statistics that fit its CLIP: those drawn for it make its loss 10,000."""
  pictures = np.random.default_rng(0).uniform(-1, 1, size=(64, 20, 20, 3)).astype('f')
  z_i = np.asarray(load(folder).encode_image(pictures))
  (path,) = (folder / 'prior').glob('*.safetensors')
  tensors = safetensors.numpy.load_file(path)
  tensors |= {'clip_mean': z_i.mean(0, keepdims=True), 'clip_std': z_i.std(0, keepdims=True)}
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})


@pytest.fixture(scope='module')
def base(karlo, tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  convert(karlo, folder, 'unclip')
  return folder


def tensors_in(folder):
  """All tensors below a folder of diffusers, by their components and names."""
  return {
    (path.parent.name, name): tensor
    for path in folder.rglob('*.safetensors')
    for name, tensor in safetensors.numpy.load_file(path).items()
  }


@pytest.mark.parametrize('stage', STAGES)
def test_a_fine_tuned_karlo_has_learnt_and_goes_back_to_diffusers(stage, karlo, base, tmp_path):
  run = tmp_path / 'run'
  STAGES[stage]([f'--run={run}', f'--init={karlo}', *OPTIONS])
  before, after = (training_loss(folder, stage, DATA) for folder in (base, run))
  print(f'{stage}: {before:.4f} -> {after:.4f}')
  assert after < 0.9 * before
  convert(run, tmp_path / 'back', 'diffusers')
  theirs, ours = tensors_in(karlo), tensors_in(tmp_path / 'back')
  assert ours.keys() == theirs.keys()
  changed = {key[0] for key in theirs if not np.array_equal(ours[key], theirs[key])}
  assert changed == COMPONENTS[stage]
  for name in ('clip_mean', 'clip_std'):  # those of its CLIP, which is the same
    np.testing.assert_array_equal(ours['prior', name], theirs['prior', name])


@pytest.mark.parametrize('stage', STAGES)
def test_adapters_teach_a_karlo_whose_weights_stay_as_they_are(stage, karlo, base, tmp_path):
  run = tmp_path / 'run'
  STAGES[stage]([f'--run={run}', f'--init={karlo}', '--lora=4', '--lora-alpha=8', *OPTIONS])
  before, after = (training_loss(folder, stage, DATA) for folder in (base, run))
  print(f'{stage}, adapters: {before:.4f} -> {after:.4f}')
  assert after < 0.95 * before
  made_for, scale, adapters = load_lora(run / stage / 'lora.safetensors')
  assert (made_for, scale) == (stage, 2)
  path = ('prior', 'network') if stage == 'prior' else ('decoder',)
  frozen, merged = load(base).params, load(run).params
  for name in path:
    frozen, merged = frozen[name], merged[name]
  jax.tree.map(np.testing.assert_array_equal, merge_lora(frozen, adapters, scale), merged)
  convert(run, tmp_path / 'back', 'diffusers')
  theirs, ours = tensors_in(karlo), tensors_in(tmp_path / 'back')
  assert ours.keys() == theirs.keys()
  changed = {key for key in theirs if not np.array_equal(ours[key], theirs[key])}
  adapted = {
    (component, name)
    for component, name in theirs
    if component == stage and any(part in name for part in ADAPTED) and name.endswith('weight')
  }
  assert changed == adapted
