"""The training scripts: each runs from the command line's options, and continues where it stopped."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.emoji import common, train_clip, train_decoder, train_prior, train_upsampler
from unclip_jax.systems.unclip import load
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest

STAGES = {
  'clip': train_clip.main,
  'prior': train_prior.main,
  'decoder': train_decoder.main,
  'upsampler_0': train_upsampler.main,
}
# The tiny networks, at the sizes of the tokenizer that comes with the data.
TINY = [
  '--preset=tiny',
  *(
    f'--set={field}'
    for field in (
      'clip.text.vocab_size=2048',
      'clip.text.context_length=32',
      'prior.context_length=32',
      'decoder.text.vocab_size=2048',
      'decoder.text.context_length=32',
      'optimizer.warmup_steps=2',
    )
  ),
  '--styles=flat',
  '--groups=food-drink',
  '--pool-size=16',
  '--batch-size=4',
  '--chunk=1',
  '--save-every=2',
]


@pytest.fixture(scope='module', autouse=True)
def compilation_cache(tmp_path_factory):
  """The same programs are traced again and again: compile each once."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  yield
  jax.config.update('jax_compilation_cache_dir', None)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
  """A run whose stages were all trained for four updates without a break."""
  run = tmp_path_factory.mktemp('whole')
  for main in STAGES.values():
    main([f'--run={run}', '--steps=4', *TINY])
  return run


def losses(run: Path, stage: str) -> dict[int, str]:
  with (run / stage / 'metrics.csv').open() as file:
    return {int(row['step']): row['loss'] for row in csv.DictReader(file) if row['loss']}


def test_a_stopped_run_continues_with_the_same_losses_and_parameters(whole, tmp_path):
  for stage, main in STAGES.items():
    main([f'--run={tmp_path}', '--steps=2', *TINY])
    assert sorted(losses(tmp_path, stage)) == [1, 2]
    main([f'--run={tmp_path}', '--steps=4', *TINY])
    assert losses(tmp_path, stage) == losses(whole, stage)
    assert sorted(losses(whole, stage)) == [1, 2, 3, 4]
    file = f'{stage}.safetensors'
    assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


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
  assert list((whole / 'decoder' / 'samples').glob('real_and_decoded_*.png'))
  assert list((whole / 'upsampler_0' / 'samples').glob('bicubic_ours_real_*.png'))


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--preset=huge', "no preset 'huge'"),
    ('--set=decoder.unet.chanels=8', "no field 'chanels'"),
    ('--set=decoder.unet.channels=wide', 'decoder.unet.channels: expected int'),
    ('--set=optimizer.momentum=0.5', "no field 'momentum'"),
    ('--steps=0', '1 or more'),
    ('--styles=oil', 'oil'),
  ],
)
def test_an_option_that_makes_no_sense_is_named(argument, message, tmp_path):
  with pytest.raises(UnclipError, match=message):
    train_clip.main([f'--run={tmp_path}', *TINY, argument])
  assert not (tmp_path / 'unclip.json').exists()


def test_a_prior_without_its_clip_is_told_what_is_missing(tmp_path):
  with pytest.raises(UnclipError, match=r'unclip\.json|model folder'):
    train_prior.main([f'--run={tmp_path / "empty"}', *TINY])


def test_float_pixels_round_trip():
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(common.to_uint8(common.to_float(jax.numpy.asarray(levels))), levels)
