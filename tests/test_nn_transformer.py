"""The text tower, the prior and the decoder's text encoder: what may depend on what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.configs import DiffusionConfig, PriorConfig, SamplingConfig, TextConfig
from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.clip import ClipNetwork, TextFeatures, TextTower
from unclip_jax.nn.decoder import TextEncoder
from unclip_jax.nn.layers import LayerNorm
from unclip_jax.nn.prior import PriorNetwork
from unclip_jax.nn.transformer import Transformer
from unclip_jax.presets import TINY
from unclip_jax.stages import clip, diffusion_prior

TEXT = TextConfig(vocab_size=50, context_length=9, width=21, depth=2, num_heads=3)
PRIOR = PriorConfig(
  embed_dim=5,
  text_width=7,
  context_length=6,
  width=21,
  depth=3,
  num_heads=3,
  diffusion=DiffusionConfig(prediction='x_0'),
  sampling=SamplingConfig(num_steps=3),
)


def make_prior(seed=0):
  shapes = jax.eval_shape(lambda key: diffusion_prior.init(PRIOR, key), jax.random.key(0))
  return {'params': randomised(shapes, seed)}


def make_text(batch=3, ends=(6, 2, 4)):
  draw = np.random.default_rng(0)
  length = PRIOR.context_length
  return TextFeatures(
    ids=np.zeros((batch, length), np.int32),
    mask=np.arange(length)[None] < np.array(ends)[:batch, None],
    states=draw.normal(size=(batch, length, PRIOR.text_width)).astype('f'),
    z_t=draw.normal(size=(batch, PRIOR.embed_dim)).astype('f'),
  )


def make_z_i_t(batch=3):
  return np.random.default_rng(1).normal(size=(batch, PRIOR.embed_dim)).astype('f')


def test_text_tower_states_do_not_depend_on_later_tokens():
  tower = TextTower(TEXT)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (3, 9)))
  variables = randomised(jax.eval_shape(tower.init, jax.random.key(0), ids))
  states = tower.apply(variables, ids)
  for i in (1, 5, 8):
    changed = tower.apply(variables, ids.at[:, i].set((ids[:, i] + 7) % 50))
    np.testing.assert_array_equal(changed[:, :i], states[:, :i])
    assert (np.abs(changed - states)[:, i:] > 1e-3).any(axis=2).all()


def test_caption_embedding_is_read_at_the_end_token_and_ignores_padding():
  shapes = jax.eval_shape(lambda key: clip.init(TINY.clip, key), jax.random.key(0))
  variables = {'params': randomised(shapes)}
  network = ClipNetwork(TINY.clip)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 12)))
  mask = jnp.arange(12)[None] < jnp.array([[5], [12]])

  def z_t(ids):
    return network.apply(variables, ids, mask, method='encode_text').z_t

  other_padding = z_t(ids.at[0, 5:].set(1))
  np.testing.assert_array_equal(other_padding, z_t(ids))
  assert np.abs(z_t(ids.at[0, 4].add(1)) - z_t(ids))[0].max() > 1e-2
  np.testing.assert_allclose(np.linalg.norm(z_t(ids), axis=1), 1, rtol=1e-6)


def test_decoder_text_encoder_sees_both_ways_and_not_the_ids_of_padding():
  encoder = TextEncoder(TEXT)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
  mask = jnp.arange(9)[None] < jnp.array([[4], [9]])
  variables = randomised(jax.eval_shape(encoder.init, jax.random.key(0), ids, mask))
  states = encoder.apply(variables, ids, mask)
  np.testing.assert_array_equal(encoder.apply(variables, ids.at[0, 4:].set(3), mask), states)
  changed = encoder.apply(variables, ids.at[1, 8].set((ids[1, 8] + 1) % 50), mask)
  assert np.abs(changed - states)[1, 0].max() > 1e-3
  np.testing.assert_array_equal(changed[0], states[0])


@pytest.mark.parametrize('cut', [1, 4, 7])
def test_transformer_continues_from_cached_keys_and_values(cut):
  model = Transformer(width=21, depth=2, num_heads=3)
  x = np.random.default_rng(0).normal(size=(3, 8, 21)).astype('f')
  mask = causal_mask(8, 8)
  variables = randomised(jax.eval_shape(model.init, jax.random.key(0), x, mask))
  whole, whole_keys = model.apply(variables, x, mask)
  first, caches = model.apply(variables, x[:, :cut], mask[:, :, :cut, :cut])
  rest, keys = model.apply(variables, x[:, cut:], mask[:, :, cut:], caches)
  np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), keys, whole_keys)


def uncached_prior(variables, z_i_t, t, text):
  """The whole sequence in one pass, written from the paper's order of it."""
  params = variables['params']

  def dense(name, x):
    y = np.asarray(x) @ params[name]['kernel'] + params[name]['bias']
    return jnp.asarray(y)

  b, length = text.mask.shape
  time = PriorNetwork(PRIOR).apply(variables, t, method='encode_time')
  sequence = [
    dense('text_proj', text.states),
    dense('z_t_proj', text.z_t)[:, None],
    time[:, None],
    dense('z_i_proj', z_i_t)[:, None],
    np.broadcast_to(params['query'], (b, 1, PRIOR.width)),
  ]
  x = jnp.concatenate(sequence, axis=1) + params['positions'][None]
  seen = np.pad(text.mask, ((0, 0), (0, 4)), constant_values=True)
  mask = np.tril(np.ones((length + 4, length + 4), bool))[None] & seen[:, None]
  blocks = Transformer(width=PRIOR.width, depth=PRIOR.depth, num_heads=PRIOR.num_heads)
  x, _ = blocks.apply({'params': params['blocks']}, x, mask[:, None])
  x = LayerNorm().apply({'params': params['norm']}, x[:, -1])
  return dense('out_proj', x)


