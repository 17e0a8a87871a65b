"""SAM in groups against loops over the groups, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import CONFIG, make_text, normal, random_params

from unclip_jax.config_json import override
from unclip_jax.stages import clip
from unclip_jax.train.sam import make_sam_grad
from unclip_jax.types import UnclipError

KEY = jax.random.key(3)
A = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
B = np.random.default_rng(1).normal(size=12).astype(np.float32)


def squares(params, batch, key):
  """The loss of each example, of which the loss is the mean: no contrast."""
  del key
  return ((batch['a'] * params['w'][None]).sum(axis=1) - batch['b']) ** 2


def mean(params, losses):
  del params
  return losses.mean(), {'largest': losses.max()}


@pytest.mark.parametrize('group_size', [12, 4, 1])
@pytest.mark.parametrize('unroll', [False, True])
def test_of_least_squares_it_is_the_mean_over_groups_of_each_ones_own(group_size, unroll):
  w, rho, n = np.linspace(-1, 1, 5), 0.7, 12 // group_size
  gradients = []
  for rows in np.split(np.arange(12), n):
    a, b = A[rows].astype(np.float64), B[rows].astype(np.float64)
    g = 2 * a.T @ (a @ w - b) / group_size
    there = w + rho * g / np.linalg.norm(g)
    gradients.append(2 * a.T @ (a @ there - b) / group_size)
  grad_fn = jax.jit(make_sam_grad(squares, mean, rho, group_size, unroll))
  (loss, metrics), gradient = grad_fn({'w': jnp.float32(w)}, {'a': A, 'b': B}, KEY)
  np.testing.assert_allclose(gradient['w'], np.mean(gradients, axis=0), rtol=1e-5)
  errors = (A.astype(np.float64) @ w - B) ** 2
  np.testing.assert_allclose(loss, errors.mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['largest'], errors.max(), rtol=1e-5)
  plain = 2 * A.T @ (A @ w - B) / 12
  assert np.abs(gradient['w'] - plain).max() > 0.1
  still = jax.jit(make_sam_grad(squares, mean, 0.0, group_size, unroll))
  gradient = still({'w': jnp.float32(w)}, {'a': A, 'b': B}, KEY)[1]
  np.testing.assert_allclose(gradient['w'], plain, rtol=1e-5)


def test_a_group_at_its_minimum_stays_there():
  batch = {'a': A[:4], 'b': jnp.zeros(4)}
  params = {'w': jnp.zeros(5)}
  gradient = make_sam_grad(squares, mean, 0.5, 2)(params, batch, KEY)[1]
  np.testing.assert_array_equal(gradient['w'], 0)


CLIP = override(CONFIG.clip, ['text.depth=1', 'vision.depth=1'])
TEXT = make_text(12)
BATCH = {'image': jnp.tanh(normal(12, 16, 16, 3)), 'ids': TEXT.ids, 'mask': TEXT.mask}


def embed(params, batch, key, dtype=jnp.float32):
  image = jnp.roll(batch['image'], jax.random.key_data(key)[1] % 16, axis=1)
  return clip.embed(CLIP, params, image, batch['ids'], batch['mask'], dtype)


def loss_of_embeddings(params, embeddings):
  return clip.loss_of_embeddings(params, *embeddings)


def test_of_clip_it_is_the_gradient_at_the_perturbed_parameters_of_each_group():
  """The oracle gives each group parameters of its own, and differentiates by all of them."""
  params, rho, n = random_params(clip, CLIP), 0.5, 2
  keys = [jax.random.fold_in(KEY, i) for i in range(n)]

  def loss_of_copies(copies, temperature):
    parts = [
      embed(copy, jax.tree.map(lambda a, i=i: a[6 * i : 6 * i + 6], BATCH), keys[i])
      for i, copy in enumerate(copies)
    ]
    embeddings = [jnp.concatenate(z) for z in zip(*parts, strict=True)]
    return clip.contrastive_loss(*embeddings, temperature)[0]

  grad_of_copies = jax.jit(jax.value_and_grad(loss_of_copies, (0, 1)))
  loss, (shares, _) = grad_of_copies([params] * n, params['log_scale'])
  perturbed = []
  for share in shares:
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(share)))
    perturbed.append(
      jax.tree.map(lambda p, g, norm=norm: p + np.float32(rho / norm) * g, params, share)
    )
  _, (parts, of_temperature) = grad_of_copies(perturbed, params['log_scale'])
  wanted = dict(functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), parts))
  assert not np.any(wanted['log_scale'])
  wanted['log_scale'] = of_temperature

  grad_fn = jax.jit(make_sam_grad(embed, loss_of_embeddings, rho, 6))
  (found_loss, metrics), found = grad_fn(params, BATCH, KEY)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
  assert set(metrics) == {'accuracy', 'scale'}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)
  plain = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), shares)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, dict(plain))
  assert max(jax.tree.leaves(moved)) > 1e-2, 'the perturbation does nothing'


def norm(tree):
  return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))


def test_in_bfloat16_it_is_that_of_float32_to_rounding():
  """A rounding is of up to 2^-9; a hundred in a row, forward and back, add up to some 2%.

  Without the perturbation, or with its sign wrong, it would be off by most of its length.
  """
  params, half = random_params(clip, CLIP), jnp.bfloat16
  exact = jax.jit(make_sam_grad(embed, loss_of_embeddings, 0.5, 6))(params, BATCH, KEY)[1]
  plain = jax.jit(make_sam_grad(embed, loss_of_embeddings, 0.0, 6))(params, BATCH, KEY)[1]
  embed_half = functools.partial(embed, dtype=half)
  grad_fn = jax.jit(make_sam_grad(embed_half, loss_of_embeddings, 0.5, 6, dtype=half))
  found = grad_fn(params, BATCH, KEY)[1]
  error, moved = (norm(jax.tree.map(np.subtract, g, exact)) / norm(exact) for g in (found, plain))
  assert 1e-4 < error < 0.1  # it is rounded, and to nothing else
  assert moved > 0.5


def test_what_makes_no_sense_is_refused():
  with pytest.raises(UnclipError, match=r'SAM: a perturbation of length -0\.1'):
    make_sam_grad(squares, mean, -0.1)
  grad_fn = make_sam_grad(squares, mean, 0.1, 64)
  with pytest.raises(UnclipError, match='SAM: a batch of 12 cannot be split into parts of 64'):
    grad_fn({'w': jnp.zeros(5)}, {'a': A, 'b': B}, KEY)
