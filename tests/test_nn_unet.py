"""Residual blocks, U-Nets and the decoder: what is zero at first, what depends on what, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import DecoderNetwork
from unclip_jax.nn.resnet import ConvTower, ResBlock
from unclip_jax.nn.unet import SpatialAttention, UNet
from unclip_jax.presets import TINY
from unclip_jax.stages import decoder, upsampler

KARLO = dataclasses.replace(TINY.decoder, text=None, clip_text_width=24)
DRAFT = dataclasses.replace(
  TINY.decoder,
  draft_size=8,
  draft_width=24,
  unet=dataclasses.replace(TINY.decoder.unet, condition_channels=3),
)
DECODERS = pytest.mark.parametrize(
  'config', [TINY.decoder, KARLO, DRAFT], ids=['own text', 'text projection', 'draft']
)
UPSAMPLER = TINY.upsamplers[0]


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


def make_text(batch=2):
  length = TINY.decoder.text.context_length
  return TextFeatures(
    ids=np.random.default_rng(0).integers(0, 300, (batch, length)),
    mask=np.arange(length)[None] < np.array([5, length])[:batch, None],
    states=normal(batch, length, 24),
    z_t=normal(batch, 16, seed=1),
  )


def make_decoder(config, seed=0):
  return randomised(jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0)), seed)


DECODER_INPUTS = {
  'x_t': normal(2, 16, 16, 3, seed=2),
  't': np.array([999, 3]),
  'z_i': normal(2, 16, seed=3),
  'has_z_i': np.array([True, True]),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames='dtype')
def predict_both(config, params, text, x_t, t, z_i, has_z_i, dtype=jnp.float32):
  network = DecoderNetwork(config, dtype)
  return network.apply({'params': params}, x_t, t, text, z_i, has_z_i, True, method='predict')


def run_decoder(config, params, text, **changed):
  return predict_both(config, params, text, **DECODER_INPUTS | changed)[0]


@functools.partial(jax.jit, static_argnums=0)
def run_unet(config, params, x, low, t, rng=None):
  network, variables = UNet(config), {'params': params}
  emb = network.apply(variables, t, method='encode_time')
  condition = network.apply(variables, low, method='encode_condition')
  rngs = None if rng is None else {'dropout': rng}
  return network.apply(variables, x, emb, condition=condition, deterministic=rng is None, rngs=rngs)


@pytest.mark.parametrize('scale_shift', [True, False])
def test_fresh_residual_block_passes_on_its_input(scale_shift):
  block = ResBlock(12, scale_shift=scale_shift, num_groups=4)
  x, emb = normal(2, 4, 6, 12), normal(2, 9)
  output, _ = jax.jit(block.init_with_output)(jax.random.key(0), x, emb)
  np.testing.assert_array_equal(output, x)


@pytest.mark.parametrize('resample', ['up', 'down'])
def test_fresh_resampling_block_resamples_its_input(resample):
  block = ResBlock(12, resample=resample, num_groups=4)
  x, emb = normal(2, 4, 6, 12), normal(2, 9)
  output, _ = jax.jit(block.init_with_output)(jax.random.key(0), x, emb)
  if resample == 'up':
    expected = x.repeat(2, axis=1).repeat(2, axis=2)
  else:
    expected = x.reshape(2, 2, 2, 3, 2, 12).mean(axis=(2, 4))
  np.testing.assert_allclose(output, expected, atol=1e-6)


def test_fresh_attention_passes_on_its_input():
  layer = SpatialAttention(channels=12, head_dim=4, num_groups=3, has_context=False)
  x = normal(2, 4, 6, 12)
  output, _ = layer.init_with_output(jax.random.key(0), x, None, None)
  np.testing.assert_array_equal(output, x)


def test_heads_that_do_not_divide_the_channels_are_refused():
  layer = SpatialAttention(channels=12, head_dim=5, num_groups=3, has_context=False)
  with pytest.raises(ValueError, match='head_dim of 5 does not divide 12 channels'):
    layer.init(jax.random.key(0), normal(2, 4, 6, 12), None, None)


def one_level(config, attention_levels=()):
  """The stage with a U-Net of one resolution: drawing its first parameters compiles faster."""
  unet = dataclasses.replace(config.unet, multipliers=(1,), attention_levels=attention_levels)
  return dataclasses.replace(config, unet=unet)


def test_fresh_decoder_returns_zero():
  config = one_level(KARLO, attention_levels=(0,))
  params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
  output = run_decoder(config, params, make_text())
  assert output.shape == (2, 16, 16, 6)
  np.testing.assert_array_equal(output, 0)


def test_fresh_upsampler_returns_zero():
  config = one_level(UPSAMPLER)
  params = jax.jit(lambda key: upsampler.init(config, key))(jax.random.key(0))['unet']
  x, low = normal(2, 16, 16, 3), normal(2, 16, 16, 3)
  output = run_unet(config.unet, params, x, low, jnp.array([0, 999]))
  np.testing.assert_array_equal(output, 0)


@DECODERS
def test_decoder_feels_each_of_its_inputs(config):
  params, text = make_decoder(config), make_text()
  output = run_decoder(config, params, text)
  changed = {
    'x_t': run_decoder(config, params, text, x_t=normal(2, 16, 16, 3, seed=9)),
    't': run_decoder(config, params, text, t=jnp.array([500, 700])),
    'z_i': run_decoder(config, params, text, z_i=normal(2, 16, seed=9)),
    'has_z_i': run_decoder(config, params, text, has_z_i=jnp.array([False, False])),
  }
  if config.text is None:
    changed['states'] = run_decoder(config, params, text._replace(states=text.states + 1))
    changed['z_t'] = run_decoder(config, params, text._replace(z_t=text.z_t + 1))
  else:
    changed['ids'] = run_decoder(config, params, text._replace(ids=text.ids[::-1]))
  for name, value in changed.items():
    assert (np.abs(value - output).max(axis=(1, 2, 3)) > 1e-3).all(), name


@DECODERS
def test_decoder_ignores_padding(config):
  params, text = make_decoder(config), make_text()
  padded = text._replace(
    ids=np.where(text.mask, text.ids, 7),
    states=np.where(text.mask[:, :, None], text.states, 9.0),
  )
  output = run_decoder(config, params, text)
  np.testing.assert_allclose(run_decoder(config, params, padded), output, atol=1e-6)


@DECODERS
def test_decoder_without_z_i_does_not_depend_on_it(config):
  params, text = make_decoder(config), make_text()
  absent = jnp.array([False, True])
  output = run_decoder(config, params, text, has_z_i=absent)
  changed = run_decoder(config, params, text, has_z_i=absent, z_i=normal(2, 16, seed=9))
  np.testing.assert_array_equal(changed[0], output[0])
  assert np.abs(changed - output)[1].max() > 1e-3


def test_a_draft_is_an_image_that_the_unet_is_given():
  params, text = make_decoder(DRAFT), make_text()
  output, draft = predict_both(DRAFT, params, text, **DECODER_INPUTS)
  assert draft.shape == (2, 8, 8, 3)
  z_i = normal(2, 16, seed=9)
  for changed in (
    predict_both(DRAFT, params, text, **DECODER_INPUTS | {'z_i': z_i}),
    predict_both(DRAFT, params, text._replace(ids=text.ids[::-1]), **DECODER_INPUTS),
  ):
    assert (np.abs(changed[1] - draft).max(axis=(1, 2, 3)) > 1e-3).all()
  # A pixel of the draft reaches the output, but no gradient of the output reaches the draft.
  other = {**params, 'draft': jax.tree.map(lambda a: 2 * a, params['draft'])}
  assert np.abs(run_decoder(DRAFT, other, text) - output).max() > 1e-3
  grads = jax.jit(jax.grad(lambda p: run_decoder(DRAFT, p, text).sum()))(params)
  assert all((g == 0).all() for g in jax.tree.leaves(grads['draft']))
  assert np.abs(grads['unet']['conv_condition']['kernel']).max() > 0


def test_decoder_in_bfloat16_is_finite_and_near_float32():
  params, text = make_decoder(TINY.decoder), make_text()
  exact = run_decoder(TINY.decoder, params, text)
  rounded = run_decoder(TINY.decoder, params, text, dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  assert np.isfinite(rounded).all()
  assert 0 < np.abs(rounded - exact).mean() < 0.05 * exact.std()


def test_upsampler_is_convolutional_at_sizes_it_was_not_initialised_at():
  # One level, so that the borders do not reach the middle of 96 pixels.
  config = one_level(UPSAMPLER)
  shapes = jax.eval_shape(lambda key: upsampler.init(config, key), jax.random.key(0))
  params = randomised(shapes)['unet']
  low = np.full((1, 96, 64, 3), -0.5, 'f')
  x = np.broadcast_to(normal(1, 1, 1, 3), low.shape)
  output = run_unet(config.unet, params, x, low, np.array([417]))
  assert output.shape == x.shape
  # Flat inputs give the same everywhere but near the borders, but for the place within a patch.
  middle = output[0, 26:70, 26:38].reshape(22, 2, 6, 2, 3)
  np.testing.assert_allclose(middle, np.broadcast_to(middle[:1, :, :1], middle.shape), atol=1e-5)
  assert output.std() > 0.1


def test_dropout_is_off_unless_asked_for():
  plain = one_level(UPSAMPLER)
  shapes = jax.eval_shape(lambda key: upsampler.init(plain, key), jax.random.key(0))
  params = randomised(shapes)['unet']
  config = dataclasses.replace(plain.unet, dropout=0.5)
  args = (normal(1, 8, 8, 3), normal(1, 8, 8, 3), jnp.array([3]))
  without = run_unet(plain.unet, params, *args)
  np.testing.assert_array_equal(run_unet(config, params, *args), without)
  dropped = [run_unet(config, params, *args, rng=jax.random.key(seed)) for seed in (0, 1)]
  assert np.abs(dropped[0] - dropped[1]).max() > 1e-2


def test_attention_stands_where_the_config_puts_it():
  params = make_decoder(TINY.decoder)['unet']
  layers = sorted(name for name in params if 'attention' in name)
  assert layers == [
    'down_attention_1_0',
    'middle_attention',
    'up_attention_1_0',
    'up_attention_1_1',
  ]
  shapes = jax.eval_shape(lambda key: upsampler.init(UPSAMPLER, key), jax.random.key(0))
  assert not [name for name in shapes['unet'] if 'attention' in name]


def test_convolutional_tower_reads_images_of_its_size():
  tower = ConvTower(widths=(16, 32), depth=1, num_groups=8)
  image = normal(3, 16, 16, 3)
  output, variables = jax.jit(tower.init_with_output)(jax.random.key(0), image)
  assert output.shape == (3, 64)
  other = jax.jit(tower.apply)(variables, image + 0.5)
  assert np.abs(other - output).max() > 1e-3
