"""The trainings of the stages: what their losses see, and that they learn."""

import dataclasses
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
from tiny_stages import CONFIG, STATISTICS, keys, make_text, normal, random_params

from unclip_jax.presets import TINY
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler


def smooth_images(batch, size):
  """Images in [-1, 1] of four colours that run into each other: noise takes long to learn."""
  corners = normal(batch, 2, 2, 3)
  return jnp.tanh(2 * jax.image.resize(corners, (batch, size, size, 3), 'linear'))


def one_level(config, attention_levels=()):
  """The stage with a U-Net of one resolution, which compiles in half the time."""
  unet = dataclasses.replace(config.unet, multipliers=(1,), attention_levels=attention_levels)
  return dataclasses.replace(config, unet=unet)


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


def test_a_draft_learns_one_batch_beside_the_unet():
  image, z_i = smooth_images(4, 16), normal(4, 16)
  text, null_text = make_text(4), make_text(1, seed=9)
  config = one_level(TINY.decoder, attention_levels=(0,))
  unet = dataclasses.replace(config.unet, condition_channels=3)
  config = dataclasses.replace(config, draft_size=8, draft_width=24, unet=unet, image_drop=0.0)

  def loss_fn(params, key):
    return decoder.loss(config, params, image, z_i, text, null_text, key)

  def draft_error(params):
    return loss_fn(params, jax.random.key(1))[1]['draft_mse']

  params = fresh(decoder, config)
  alone = jax.grad(
    lambda p: decoder.draft_loss(config, p, image, z_i, text, null_text, jax.random.key(1))[0]
  )(params)
  moved = {name for name, g in alone.items() if any(np.any(a) for a in jax.tree.leaves(g))}
  assert moved == {'draft'}
  _, _, trained = overfit(loss_fn, params)
  assert draft_error(trained) < 0.2 * draft_error(params)


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
    def __init__(self, config, dtype, remat):
      self.channels = config.unet.out_channels if network_name == 'DecoderNetwork' else None

    def apply(self, variables, x_t, t, *conditioning, method, rngs=None):
      seen.append((x_t, t, *conditioning))
      if self.channels is None:
        return jnp.zeros(x_t.shape)
      return jnp.zeros((*x_t.shape[:-1], self.channels)), None

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
  _, _, seen_text, seen_z_i, has_z_i, deterministic, known = recorded_inputs(
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
  assert deterministic is False and known is None


@pytest.mark.parametrize(('text_drop', 'image_drop'), [(0.0, 1.0), (1.0, 0.0)])
def test_decoder_drops_as_its_config_says(monkeypatch, text_drop, image_drop):
  config = dataclasses.replace(CONFIG.decoder, text_drop=text_drop, image_drop=image_drop)
  text, null_text = make_text(50), make_text(1, seed=9)
  args = (jnp.zeros((50, 1, 1, 3)), normal(50, 16), text, null_text, jax.random.key(0))
  _, _, seen_text, _, has_z_i, *_ = recorded_inputs(
    monkeypatch, decoder, 'DecoderNetwork', lambda: decoder.loss(config, {}, *args)
  )
  assert (dropped_rows(seen_text, null_text) == bool(text_drop)).all()
  assert (np.asarray(has_z_i) == (not image_drop)).all()


def test_a_decoder_that_inpaints_is_given_what_is_not_erased(monkeypatch):
  config = dataclasses.replace(CONFIG.decoder, inpaints=True)
  image = jnp.clip(normal(50, 16, 16, 3), -1, 1)
  args = (image, normal(50, 16), make_text(50), make_text(1, seed=9), jax.random.key(0))
  known = recorded_inputs(
    monkeypatch, decoder, 'DecoderNetwork', lambda: decoder.loss(config, {}, *args)
  )[6]
  mask = np.asarray(known)[..., 3:]
  assert 0.2 < mask.mean() < 0.5 and len({row.tobytes() for row in mask}) > 30
  np.testing.assert_array_equal(known[..., :3], image * mask)


def test_noise_turns_z_i_by_as_much_as_the_config_says_and_keeps_its_length(monkeypatch):
  config = dataclasses.replace(CONFIG.decoder, z_i_noise=0.75)
  n, z_i = 2_000, normal(2_000, 16)
  args = (jnp.zeros((n, 1, 1, 3)), z_i, make_text(n), make_text(1, seed=9), jax.random.key(0))
  seen = recorded_inputs(
    monkeypatch, decoder, 'DecoderNetwork', lambda: decoder.loss(config, {}, *args)
  )[3]
  norms = [np.linalg.norm(z, axis=1) for z in (z_i, seen)]
  np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
  tangent = np.tan(np.arccos((z_i * seen).sum(axis=1) / (norms[0] * norms[1])))
  # The part of the noise along z_i only spreads the tangent: its median is near 0.75.
  assert abs(np.median(tangent) - 0.75) < 0.05


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
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4',
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