def test_cached_prior_equals_uncached():
  variables, text, z_i_t = make_prior(), make_text(), make_z_i_t()
  network = PriorNetwork(PRIOR)
  prefix = network.apply(variables, text, method='encode_prefix')
  for t in ([0, 999, 417], [3, 3, 3]):
    t = jnp.array(t)
    time_emb = network.apply(variables, t, method='encode_time')
    cached = network.apply(variables, z_i_t, time_emb, prefix)
    uncached = uncached_prior(variables, z_i_t, t, text)
    np.testing.assert_allclose(cached, uncached, atol=1e-5 * float(uncached.std()))
    whole = network.apply(variables, z_i_t, t, text, method='predict')
    np.testing.assert_allclose(whole, uncached, atol=1e-5 * float(uncached.std()))


def test_prior_prefix_is_causal():
  variables, text = make_prior(), make_text(ends=(6, 6, 6))
  network = PriorNetwork(PRIOR)
  caches = network.apply(variables, text, method='encode_prefix').caches
  states = text.states.copy()
  states[:, 3] += 1
  changed = network.apply(variables, text._replace(states=states), method='encode_prefix').caches
  for (k, v), (changed_k, changed_v) in zip(caches, changed, strict=True):
    np.testing.assert_array_equal(changed_k[:, :3], k[:, :3])
    np.testing.assert_array_equal(changed_v[:, :3], v[:, :3])
    assert np.abs(changed_v - v)[:, 3].max() > 1e-2
  assert np.abs(changed[-1][1] - caches[-1][1])[:, 4:].max() > 1e-3


def test_prior_ignores_padding_and_feels_all_else():
  variables, text, z_i_t = make_prior(), make_text(), make_z_i_t()
  t = jnp.array([5, 50, 500])
  predict = jax.jit(lambda *args: PriorNetwork(PRIOR).apply(variables, *args, method='predict'))
  output = predict(z_i_t, t, text)
  padding = np.where(text.mask[:, :, None], text.states, 9.0)
  np.testing.assert_allclose(predict(z_i_t, t, text._replace(states=padding)), output, atol=1e-6)
  text_longer = text._replace(mask=np.ones_like(text.mask))
  changed = {
    'states': predict(z_i_t, t, text._replace(states=text.states + 1)),
    'z_t': predict(z_i_t, t, text._replace(z_t=text.z_t + 1)),
    'z_i_t': predict(z_i_t + 1, t, text),
    't': predict(z_i_t, t + 300, text),
    'mask': predict(z_i_t, t, text_longer)[1:],
  }
  for name, value in changed.items():
    difference = np.abs(value - output[-len(value) :]).max(axis=1)
    assert (difference > 1e-3).all(), name


def test_prior_in_bfloat16_is_finite_and_near_float32():
  variables, text, z_i_t = make_prior(), make_text(), make_z_i_t()
  args = (z_i_t, jnp.array([0, 417, 999]), text)
  exact = PriorNetwork(PRIOR).apply(variables, *args, method='predict')
  rounded = PriorNetwork(PRIOR, jnp.bfloat16).apply(variables, *args, method='predict')
  assert rounded.dtype == jnp.float32
  assert np.isfinite(rounded).all()
  assert 0 < np.abs(rounded - exact).max() < 0.1 * exact.std()


def test_clip_in_bfloat16_gives_unit_embeddings_near_those_of_float32():
  shapes = jax.eval_shape(lambda key: clip.init(TINY.clip, key), jax.random.key(0))
  params = randomised(shapes)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype('f')
  ids = np.arange(24).reshape(2, 12)
  mask = np.ones((2, 12), bool)
  for encode in (
    lambda dtype: clip.encode_image(TINY.clip, params, image, dtype),
    lambda dtype: clip.encode_text(TINY.clip, params, ids, mask, dtype).z_t,
  ):
    exact, rounded = encode(jnp.float32), encode(jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1, rtol=1e-5)
    assert (exact * rounded).sum(axis=1).min() > 0.99


def test_clip_refuses_images_of_another_size():
  with pytest.raises(ValueError, match=r'16, 16, 3.*\(2, 8, 8, 3\)'):
    clip.encode_image(TINY.clip, {}, np.zeros((2, 8, 8, 3)))


def test_network_widths_need_not_be_the_width_of_an_embedding():
  config = dataclasses.replace(PRIOR, embed_dim=3, text_width=10)
  params = jax.eval_shape(lambda key: diffusion_prior.init(config, key), jax.random.key(0))
  assert params['text_proj']['kernel'].shape == (10, 21)
  assert params['out_proj']['kernel'].shape == (21, 3)


def test_heads_that_do_not_divide_the_width_are_refused():
  blocks = Transformer(width=21, depth=1, num_heads=4)
  with pytest.raises(ValueError, match='4 heads do not divide a width of 21'):
    blocks.init(jax.random.key(0), jnp.zeros((1, 2, 21)))
