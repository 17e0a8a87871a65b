"""Decoders that complete pictures: their masks, their input, and that nothing changes without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised
from tiny_stages import CONFIG, keys, make_text, normal

from unclip_jax.diffusion import samplers
from unclip_jax.stages import common, decoder, masks
from unclip_jax.types import UnclipError

PLAIN = CONFIG.decoder
COMPLETES = dataclasses.replace(PLAIN, inpaints=True)
PROMPTS = (make_text(3), make_text(3, seed=5))
Z_I = normal(3, 16)
KNOWN = np.clip(normal(3, 16, 16, 3), -1, 1)
MASK = np.zeros((3, 16, 16, 1), np.float32)
MASK[:, :, :7] = 1


@pytest.fixture(scope='module')
def params():
  return randomised(decoder.init(COMPLETES, jax.random.key(0)))


def sample(config, params, known=None, mask=None, scale=None):
  plan = common.make_plan(config.diffusion, config.sampling)
  sampler = samplers.ddpm('learned')
  scale = None if scale is None else jnp.float32(scale)
  given = {'known': known, 'mask': mask}
  args = (*PROMPTS, Z_I, keys(3), plan, sampler, scale)
  return np.asarray(decoder.sample(config, params, *args, **given)[0])


def test_without_a_picture_it_paints_as_the_same_decoder_without_masks(params):
  plain = {name: value for name, value in params.items() if name != 'conv_known'}
  np.testing.assert_array_equal(sample(COMPLETES, params), sample(PLAIN, plain))


def test_nothing_known_is_no_picture(params):
  nothing = sample(COMPLETES, params, KNOWN, np.zeros_like(MASK), 2.0)
  np.testing.assert_allclose(nothing, sample(COMPLETES, params, scale=2.0), atol=1e-5)


@pytest.mark.parametrize('scale', [None, 2.0])
def test_what_is_known_is_kept_and_what_is_hidden_has_no_effect(params, scale):
  painted = sample(COMPLETES, params, KNOWN, MASK, scale)
  np.testing.assert_allclose(painted[:, :, :7], KNOWN[:, :, :7], atol=1e-6)
  assert np.abs(painted - sample(COMPLETES, params, scale=scale))[:, :, 7:].max() > 0.05
  hidden = np.where(MASK > 0, KNOWN, 0.5).astype(np.float32)
  np.testing.assert_array_equal(sample(COMPLETES, params, hidden, MASK, scale), painted)


def test_a_decoder_without_masks_completes_nothing(params):
  with pytest.raises(UnclipError, match='not trained to complete'):
    sample(PLAIN, params, KNOWN, MASK)


def test_masks_are_of_all_kinds():
  mask = np.asarray(masks.draw_masks(jax.random.key(1), 2000, 32))
  assert mask.shape == (2000, 32, 32, 1) and set(np.unique(mask)) == {0, 1}
  share = mask.mean(axis=(1, 2, 3))
  assert 0.27 < (share == 0).mean() < 0.34
  some = share[share > 0]
  # From little to nearly all, and never all: what would there be to learn?
  assert np.percentile(some, 5) < 0.25 and np.percentile(some, 95) > 0.8 and some.max() < 1
  # Each place is known about as often as any other.
  assert np.ptp(mask.mean(axis=0)) < 0.35
  # Those that erase the middle and keep a corner, and those that do the reverse.
  corner, middle = mask[:, 0, 0, 0], mask[:, 16, 16, 0]
  assert ((corner == 1) & (middle == 0)).mean() > 0.1 < ((corner == 0) & (middle == 1)).mean()


def test_masks_learn_though_they_are_zero_at_first():
  params = decoder.init(COMPLETES, jax.random.key(0))
  assert not np.any(params['conv_known']['kernel'])
  text, null_text = make_text(4), make_text(1, seed=5)
  image, z_i = np.clip(normal(4, 16, 16, 3), -1, 1), normal(4, 16)

  @jax.jit
  def gradient(params):
    def loss(params):
      return decoder.loss(COMPLETES, params, image, z_i, text, null_text, jax.random.key(2))[0]

    return jax.grad(loss)(params)['conv_known']['kernel']

  found = gradient(randomised(params))
  assert np.all(np.isfinite(found)) and np.abs(found).max() > 0
