"""The autoencoder: sizes, what depends on what, tiles, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.config_json import from_json, to_json
from unclip_jax.configs import AutoencoderConfig
from unclip_jax.nn.autoencoder import Autoencoder
from unclip_jax.stages import autoencoder
from unclip_jax.types import UnclipError

KL = AutoencoderConfig(
  channels=8, multipliers=(1, 2), num_res_blocks=1, latent_channels=5, num_groups=4
)
MOVQ = AutoencoderConfig(
  channels=32,
  multipliers=(1, 2),
  num_res_blocks=1,
  latent_channels=3,
  kind='vq',
  attention_levels=(1,),
  num_groups=8,
  codebook_size=7,
  spatial_norm=True,
)
KINDS = pytest.mark.parametrize('config', [KL, MOVQ], ids=['kl', 'movq'])


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


@functools.cache
def make_params(config):
  return randomised(jax.eval_shape(lambda key: autoencoder.init(config, key), jax.random.key(0)))


encode = jax.jit(autoencoder.encode, static_argnums=0, static_argnames='dtype')
decode = jax.jit(autoencoder.decode, static_argnums=0, static_argnames='dtype')
decode_tiled = jax.jit(autoencoder.decode_tiled, static_argnums=(0, 3, 4), static_argnames='dtype')


@functools.partial(jax.jit, static_argnums=0)
def moments(config, params, image):
  return Autoencoder(config).apply({'params': params}, image, method='moments')


@KINDS
def test_sizes_and_types(config):
  params, image = make_params(config), normal(2, 6, 10, 3)
  latent = encode(config, params, image)
  assert (latent.shape, latent.dtype) == ((2, 3, 5, config.latent_channels), jnp.float32)
  decoded = decode(config, params, latent)
  assert (decoded.shape, decoded.dtype) == (image.shape, jnp.float32)


@KINDS
def test_bfloat16_is_close_to_float32(config):
  params, latent = make_params(config), normal(2, 3, 5, config.latent_channels)
  image = decode(config, params, latent)
  rounded = decode(config, params, latent, dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  assert 0 < (rounded - image).std() < 0.03 * image.std()


def test_config_survives_json():
  assert from_json(AutoencoderConfig, to_json(MOVQ)) == MOVQ


def test_log_variance_is_clipped_and_the_mean_is_not():
  params, image = make_params(KL), normal(2, 6, 10, 3)
  kernel, bias = (1e3 * params['to_latent'][name] for name in ('kernel', 'bias'))
  far = params | {'to_latent': {'kernel': kernel, 'bias': bias}}
  mean, log_var = moments(KL, params, image)
  assert mean.shape == log_var.shape == (2, 3, 5, 5)
  np.testing.assert_allclose(encode(KL, params, image), mean, atol=1e-5)
  far_mean, far_log_var = moments(KL, far, image)
  np.testing.assert_allclose(far_mean, 1e3 * mean, rtol=1e-4, atol=1e-1)
  assert (far_log_var.min(), far_log_var.max()) == (-30, 20)
  np.testing.assert_allclose(far_log_var, np.clip(1e3 * log_var, -30, 20), rtol=1e-4, atol=1e-2)


def test_scaling_is_left_to_the_caller():
  def program(scaling):
    config = dataclasses.replace(KL, scaling=scaling)
    arguments = make_params(KL), normal(1, 6, 10, 3), normal(1, 3, 5, 5)
    return str(
      jax.make_jaxpr(
        lambda params, image, latent: (
          autoencoder.encode(config, params, image),
          autoencoder.decode(config, params, latent),
        )
      )(*arguments)
    )

  assert program(1.0) == program(0.18215)


def test_codebook_has_no_effect():
  params, latent = make_params(MOVQ), normal(2, 3, 5, 3)
  changed = params | {'codebook': params['codebook'] + 1}
  np.testing.assert_array_equal(decode(MOVQ, params, latent), decode(MOVQ, changed, latent))


# --- Tiles.


@KINDS
def test_one_tile_that_covers_the_latent_is_plain_decoding(config):
  params, latent = make_params(config), normal(2, 3, 5, config.latent_channels)
  expected = decode(config, params, latent)
  np.testing.assert_allclose(decode_tiled(config, params, latent, 5, 2), expected, atol=2e-5)


@pytest.mark.parametrize(
  ('size', 'tile', 'overlap'),
  [(7, 3, 0), (7, 3, 1), (8, 3, 2), (12, 5, 2), (13, 5, 4), (9, 4, 3), (5, 5, 1), (6, 1, 0)],
)
def test_tiles_cover_an_axis_and_their_weights_add_up_to_one(size, tile, overlap):
  factor = 4
  starts, weights = autoencoder._tile_axis(size, tile, overlap, factor)
  assert starts[0] == 0
  assert starts[-1] == size - tile
  assert (starts[:-1] + tile - starts[1:] >= overlap).all()
  total = np.zeros(size * factor)
  for start, row in zip(starts, weights, strict=True):
    assert (row > 0).all()
    total[start * factor : (start + tile) * factor] += row
  np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_run_linearly_over_what_two_tiles_share():
  starts, weights = autoencoder._tile_axis(size=8, tile=5, overlap=2, factor=2)
  np.testing.assert_array_equal(starts, [0, 3])
  np.testing.assert_allclose(weights[1], [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1, 1, 1])
  np.testing.assert_allclose(weights[0], weights[1][::-1])


def test_tiles_are_decoded_apart_and_blended():
  params, latent = make_params(KL), normal(2, 3, 8, 5)
  left, right = (decode(KL, params, latent[:, :, start : start + 5]) for start in (0, 3))
  rise = (np.arange(4, dtype='f') + 0.5)[None, None, :, None] / 4
  shared = left[:, :, 6:] * (1 - rise) + right[:, :, :4] * rise
  expected = np.concatenate([left[:, :, :6], shared, right[:, :, 4:]], axis=2)
  image = decode_tiled(KL, params, latent, 5, 2)
  np.testing.assert_allclose(image, expected, atol=2e-5)
  assert np.abs(image - decode(KL, params, latent)).max() > 1e-3, 'tiles are an approximation'


def test_one_program_decodes_every_tile():
  params, latent = make_params(KL), jnp.zeros((1, 9, 9, 5))
  closed = jax.make_jaxpr(lambda p, z: autoencoder.decode_tiled(KL, p, z, 4, 1))(params, latent)
  whole = jax.make_jaxpr(lambda p, z: autoencoder.decode(KL, p, z))(params, latent)
  assert str(closed).count('conv_general_dilated[') == str(whole).count('conv_general_dilated[')


# --- What is refused.


@pytest.mark.parametrize(('tile', 'overlap'), [(0, 0), (-3, 0), (4, 4), (4, 5), (4, -1)])
def test_tiles_that_cannot_be_are_refused(tile, overlap):
  with pytest.raises(UnclipError, match=f'tiles of {tile} with an overlap of {overlap}: take'):
    autoencoder.decode_tiled(KL, make_params(KL), normal(1, 9, 9, 5), tile, overlap)


@pytest.mark.parametrize('shape', [(1, 6, 10, 1), (1, 5, 10, 3), (1, 6, 9, 3)])
def test_images_that_do_not_fit_are_refused(shape):
  with pytest.raises(ValueError, match=r'images \[b, h, w, 3\] with h and w multiples of 2'):
    autoencoder.encode(KL, make_params(KL), normal(*shape))


def test_latents_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r'latents \[b, h, w, 5\], got \(1, 2, 3, 4\)'):
    autoencoder.decode(KL, make_params(KL), normal(1, 2, 3, 4))


def test_kinds_are_kl_and_vq():
  config = dataclasses.replace(KL, kind='vae')
  with pytest.raises(ValueError, match="unknown kind of autoencoder 'vae'"):
    autoencoder.init(config, jax.random.key(0))


def test_an_autoencoder_of_kind_vq_has_no_log_variance():
  with pytest.raises(ValueError, match="kind 'vq' gives no log-variance"):
    moments(MOVQ, make_params(MOVQ), normal(1, 4, 4, 3))


@pytest.mark.parametrize(
  ('config', 'match'),
  [
    (dataclasses.replace(KL, num_groups=3), r'3 groups do not divide channels of \(8, 16\)'),
    (dataclasses.replace(MOVQ, channels=16), r'32 groups do not divide channels of \(16, 32\)'),
  ],
)
def test_groups_that_do_not_divide_the_channels_are_refused(config, match):
  with pytest.raises(ValueError, match=match):
    autoencoder.init(config, jax.random.key(0))
