"""Guidance within an interval: a plan's rows on either side of its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TEXTS, load_tiny

from unclip_jax import Sampling, UnclipError
from unclip_jax.config_json import from_json, to_json
from unclip_jax.configs import DiffusionConfig, SamplingConfig
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.stages import common

DIFFUSION = DiffusionConfig(prediction='x_0')
PLAN = common.make_plan(DIFFUSION, SamplingConfig(6))


def run(guided):
  """A loop whose network says by how many rows it was asked, and for what."""

  def evaluate(x, emb, given):
    return 0.3 * x + 0.1 * emb[:, :1] + given

  pair = jnp.array([[1.0], [-1.0]] * 3)  # cond, uncond, cond, ...
  conditioning = pair[::2] if guided is None else pair
  times = jnp.asarray(PLAN.t, jnp.float32)[:, None] / 1000
  denoise_fn = common.make_denoise_fn(evaluate, conditioning, times, DIFFUSION, guided)
  keys = jax.random.split(jax.random.key(0), 3)
  x_T = samplers.start_noise(keys, (5,))
  return samplers.sample_loop(denoise_fn, samplers.ddim(), PLAN, x_T, keys, True)[1].x_0


def test_rows_outside_are_conditional_and_the_others_guided():
  is_on = np.array([False, True, True, False, False, True])
  found = run(Guidance(3.0, None, is_on))
  guided, plain = run(3.0), run(None)
  # The rows differ by what x_t is by then: the first of each kind tells.
  np.testing.assert_allclose(found[0], plain[0], atol=1e-6)
  assert not np.allclose(found[0], guided[0])
  everywhere, nowhere = (run(Guidance(3.0, None, np.full(6, on))) for on in (True, False))
  np.testing.assert_allclose(everywhere, guided, atol=1e-6)
  np.testing.assert_allclose(nowhere, plain, atol=1e-6)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


def draw(model, decoder):
  return model.generate(TEXTS[:2], 3, prior=decoder, decoder=decoder).astype(int)


def test_a_model_is_guided_within_an_interval(model):
  guided = draw(model, Sampling(4, guidance_scale=5.0))
  plain = draw(model, Sampling(4, guidance_scale=1.0))
  whole = draw(model, Sampling(4, guidance_scale=5.0, guidance_interval=(0.0, 1.0)))
  part = draw(model, Sampling(4, guidance_scale=5.0, guidance_interval=(0.5, 1.0)))
  rescaled = draw(model, Sampling(4, guidance_scale=5.0, guidance_rescale=1.0))
  assert np.array_equal(whole, guided)
  for other in (guided, plain, rescaled):
    assert not np.array_equal(part, other)
  assert not np.array_equal(rescaled, guided)


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({'decoder': Sampling(guidance_interval=(0.9, 0.1), guidance_scale=2)}, 'two numbers'),
    ({'decoder': Sampling(guidance_interval=(0.1,), guidance_scale=2)}, 'two numbers'),
    ({'decoder': Sampling(guidance_interval='ab', guidance_scale=2)}, 'two numbers'),
    ({'decoder': Sampling(guidance_interval=(0.1, 1.2), guidance_scale=2)}, 'two numbers'),
    ({'decoder': Sampling(2, guidance_interval=(0.3, 0.31), guidance_scale=2)}, 'no step lies'),
    ({'decoder': Sampling(guidance_interval=(0.1, 0.9), guidance_scale=1)}, 'without effect'),
    ({'decoder': Sampling(guidance_rescale=0.5, guidance_scale=1)}, 'without effect'),
    ({'decoder': Sampling(guidance_rescale=1.5, guidance_scale=2)}, r'within 0\.\.1'),
    ({'upsampler': Sampling(guidance_interval=(0.1, 0.9))}, 'upsampler: it is not guided'),
    ({'upsampler': Sampling(guidance_rescale=0.5)}, 'upsampler: it is not guided'),
  ],
)
def test_settings_that_cannot_be_are_named(model, arguments, match):
  with pytest.raises(UnclipError, match=match):
    model.generate(TEXTS[0], 3, **arguments)


def test_a_config_with_an_interval_goes_through_json():
  config = SamplingConfig(5, guidance_interval=(0.2, 0.8), guidance_rescale=0.7)
  assert from_json(SamplingConfig, to_json(config)) == config
