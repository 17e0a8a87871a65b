"""The stages: what their losses see, that they learn, and what their samples depend on."""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import randomised

from unclip_jax.configs import override
from unclip_jax.diffusion import samplers
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.presets import TINY
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler
from unclip_jax.types import UnclipError

# Networks that predict v keep what random weights draw in the middle of the range.
CONFIG = override(TINY, ['decoder.diffusion.prediction=v', 'upsamplers.0.diffusion.prediction=v'])
UPSAMPLER = CONFIG.upsamplers[0]
FINAL = dataclasses.replace(UPSAMPLER, final_unet=True)
STATISTICS = diffusion_prior.paper_statistics(CONFIG.prior.embed_dim)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype('f'))


def make_text(batch, seed=0):
  draw = np.random.default_rng(seed)
  length, width = CONFIG.prior.context_length, CONFIG.prior.text_width
  ends = draw.integers(1, length + 1, (batch, 1))
  return TextFeatures(
    ids=jnp.asarray(draw.integers(0, 300, (batch, length))),
    mask=jnp.asarray(np.arange(length)[None] < ends),
    states=normal(batch, length, width, seed=seed),
    z_t=normal(batch, CONFIG.prior.embed_dim, seed=seed + 1),
  )


def smooth_images(batch, size):
  """Images in [-1, 1] of four colours that run into each other: noise takes long to learn."""
  corners = normal(batch, 2, 2, 3)
  return jnp.tanh(2 * jax.image.resize(corners, (batch, size, size, 3), 'linear'))


def one_level(config, attention_levels=()):
  """The stage with a U-Net of one resolution, which compiles in half the time."""
  unet = dataclasses.replace(config.unet, multipliers=(1,), attention_levels=attention_levels)
  return dataclasses.replace(config, unet=unet)


def shapes_of(stage, config):
  return jax.eval_shape(lambda key: stage.init(config, key), jax.random.key(0))


@functools.cache
def random_params(stage, config):
  return randomised(shapes_of(stage, config))


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


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


def overfit(loss_fn, params, num_steps=50, learning_rate=5e-3):
  """The mean loss at fixed keys before training on other keys and after it, and the result."""
  optimizer = optax.adam(learning_rate)

  # The same program evaluates, at a rate of 0. No scan: XLA runs convolutions in loops slowly.
  @jax.jit
  def update(params, state, key, rate):
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, key)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state, loss

  def evaluate(params):
    state = optimizer.init(params)
    return np.mean([update(params, state, key, 0.0)[2] for key in keys(20, seed=1)])

  trained, state = params, optimizer.init(params)
  for key in keys(num_steps):
    trained, state, loss = update(trained, state, key, 1.0)
    assert np.isfinite(loss)
  return evaluate(params), evaluate(trained), trained


def fresh(stage, config):
  return jax.jit(lambda key: stage.init(config, key))(jax.random.key(0))


def test_clip_learns_one_batch():
  image, text = smooth_images(8, 16), make_text(8)

  def loss_fn(params, key):
    return clip.loss(CONFIG.clip, params, image, text.ids, text.mask)

  before, after, _ = overfit(loss_fn, fresh(clip, CONFIG.clip))
  assert before > 1.5  # log 8 is 2.1
  assert after < 0.2


def test_prior_learns_one_batch():
  z_i, text, null_text = normal(8, 16) / 17.2, make_text(8), make_text(1, seed=9)

  def loss_fn(params, key):
    args = (STATISTICS, z_i, text, null_text, key)
    return diffusion_prior.loss(CONFIG.prior, params, *args)

  before, after, _ = overfit(loss_fn, fresh(diffusion_prior, CONFIG.prior))
  assert after < 0.4 * before


