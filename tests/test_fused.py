"""All stages as one program: the images of `Unclip.generate`, whatever the model."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_decoders import GLIDE, KANDINSKY, STABLE
from tiny_model import CONFIG, TEXTS, levels_apart, load_tiny, make_params, without

from unclip_jax import Sampling, UnclipError, fuse
from unclip_jax.config_json import override
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.systems.unclip import Unclip

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, CATS = TEXTS
# As Karlo: the decoder reads CLIP's text, and the last step of the upsampler has its own network.
KARLO = override(
  CONFIG,
  [
    'clip.unit_norm=false',
    'prior.unit_norm=false',
    'prior.num_candidates=1',
    'prior.sampling.guidance_scale=4',
    'prior.sampling.spacing=karlo',
    'decoder.text=null',
    f'decoder.clip_text_width={CONFIG.clip.text.width}',
    f'decoder.unet.context_dim={CONFIG.clip.text.width}',
    'decoder.sampling.spacing=karlo',
    'upsamplers.0.final_unet=true',
  ],
)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def fused(model):
  """Compiled apart, so that nothing can compile it again."""
  made = fuse(model, 4)
  return dataclasses.replace(made, program=made.lower().compile())


def test_images_are_those_of_generate_bit_for_bit(model, fused):
  images = fused.generate(TEXTS, 7, 2, negative_prompt='a dog')
  expected = model.generate(TEXTS, 7, 2, negative_prompt='a dog')
  np.testing.assert_array_equal(images, expected)
  assert images.shape == (6, 32, 32, 3)
  again = fused.generate(APPLE, 7, first_image=1)
  np.testing.assert_array_equal(again[0], fused.generate(APPLE, 7, 2)[1])


def test_other_scales_etas_and_timesteps_are_the_same_program(model, fused):
  asked = {
    'decoder': Sampling(guidance_scale=3.5, spacing='trailing'),
    'upsampler': Sampling(eta=1.0),
  }
  images = fused.generate([CATS, 'a dog'], 2, 2, **asked)
  np.testing.assert_array_equal(images, model.generate([CATS, 'a dog'], 2, 2, **asked))
  assert levels_apart(images, fused.generate([CATS, 'a dog'], 2, 2)) > 5


@pytest.mark.parametrize(
  ('config', 'size'),
  [
    (KARLO, 32),
    (KANDINSKY, 16),
    (override(STABLE, ['decoder.sampling.variance=fixed_small']), 16),
    (GLIDE, 8),
  ],
  ids=['karlo', 'kandinsky', 'stable', 'glide'],
)
def test_decoders_of_others_draw_the_same_as_one_program(config, size):
  text = CONFIG.clip.text
  tokenizer = Tokenizer.train(TEXTS * 3, text.vocab_size, text.context_length)
  model = Unclip(config, make_params(config), tokenizer, decoder_tokenizer=tokenizer)
  images = fuse(model, 2, size=size).generate([APPLE, ROCKET], 3)
  assert levels_apart(images, model.generate([APPLE, ROCKET], 3, size=size)) <= 1
  assert images.shape == (2, size, size, 3)
  assert images.std() > 5


def test_it_can_be_run_by_hand(fused):
  images, is_finite = fused.program(fused.params, fused.inputs([APPLE, CATS], seed=7))
  np.testing.assert_array_equal(images[:2], fused.generate([APPLE, CATS], 7))
  assert set(is_finite) == {'clip', 'prior', 'decoder', 'upsampler_0'}
  assert all(is_finite.values())
  with pytest.raises(UnclipError, match='5 prompts do not fit into a batch of 4'):
    fused.inputs([APPLE] * 5)


def test_a_nan_on_the_way_names_its_stage(fused):
  network = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), fused.params['upsampler_0'])
  broken = dataclasses.replace(fused, params={**fused.params, 'upsampler_0': network})
  with pytest.raises(UnclipError, match='the upsampler_0 made a NaN'):
    broken.generate(APPLE)


@pytest.mark.parametrize(
  ('asked', 'words'),
  [
    ({'decoder': Sampling(num_steps=2)}, 'decoder: 2 steps are asked for, the program has 4'),
    ({'upsampler': Sampling(num_steps=2)}, 'upsamplers.0: 2 steps are asked for'),
    ({'decoder': Sampling(sampler='ddim')}, "decoder: the sampler 'ddim' is asked for"),
    (
      {'decoder': Sampling(guidance_scale=2, guidance_rescale=0.5)},
      'decoder: guidance rescale is asked for',
    ),
    ({'decoder': Sampling(guidance_scale=1)}, 'decoder: guidance is not asked for'),
    ({'prior': Sampling(guidance_scale=2)}, 'prior: guidance is asked for'),
    ({'decoder': 3}, 'give a Sampling, not int'),
    ({'decoder': Sampling(guidance_scale=-1)}, 'is negative'),
    ({'seed': -1}, 'the seed is -1'),
  ],
)
def test_what_needs_another_program_is_refused(fused, asked, words):
  with pytest.raises(UnclipError, match=words):
    fused.generate(APPLE, **asked)


def test_what_cannot_be_made_is_refused(model):
  with pytest.raises(UnclipError, match='batch size is 0'):
    fuse(model, 0)
  with pytest.raises(UnclipError, match='no size 20'):
    fuse(model, size=20)
  with pytest.raises(UnclipError, match='has no upsampler_0'):
    fuse(without(model, 'upsampler_0'))
  assert fuse(without(model, 'upsampler_0'), size=16).batch_size == 1
  unguided = dataclasses.replace(model, config=dataclasses.replace(CONFIG, prior=None))
  with pytest.raises(UnclipError, match='has no prior'):
    fuse(unguided)


SHARDED = """
import sys
import numpy as np
import unclip_jax
model = unclip_jax.load('model', num_devices=2)
fused = unclip_jax.fuse(model, 3, size=16)
images, _ = fused.program(fused.params, fused.inputs(sys.argv[1:], seed=7))
assert fused.batch_size == 3 and len(images) == 4 and len(images.devices()) == 2
np.save('images.npy', fused.generate(sys.argv[1:], seed=7))
"""


def test_two_devices_draw_what_one_draws_though_three_do_not_divide(model, tmp_path):
  load_tiny(tmp_path / 'model')
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2',
  }
  command = [sys.executable, '-c', SHARDED, *TEXTS]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  one = model.generate(TEXTS, 7, size=16)
  several = np.load(tmp_path / 'images.npy')
  assert several.shape == one.shape
  assert levels_apart(several, one) <= 1
