"""The network of Kandinsky's decoders by itself: types, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.configs import (
  DiffusionConfig,
  KandinskyDecoderConfig,
  SamplingConfig,
  UNetConfig,
)
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.kandinsky import KandinskyDecoderNetwork

B, T = 3, 5


def make_config(**text):
  return KandinskyDecoderConfig(
    image_size=8,
    embed_dim=7,
    unet=UNetConfig(
      in_channels=4,
      out_channels=8,
      channels=6,
      multipliers=(1, 2),
      num_res_blocks=1,
      attention_levels=(1,),
      head_dim=3,
      context_dim=9,
      dropout=0.4,
      num_groups=3,
    ),
    diffusion=DiffusionConfig(learned_variance=True),
    sampling=SamplingConfig(num_steps=5),
    num_image_tokens=2,
    **text,
  )


CONFIGS = {'2.1': make_config(text_width=11, text_embed_dim=13), '2.2': make_config()}


def draw(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype('f')


X_T, TIMES, Z_I = draw(B, 8, 8, 4), np.array([999, 3, 500]), draw(B, 7)
TEXT = TextFeatures(np.zeros((B, T), 'i'), np.ones((B, T), bool), draw(B, T, 11), draw(B, 13))


@functools.cache
def make_variables(config):
  init = functools.partial(
    KandinskyDecoderNetwork(config).init, deterministic=True, method='predict'
  )
  return randomised(jax.eval_shape(init, jax.random.key(0), X_T, TIMES, TEXT, Z_I))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def apply(config, dtype, text, z_i, deterministic=True, key=None):
  rngs = None if key is None else {'dropout': key}
  network, variables = KandinskyDecoderNetwork(config, dtype), make_variables(config)
  return network.apply(variables, X_T, TIMES, text, z_i, deterministic, rngs=rngs, method='predict')


@pytest.mark.parametrize('version', CONFIGS)
def test_bfloat16_is_near_float32(version):
  full, half = (apply(CONFIGS[version], dtype, TEXT, Z_I) for dtype in (jnp.float32, jnp.bfloat16))
  assert full.shape == half.shape == (B, 8, 8, 8)
  assert full.dtype == half.dtype == jnp.float32
  error = np.abs(half - full).max() / np.std(full)
  assert 0 < error < 0.2


def test_captions_are_not_looked_at_in_2_2():
  config = CONFIGS['2.2']
  np.testing.assert_array_equal(
    apply(config, jnp.float32, None, Z_I), apply(config, jnp.float32, TEXT, Z_I)
  )


@pytest.mark.parametrize('version', CONFIGS)
def test_dropout_is_drawn_in_training_alone(version):
  config, outputs = CONFIGS[version], []
  for deterministic, seed in ((True, 0), (False, 0), (False, 0), (False, 1)):
    key = jax.random.key(seed)
    outputs.append(apply(config, jnp.float32, TEXT, Z_I, deterministic, key))
  still, one, again, other = outputs
  np.testing.assert_array_equal(one, again)
  for x, y in ((still, one), (one, other)):
    assert np.abs(x - y).max() > 0.1 * np.std(still)


@pytest.mark.parametrize(
  ('text', 'z_i', 'match'),
  [
    (None, Z_I, "the captions' states and z_t are missing"),
    (TEXT._replace(states=None), Z_I, "the captions' states and z_t are missing"),
    (TEXT._replace(z_t=None), Z_I, "the captions' states and z_t are missing"),
    (TEXT, Z_I[0], r'z_i of shape \(7,\): it must be \[b, 7\]'),
    (TEXT, draw(B, 6), r'z_i of shape \(3, 6\): it must be \[b, 7\]'),
    (TEXT._replace(states=draw(B, T, 10)), Z_I, r'they must be \[3, t, 11\] and \[3, 13\]'),
    (TEXT._replace(states=draw(B, 11)), Z_I, r'states of shape \(3, 11\)'),
    (TEXT._replace(z_t=draw(B, 7)), Z_I, r'z_t of shape \(3, 7\)'),
    (TEXT, draw(2, 7), r'with 2 z_i they must be \[2, t, 11\]'),
  ],
)
def test_prompts_of_other_shapes_are_refused(text, z_i, match):
  with pytest.raises(ValueError, match=match):
    apply(CONFIGS['2.1'], jnp.float32, text, z_i)