def test_decoder_learns_one_batch():
  image, z_i = smooth_images(4, 16), normal(4, 16)
  text, null_text = make_text(4), make_text(1, seed=9)
  config = one_level(TINY.decoder, attention_levels=(0,))

  def loss_fn(params, key):
    return decoder.loss(config, params, image, z_i, text, null_text, key)

  before, after, _ = overfit(loss_fn, fresh(decoder, config))
  assert after < 0.7 * before


def test_upsampler_learns_one_batch_of_crops_with_both_its_networks():
  config = one_level(dataclasses.replace(TINY.upsamplers[0], final_unet=True))
  image = smooth_images(4, 8)
  low = image.reshape(4, 4, 2, 4, 2, 3).mean(axis=(2, 4))

  def loss_fn(params, key):
    return upsampler.loss(config, params, image, low, key)

  params = fresh(upsampler, config)
  before, after, trained = overfit(loss_fn, params)
  assert after < 0.7 * before
  for name in ('unet', 'final_unet'):
    assert np.abs(trained[name]['conv_out']['kernel']).max() > 1e-3  # was zero


def test_decoder_loss_in_bfloat16_and_its_gradients_are_finite_and_near_float32():
  text, null_text, z_i = make_text(4), make_text(1, seed=9), normal(4, 16)
  image, key = smooth_images(4, 8), jax.random.key(0)
  config = one_level(CONFIG.decoder, attention_levels=(0,))

  def loss_fn(params, dtype):
    return decoder.loss(config, params, image, z_i, text, null_text, key, dtype)[0]

  params = random_params(decoder, config)
  exact = jax.jit(loss_fn, static_argnums=1)(params, jnp.float32)
  rounded, grads = jax.jit(jax.value_and_grad(loss_fn), static_argnums=1)(params, jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, exact, rtol=0.05)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def recorded_inputs(monkeypatch, stage, network_name, run):
  """What a loss gives its network, which returns zeros here."""
  seen = []

  class Recorder:
    def __init__(self, config, dtype):
      self.channels = config.unet.out_channels if network_name == 'DecoderNetwork' else None

    def apply(self, variables, x_t, t, *conditioning, method, rngs=None):
      seen.append((x_t, t, *conditioning))
      shape = x_t.shape if self.channels is None else (*x_t.shape[:-1], self.channels)
      return jnp.zeros(shape)

  monkeypatch.setattr(stage, network_name, Recorder)
  run()
  return seen[0]


def dropped_rows(text, null_text):
  """Which captions became the empty one, the same in each of their features."""
  drops = [
    (np.asarray(x) == np.asarray(null)).reshape(len(x), -1).all(axis=1)
    for x, null in zip(text, null_text, strict=True)
    if x.ndim > 1 and x.dtype != bool
  ]
  for drop in drops[1:]:
    np.testing.assert_array_equal(drop, drops[0])
  mask = np.asarray(text.mask) == np.asarray(null_text.mask)
  assert mask.all(axis=1)[drops[0]].all()
  return drops[0]


def test_decoder_drops_z_i_in_10_percent_and_captions_in_50_independently(monkeypatch):
  n = 20_000
  image, z_i = jnp.zeros((n, 1, 1, 3)), normal(n, 16)
  text, null_text = make_text(n), make_text(1, seed=9)
  args = (image, z_i, text, null_text, jax.random.key(0))
  _, _, seen_text, seen_z_i, has_z_i, deterministic = recorded_inputs(
    monkeypatch, decoder, 'DecoderNetwork', lambda: decoder.loss(CONFIG.decoder, {}, *args)
  )
  no_text, no_z_i = dropped_rows(seen_text, null_text), ~np.asarray(has_z_i)
  # Four standard deviations of a mean of n draws.
  for share, expected in (
    (no_z_i.mean(), 0.1),
    (no_text.mean(), 0.5),
    ((no_text & no_z_i).mean(), 0.05),
  ):
    assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
  kept = ~no_text
  jax.tree.map(
    lambda seen, given: np.testing.assert_array_equal(seen[kept], given[kept]), seen_text, text
  )
  np.testing.assert_array_equal(seen_z_i, z_i)
  assert deterministic is False


