"""The samplings of the stages: what their samples depend on, and what compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised
from tiny_stages import CONFIG, STATISTICS, keys, make_text, normal, random_params

from unclip_jax.config_json import override
from unclip_jax.diffusion import samplers
from unclip_jax.stages import common, decoder, diffusion_prior, upsampler
from unclip_jax.types import UnclipError

UPSAMPLER = CONFIG.upsamplers[0]
FINAL = dataclasses.replace(UPSAMPLER, final_unet=True)
PROMPTS = (make_text(3), make_text(3, seed=5))
Z_I = normal(3, 16)


def rows(tree, i):
  return jax.tree.map(lambda x: x[i : i + 1], tree)


@functools.partial(jax.jit, static_argnums=0)
def sample_prior(config, params, text, null_text, key_b, guidance_scale=None, eta=None):
  plan = common.make_plan(config.diffusion, config.sampling)
  sampler = samplers.ddpm() if eta is None else samplers.ddim(eta)
  args = (text, null_text, key_b, plan, sampler, guidance_scale)
  return diffusion_prior.sample(config, params, STATISTICS, *args)[0]


@functools.partial(jax.jit, static_argnums=0)
def sample_decoder(config, params, text, null_text, z_i, key_b, guidance_scale=None):
  plan = common.make_plan(config.diffusion, config.sampling)
  args = (text, null_text, z_i, key_b, plan, samplers.ddpm('learned'), guidance_scale)
  return decoder.sample(config, params, *args)[0]


@functools.partial(jax.jit, static_argnums=0)
def sample_upsampler(config, params, low, key_b, x_start=None):
  plan = common.make_plan(config.diffusion, config.sampling)
  args = (low, key_b, plan, samplers.ddim(0.0), x_start)
  return upsampler.sample(config, params, *args, with_trajectory=True)


def prior_params():
  return random_params(diffusion_prior, CONFIG.prior)


def decoder_params():
  return random_params(decoder, CONFIG.decoder)


def test_guidance_scale_of_1_is_no_guidance_and_other_scales_compile_nothing():
  key_b = keys(3)
  one = jnp.float32(1)
  unguided = sample_prior(CONFIG.prior, prior_params(), *PROMPTS, key_b)
  guided = sample_prior(CONFIG.prior, prior_params(), *PROMPTS, key_b, one)
  np.testing.assert_allclose(guided, unguided, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(guided, axis=1), 1, rtol=1e-5)
  programs = sample_prior._cache_size()
  stronger = sample_prior(CONFIG.prior, prior_params(), *PROMPTS, key_b, 4 * one)
  assert sample_prior._cache_size() == programs
  assert np.abs(stronger - guided).max() > 1e-2

  unguided = sample_decoder(CONFIG.decoder, decoder_params(), *PROMPTS, Z_I, key_b)
  guided = sample_decoder(CONFIG.decoder, decoder_params(), *PROMPTS, Z_I, key_b, one)
  assert unguided.shape == (3, 16, 16, 3)
  np.testing.assert_allclose(guided, unguided, atol=1e-4)
  programs = sample_decoder._cache_size()
  stronger = sample_decoder(CONFIG.decoder, decoder_params(), *PROMPTS, Z_I, key_b, 4 * one)
  assert sample_decoder._cache_size() == programs
  assert np.abs(stronger - guided).max() > 1e-2


def test_another_eta_compiles_nothing():
  args = (CONFIG.prior, prior_params(), *PROMPTS, keys(3))
  still = sample_prior(*args, eta=jnp.float32(0))
  programs = sample_prior._cache_size()
  freer = sample_prior(*args, eta=jnp.float32(1))
  assert sample_prior._cache_size() == programs
  assert np.abs(freer - still).max() > 1e-3


def test_sample_of_a_batch_is_what_it_is_alone():
  key_b, scale, i = keys(3), jnp.float32(2), 2
  batch = sample_prior(CONFIG.prior, prior_params(), *PROMPTS, key_b, scale)
  alone = sample_prior(CONFIG.prior, prior_params(), *rows(PROMPTS, i), key_b[i:], scale)
  np.testing.assert_allclose(alone[0], batch[i], atol=1e-5)
  args = (*PROMPTS, Z_I)
  batch = sample_decoder(CONFIG.decoder, decoder_params(), *args, key_b, scale)
  alone = sample_decoder(CONFIG.decoder, decoder_params(), *rows(args, i), key_b[i:], scale)
  np.testing.assert_allclose(alone[0], batch[i], atol=1e-4)
  assert np.abs(batch[0] - batch[2]).max() > 0.1


def test_reranking_keeps_the_candidate_of_the_highest_dot_product():
  z_t, candidates = normal(5, 4, seed=1), normal(5, 3, 4)
  chosen = diffusion_prior.rerank(candidates, z_t)
  for i in range(5):
    scores = [float(np.dot(c, z_t[i])) for c in np.asarray(candidates[i])]
    np.testing.assert_array_equal(chosen[i], candidates[i, int(np.argmax(scores))])


@pytest.mark.parametrize('scale', [None, 2.0, 'per_sample'])
def test_candidates_of_a_caption_are_what_captions_of_their_own_would_bring(scale):
  n, params = 2, prior_params()
  key_b, repeated = keys(3 * n), jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), PROMPTS)
  if scale is not None:
    scale = jnp.linspace(0.0, 3.0, 3 * n) if scale == 'per_sample' else jnp.float32(scale)

  @functools.partial(jax.jit, static_argnums=2)
  def sample(text, null_text, num_candidates):
    return diffusion_prior.sample(
      CONFIG.prior,
      params,
      STATISTICS,
      text,
      null_text,
      key_b,
      common.make_plan(CONFIG.prior.diffusion, CONFIG.prior.sampling),
      samplers.ddpm(),
      scale,
      num_candidates=num_candidates,
    )[0]

  together, apart = sample(*PROMPTS, n), sample(*repeated, 1)
  assert together.shape == (3 * n, CONFIG.prior.embed_dim)
  np.testing.assert_allclose(together, apart, atol=1e-5)
  assert np.abs(together[0] - together[1]).max() > 1e-3


def test_statistics_standardise_embeddings():
  z_i = 3 * normal(500, 16) + 2
  mean, std = diffusion_prior.fit_statistics(z_i)
  standard = (z_i - mean[None]) / std[None]
  np.testing.assert_allclose(standard.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(standard.std(axis=0), 1, atol=1e-5)
  paper = diffusion_prior.paper_statistics(4)
  np.testing.assert_allclose(17.2 * paper.std, 1, rtol=1e-6)
  np.testing.assert_array_equal(paper.mean, 0)


def test_upsampler_draws_at_full_size_from_its_keys_or_a_given_start():
  params, key_b = random_params(upsampler, UPSAMPLER), keys(2)
  low = jnp.tanh(normal(2, 16, 16, 3))
  image, trajectory = sample_upsampler(UPSAMPLER, params, low, key_b)
  assert image.shape == (2, 32, 32, 3)
  assert trajectory.x_s.shape == trajectory.x_0.shape == (3, 2, 32, 32, 3)
  np.testing.assert_array_equal(trajectory.x_s[-1], image)
  assert np.abs(trajectory.x_s[0] - image).max() > 1e-2
  x_start = samplers.start_noise(key_b, (32, 32, 3))
  again, _ = sample_upsampler(UPSAMPLER, params, low, key_b, x_start)
  np.testing.assert_array_equal(again, image)
  # DDIM with eta 0 adds no noise: the start is all that keys decide.
  other_keys, _ = sample_upsampler(UPSAMPLER, params, low, keys(2, seed=1), x_start)
  np.testing.assert_array_equal(other_keys, image)
  other, _ = sample_upsampler(UPSAMPLER, params, low, key_b, -x_start)
  assert np.abs(other - image).max() > 1e-2


def test_final_network_takes_the_last_step_and_no_other():
  low, key_b = jnp.tanh(normal(2, 16, 16, 3)), keys(2)
  single = random_params(upsampler, UPSAMPLER)
  image, trajectory = sample_upsampler(UPSAMPLER, single, low, key_b)
  twice = {'unet': single['unet'], 'final_unet': single['unet']}
  same, same_trajectory = sample_upsampler(FINAL, twice, low, key_b)
  np.testing.assert_allclose(same, image, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same_trajectory, trajectory
  )
  other = {'unet': single['unet'], 'final_unet': randomised(single['unet'], seed=1)}
  different, different_trajectory = sample_upsampler(FINAL, other, low, key_b)
  np.testing.assert_array_equal(different_trajectory.x_s[:-1], same_trajectory.x_s[:-1])
  assert np.abs(different - same).max() > 1e-2


def test_condition_is_clipped_before_it_is_enlarged():
  low = 3 * normal(2, 4, 4, 3)
  np.testing.assert_array_equal(
    upsampler.upscale(low, 16), upsampler.upscale(jnp.clip(low, -1, 1), 16)
  )
  flat = upsampler.upscale(jnp.full((1, 4, 4, 3), 5.0), 16)
  np.testing.assert_allclose(flat, 1, atol=1e-6)


@pytest.mark.parametrize('block', [1, 2, 4])
def test_back_projection_brings_a_shifted_picture_back_and_keeps_what_is_finer(block):
  y = np.linspace(0, np.pi, 64)
  clean = np.broadcast_to(0.4 * np.sin(y)[None, :, None, None], (1, 64, 64, 3))
  # Within a small pixel, so that it adds nothing to a mean.
  edge = np.tile([0.1, -0.1, 0.1, -0.1], 16)[None, None, :, None]
  low = clean.reshape(1, 16, 4, 16, 4, 3).mean(axis=(2, 4))
  shift = np.array([0.2, -0.1, 0.05])
  ramp = np.linspace(-0.1, 0.1, 64)[None, None, :, None]
  shifted = jnp.asarray(clean + edge + shift + ramp)
  result = upsampler.back_project(shifted, jnp.asarray(low), block)
  error = np.abs(np.asarray(result) - (clean + edge))
  assert error.max() < 0.006 * (1 + 2 * block)  # at the border the ramp is flat for half a block
  assert error[:, :, 8:-8].max() < 1e-5
  unshifted = upsampler.back_project(jnp.asarray(clean + edge), jnp.asarray(low), block)
  np.testing.assert_allclose(unshifted, clean + edge, atol=1e-6)
  # What is finer than a block is the upsampler's: the small image's own noise stays out.
  noise = np.tile([[0.1, -0.1], [-0.1, 0.1]], (8, 8))[None, :, :, None]
  noisy = upsampler.back_project(jnp.asarray(clean + edge), jnp.asarray(low + noise), block)
  kept = np.abs(np.asarray(noisy) - (clean + edge)).max()
  assert kept > 0.05 if block == 1 else kept < 1e-6
  wide = upsampler.back_project(jnp.zeros((1, 16, 16, 3)), jnp.full((1, 4, 4, 3), 5.0), block)
  np.testing.assert_allclose(wide, 1, atol=1e-6)


def test_an_upsampler_that_keeps_the_small_image_is_one_that_projects_back_at_the_end():
  config = dataclasses.replace(UPSAMPLER, keep_low=4)
  params = random_params(upsampler, UPSAMPLER)
  low, key_b = 2 * jnp.tanh(normal(2, 16, 16, 3)), keys(2)
  image, trajectory = sample_upsampler(UPSAMPLER, params, low, key_b)
  kept, same_trajectory = sample_upsampler(config, params, low, key_b)
  jax.tree.map(np.testing.assert_array_equal, same_trajectory, trajectory)
  np.testing.assert_allclose(kept, upsampler.back_project(image, low, 4), atol=1e-6)
  assert np.abs(kept - image).max() > 1e-2


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: override_plan('diffusion.schedule=sqrt'),
      r"schedule 'sqrt'.*cosine, linear or scaled_linear",
    ),
    (
      lambda: override_plan('sampling.spacing=even'),
      r"spacing 'even'.*strided, karlo, fast27, leading, tr",
    ),
    (lambda: override_plan('diffusion.betas=[0.1, 0.2]'), r'cosine schedule has no betas'),
    (lambda: override_plan('sampling.spacing=leading', 'sampling.offset=400'), r'offset of 400'),
    (lambda: override_plan('sampling.num_steps=1001'), r'1001'),
    (lambda: override_plan('sampling.num_steps=0'), r'0'),
    (lambda: override_plan('sampling.spacing=fast27'), r'fast27 has 27 steps, not 3'),
    (lambda: common.make_sampler('euler', 'learned'), r"sampler 'euler'.*ddpm, ddim, "),
    (lambda: common.make_sampler('ddpm', 'huge'), r"variance 'huge'"),
  ],
)
def test_unknown_schedules_spacings_samplers_and_numbers_of_steps_are_named(call, message):
  with pytest.raises(UnclipError, match=message):
    call()


def override_plan(*assignments):
  config = override(CONFIG.prior, list(assignments))
  return common.make_plan(config.diffusion, config.sampling)


@pytest.mark.parametrize('spacing', ['strided', 'karlo', 'fast27', 'leading', 'trailing'])
def test_plan_has_the_steps_that_the_config_asks_for(spacing):
  if spacing != 'fast27':
    plan = override_plan(f'sampling.spacing={spacing}')
    assert plan.t.shape == (CONFIG.prior.sampling.num_steps,)
  plan = common.make_plan(
    CONFIG.prior.diffusion,
    dataclasses.replace(CONFIG.prior.sampling, spacing=spacing, num_steps=27),
  )
  assert plan.t.shape == (27,)
  assert (np.diff(plan.t) < 0).all()


def test_dynamic_threshold_bounds_x_0_in_place_of_the_clip():
  x_0 = 5 * normal(2, 4, 4, 3)
  step = jax.tree.map(lambda row: row[0], override_plan('sampling.num_steps=3'))

  def predict(**bounds):
    diffusion = dataclasses.replace(CONFIG.prior.diffusion, prediction='x_0', **bounds)
    denoise_fn = common.make_denoise_fn(
      lambda x, emb, given: x_0, None, jnp.zeros((3, 1)), diffusion, None
    )
    return np.asarray(denoise_fn(normal(2, 4, 4, 3, seed=1), step).x_0)

  np.testing.assert_allclose(predict(), x_0, atol=1e-6)
  np.testing.assert_allclose(predict(clip_x_0=1.0), np.clip(x_0, -1, 1), atol=1e-6)
  s = np.percentile(np.abs(x_0).reshape(2, -1), 90, axis=1).reshape(2, 1, 1, 1)
  expected = np.clip(x_0, -s, s) / s
  np.testing.assert_allclose(predict(dynamic_threshold=90.0), expected, atol=1e-5)
  np.testing.assert_allclose(predict(dynamic_threshold=90.0, clip_x_0=0.1), expected, atol=1e-5)
