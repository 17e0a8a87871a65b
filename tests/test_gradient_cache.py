"""Gradients that are taken part by part are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_stages import CONFIG, make_text, normal, random_params

from unclip_jax.config_json import override
from unclip_jax.stages import clip
from unclip_jax.train.gradient_cache import join_batch, make_cached_grad, split_batch
from unclip_jax.train.state import init_state, make_train_step
from unclip_jax.types import UnclipError

CLIP = override(CONFIG.clip, ['text.depth=1', 'vision.depth=1'])
TEXT = make_text(12)
BATCH = {'image': jnp.tanh(normal(12, 16, 16, 3)), 'ids': TEXT.ids, 'mask': TEXT.mask}
KEY = jax.random.key(3)


def embed(params, batch, key):
  """Both embeddings of CLIP, of pictures that are rolled as far as the key says."""
  image = jnp.roll(batch['image'], jax.random.key_data(key)[1] % 16, axis=1)
  return clip.embed(CLIP, params, image, batch['ids'], batch['mask'])


def loss_of_embeddings(params, embeddings):
  return clip.loss_of_embeddings(params, *embeddings)


def whole_loss(params, batch, keys):
  """The same loss as one expression: of n parts each has every nth row, and a key."""
  parts, num_parts = [], len(keys)
  for i, key in enumerate(keys):
    rows = jax.tree.map(lambda a, i=i: a[i::num_parts], batch)
    parts.append(embed(params, rows, key))
  back = np.argsort(np.concatenate([np.arange(12)[i::num_parts] for i in range(num_parts)]))
  embeddings = [jnp.concatenate(z)[back] for z in zip(*parts, strict=True)]
  return loss_of_embeddings(params, embeddings)


def test_the_gradient_is_that_of_the_whole_batch_keys_included():
  params = random_params(clip, CLIP)
  grad_fn = jax.jit(make_cached_grad(embed, loss_of_embeddings, 6))
  (loss, metrics), gradient = grad_fn(params, BATCH, KEY)
  direct = jax.jit(jax.value_and_grad(whole_loss, has_aux=True))
  keys = [jax.random.fold_in(KEY, i) for i in range(2)]
  (wanted, wanted_metrics), wanted_gradient = direct(params, BATCH, keys)
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  assert metrics.keys() == wanted_metrics.keys()
  for name, value in wanted_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
  assert jax.tree.structure(gradient) == jax.tree.structure(wanted_gradient)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted_gradient)
  assert np.abs(wanted_gradient['log_scale']) > 1e-3
  # Another key gives other pictures: the comparison above could have failed.
  other = grad_fn(params, BATCH, jax.random.key(4))[0][0]
  assert abs(other - wanted) > 1e-3


def wide_embed(params, batch, key):
  del key
  for w in params['layers']:
    batch = jnp.tanh(batch @ w[0]) @ w[1]
  return batch


def wide_loss(params, z):
  """No mean over examples: what all have in common counts."""
  del params
  return jnp.var(z, axis=0).sum(), {}


def test_a_train_step_takes_it_in_the_place_of_the_plain_gradient():
  params = {'layers': [(0.3 * normal(4, 8), 0.3 * normal(8, 4, seed=1))]}
  x = normal(12, 4)

  def whole(params, batch, key):
    return wide_loss(params, wide_embed(params, batch, key))

  optimizer = optax.sgd(0.1)
  steps = (
    make_train_step(whole, optimizer, 0.9),
    make_train_step(None, optimizer, 0.9, grad_fn=make_cached_grad(wide_embed, wide_loss, 3)),
    make_train_step(None, optimizer, 0.9, grad_fn=make_cached_grad(wide_embed, wide_loss, 4, True)),
  )
  ends = []
  for step in steps:
    state, losses = init_state(params, optimizer), []
    for _ in range(3):
      state, metrics = jax.jit(step)(state, x, KEY)
      losses.append(float(metrics['loss']))
    assert losses[2] < losses[0] - 1e-3
    ends.append((state, losses))
  for end in ends[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), end, ends[0])


def test_memory_is_that_of_one_part():
  params = {'layers': [(0.1 * normal(8, 512), 0.1 * normal(512, 8, seed=1))] * 3}
  x = jax.ShapeDtypeStruct((512, 8), jnp.float32)

  def bytes_held(grad_fn):
    return jax.jit(grad_fn).lower(params, x, KEY).compile().memory_analysis().temp_size_in_bytes

  def whole(params, batch, key):
    return wide_loss(params, wide_embed(params, batch, key))

  direct = bytes_held(jax.value_and_grad(whole, has_aux=True))
  cached = bytes_held(make_cached_grad(wide_embed, wide_loss, 32))
  assert direct > 3 * 512 * 512 * 4  # the hidden layers of all examples
  assert cached < direct / 2


def test_parts_are_the_rows_one_by_one_in_turn():
  batch = {'x': jnp.arange(12), 'y': jnp.arange(24.0).reshape(12, 2)}
  parts = split_batch(batch, 4, 'a test')
  np.testing.assert_array_equal(parts['x'], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
  jax.tree.map(np.testing.assert_array_equal, join_batch(parts), batch)


@pytest.mark.parametrize('size', [5, 0, 24])
def test_parts_that_do_not_divide_the_batch_are_refused(size):
  grad_fn = make_cached_grad(wide_embed, wide_loss, size)
  with pytest.raises(UnclipError, match=f'gradient cache: a batch of 12 .* parts of {size}: take'):
    grad_fn({}, normal(12, 4), KEY)