@pytest.mark.parametrize(('text_drop', 'image_drop'), [(0.0, 1.0), (1.0, 0.0)])
def test_decoder_drops_as_its_config_says(monkeypatch, text_drop, image_drop):
  config = dataclasses.replace(CONFIG.decoder, text_drop=text_drop, image_drop=image_drop)
  text, null_text = make_text(50), make_text(1, seed=9)
  args = (jnp.zeros((50, 1, 1, 3)), normal(50, 16), text, null_text, jax.random.key(0))
  _, _, seen_text, _, has_z_i, _ = recorded_inputs(
    monkeypatch, decoder, 'DecoderNetwork', lambda: decoder.loss(config, {}, *args)
  )
  assert (dropped_rows(seen_text, null_text) == bool(text_drop)).all()
  assert (np.asarray(has_z_i) == (not image_drop)).all()


def test_prior_drops_captions_in_10_percent(monkeypatch):
  n = 20_000
  text, null_text = make_text(n), make_text(1, seed=9)
  args = (STATISTICS, normal(n, 16), text, null_text, jax.random.key(0))
  _, _, seen_text = recorded_inputs(
    monkeypatch,
    diffusion_prior,
    'PriorNetwork',
    lambda: diffusion_prior.loss(CONFIG.prior, {}, *args),
  )
  share = dropped_rows(seen_text, null_text).mean()
  assert abs(share - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5


def test_training_steps_are_uniform_in_t_and_noised_accordingly():
  x_0 = normal(50_000, 2)
  x_t, eps, step = common.draw_training_step(CONFIG.prior.diffusion, jax.random.key(0), x_0)
  t = np.asarray(step.t)
  shares = np.bincount(t // 100, minlength=10) / len(t)
  assert (t.min(), t.max()) == (0, 999)
  np.testing.assert_allclose(shares, 0.1, atol=0.006)
  assert abs(float(eps.mean())) < 0.02 and abs(float(eps.std()) - 1) < 0.02
  alpha_bar = common.make_schedule(CONFIG.prior.diffusion).alpha_bar[t][:, None]
  expected = np.sqrt(alpha_bar) * np.asarray(x_0) + np.sqrt(1 - alpha_bar) * np.asarray(eps)
  np.testing.assert_allclose(x_t, expected, atol=1e-5)


def test_contrastive_loss_over_four_devices_is_that_of_one():
  """Value and gradients: differentiated from outside shard_map, and inside of pmap."""
  script = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from unclip_jax.stages.clip import contrastive_loss

    def loss(params, x, y, axis_name=None):
      z_i, z_t = (z / jnp.linalg.norm(z, axis=1, keepdims=True)
                  for z in (x @ params['image'], y @ params['text']))
      return contrastive_loss(z_i, z_t, params['log_scale'], axis_name)

    def mean_loss(params, x, y):
      return jax.lax.pmean(loss(params, x, y, 'data'), 'data')

    def pmapped(params, x, y):
      out = jax.value_and_grad(loss, has_aux=True)(params, x, y, 'data')
      return jax.lax.pmean(out, 'data')

    draw = np.random.default_rng(0)
    params = {
      'image': draw.normal(size=(7, 5)).astype('f'),
      'text': draw.normal(size=(6, 5)).astype('f'),
      'log_scale': np.float32(1.2),
    }
    x, y = draw.normal(size=(12, 7)).astype('f'), draw.normal(size=(12, 6)).astype('f')
    one = jax.value_and_grad(loss, has_aux=True)(params, x, y)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    over_devices = jax.shard_map(
      mean_loss, mesh=mesh, in_specs=(P(), P('data'), P('data')), out_specs=P()
    )
    four = jax.jit(jax.value_and_grad(over_devices, has_aux=True))(params, x, y)
    split = [a.reshape(4, 3, -1) for a in (x, y)]
    inside = jax.pmap(pmapped, axis_name='data', in_axes=(None, 0, 0))(params, *split)
    inside = jax.tree.map(lambda a: a[0], inside)
    assert float(one[0][0]) > 0.5
    for other in (four, inside):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, one)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(one[1]))
  """
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_PLATFORMS': 'cpu',
  }
  result = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)],
    cwd=Path(__file__).parent.parent,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr


def test_logit_scale_is_held_at_100():
  z_i, z_t = (
    z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (normal(5, 7), normal(5, 7, seed=1))
  )
  at_limit, _ = clip.contrastive_loss(z_i, z_t, jnp.log(100.0))
  above, _ = clip.contrastive_loss(z_i, z_t, jnp.log(500.0))
  np.testing.assert_allclose(above, at_limit, rtol=1e-5)


def test_logit_scale_beyond_100_comes_back():
  """Rows that do not match: a smaller scale is better, and gradient descent finds it."""
  z_i, z_t = jnp.eye(4), jnp.eye(4)[::-1]

  def loss_fn(log_scale):
    return clip.contrastive_loss(z_i, z_t, log_scale)[0]

  below, above = (float(jax.grad(loss_fn)(jnp.log(scale))) for scale in (99.9, 500.0))
  assert above > 1
  np.testing.assert_allclose(above, below, rtol=2e-3)
  scales = [float(clip.logit_scale(jnp.log(scale))) for scale in (3.0, 100.0, 500.0)]
  np.testing.assert_allclose(scales, [3, 100, 100], rtol=1e-5)


def test_accuracy_is_the_share_of_images_whose_caption_comes_first():
  z = jnp.eye(4)
  _, metrics = clip.contrastive_loss(z, z[jnp.array([0, 1, 3, 2])], jnp.float32(0))
  assert float(metrics['accuracy']) == 0.5


PROMPTS = (make_text(3), make_text(3, seed=5))
Z_I = normal(3, 16)


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


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: override_plan('diffusion.schedule=sqrt'), r"schedule 'sqrt'.*cosine or linear"),
    (lambda: override_plan('sampling.spacing=even'), r"spacing 'even'.*strided, karlo or fast27"),
    (lambda: override_plan('sampling.num_steps=1001'), r'1001'),
    (lambda: override_plan('sampling.num_steps=0'), r'0'),
    (lambda: override_plan('sampling.spacing=fast27'), r'fast27 has 27 steps, not 3'),
    (lambda: common.make_sampler('euler', 'learned'), r"sampler 'euler'.*ddpm or ddim"),
    (lambda: common.make_sampler('ddpm', 'huge'), r"variance 'huge'"),
  ],
)
def test_unknown_schedules_spacings_samplers_and_numbers_of_steps_are_named(call, message):
  with pytest.raises(UnclipError, match=message):
    call()


def override_plan(assignment):
  config = override(CONFIG.prior, [assignment])
  return common.make_plan(config.diffusion, config.sampling)


@pytest.mark.parametrize('spacing', ['strided', 'karlo', 'fast27'])
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
    denoise_fn = common.make_denoise_fn(lambda x, emb: x_0, jnp.zeros((3, 1)), diffusion, None)
    return np.asarray(denoise_fn(normal(2, 4, 4, 3, seed=1), step).x_0)

  np.testing.assert_allclose(predict(), x_0, atol=1e-6)
  np.testing.assert_allclose(predict(clip_x_0=1.0), np.clip(x_0, -1, 1), atol=1e-6)
  s = np.percentile(np.abs(x_0).reshape(2, -1), 90, axis=1).reshape(2, 1, 1, 1)
  expected = np.clip(x_0, -s, s) / s
  np.testing.assert_allclose(predict(dynamic_threshold=90.0), expected, atol=1e-5)
  np.testing.assert_allclose(predict(dynamic_threshold=90.0, clip_x_0=0.1), expected, atol=1e-5)
