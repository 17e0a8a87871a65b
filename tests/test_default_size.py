"""A model whose last upsampler runs only where its size is asked for."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import run
from PIL import Image
from tiny_model import CONFIG, TEXTS, without, write_tiny_model

import unclip_jax
from unclip_jax import manipulate
from unclip_jax.config_json import override
from unclip_jax.images import read_text
from unclip_jax.systems.checks import check_config
from unclip_jax.types import UnclipError

APPLE = TEXTS[0]
FIRST = override(CONFIG.upsamplers[0], ['unet.multipliers=[1]', 'sampling.num_steps=1'])
SECOND = dataclasses.replace(FIRST, low_size=32, image_size=64, degradation='bsr')
TWO = dataclasses.replace(CONFIG, upsamplers=(FIRST, SECOND), default_size=32)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('two'), TWO)


@pytest.fixture(scope='module')
def model(folder):
  return unclip_jax.load(folder)


def test_pictures_have_the_models_own_size_unless_another_is_asked_for(model):
  own = model.sample(APPLE, seed=3)
  assert own.images.shape == (1, 32, 32, 3) and len(own.stage_images) == 2
  large = model.sample(APPLE, seed=3, size=64)
  assert large.images.shape == (1, 64, 64, 3) and len(large.stage_images) == 3
  np.testing.assert_array_equal(large.stage_images[1], own.stage_images[1])
  np.testing.assert_array_equal(model.generate(APPLE, seed=3, size=32), own.images)


def test_a_second_upsampler_changes_nothing_of_what_is_drawn_without_it(model):
  alone = dataclasses.replace(TWO, upsamplers=(FIRST,), default_size=None)
  before = dataclasses.replace(without(model, 'upsampler_1'), config=alone)
  np.testing.assert_array_equal(before.generate(APPLE, seed=3), model.generate(APPLE, seed=3))


def test_its_weights_are_missed_only_where_it_runs(model):
  untrained = without(model, 'upsampler_1')
  assert untrained.generate(APPLE, seed=3).shape == (1, 32, 32, 3)
  with pytest.raises(UnclipError, match='this model has no upsampler_1'):
    untrained.generate(APPLE, seed=3, size=64)


def test_a_sampler_that_needs_statistics_needs_them_of_stages_that_run(model):
  power = np.ones(FIRST.diffusion.num_steps, np.float32)
  measured = dataclasses.replace(model, eps_power={'upsampler_0': power})
  analytic = unclip_jax.Sampling(num_steps=1, sampler='analytic')
  assert measured.generate(APPLE, upsampler=analytic).shape == (1, 32, 32, 3)
  with pytest.raises(UnclipError, match='upsampler 1: analytic needs statistics'):
    measured.generate(APPLE, upsampler=analytic, size=64)


def test_a_fused_program_draws_the_models_own_size(model):
  fused = unclip_jax.fuse(model)
  assert set(fused.params) == {'clip', 'prior', 'decoder', 'upsampler_0'}
  assert set(unclip_jax.fuse(model, size=64).params) == set(model.params)


def test_pictures_come_back_at_the_models_own_size(model):
  """What stops at the decoder, as inversion does, is asked for no size that it lacks."""
  picture = model.generate(APPLE, seed=3)[0]
  how = manipulate.Drawing(num_steps=2)
  assert manipulate.encode(model, [picture], how).x_T.shape == (1, 16, 16, 3)
  assert manipulate.reconstruct(model, [picture], how).images[0].shape == (32, 32, 3)


def test_the_command_line_draws_either_and_lists_both(folder, model, tmp_path, capsys):
  enabled = jax.config.jax_enable_compilation_cache
  for size, asked in ((32, []), (64, ['--size', '64'])):
    out = tmp_path / str(size)
    assert run('generate', APPLE, '--model', folder, '--out', out, '--no-cache', *asked) == 0
    (path,) = out.glob('*-00.png')
    with Image.open(path) as picture:
      assert picture.size == (size, size)
    settings = json.loads(read_text(path)['settings'])
    assert settings['size'] == size and len(settings['upsamplers']) == size // 32
  jax.config.update('jax_enable_compilation_cache', enabled)
  capsys.readouterr()
  assert run('info', '--model', folder) == 0
  assert '16, 32, 64 px; 32 unless --size asks for another' in capsys.readouterr().out


def test_a_size_that_no_stage_makes_is_refused():
  check_config(TWO)
  with pytest.raises(UnclipError, match='default_size is 48: the stages make 16 or 32 or 64 pix'):
    check_config(override(TWO, ['default_size=48']))
  nothing = dataclasses.replace(TWO, decoder=None, upsamplers=())
  with pytest.raises(UnclipError, match='default_size is 32: the stages make no pixels'):
    check_config(nothing)


def test_the_embedded_preset_stays_at_128_and_has_one_to_1024():
  config = unclip_jax.preset('emoji_small')
  assert config.default_size == 128
  assert [up.image_size for up in config.upsamplers] == [128, 1024]
  assert config.upsamplers[1].degradation == 'bsr'
  shapes = jax.eval_shape(
    lambda key: unclip_jax.stages.upsampler.init(config.upsamplers[1], key), jax.random.key(0)
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 0.6e6  # to come with the package
