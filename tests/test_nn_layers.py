"""The small layers against numpy in float64."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.nn import attention, layers
from unclip_jax.nn.attention import attend, causal_mask


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


@pytest.mark.parametrize('offset', [0.0, 300.0])
def test_group_norm_equals_numpy_also_far_from_zero(offset):
  x = normal(3, 5, 7, 12) + np.float32(offset)
  scale, bias = normal(12, seed=1), normal(12, seed=2)
  x_64 = x.astype(np.float64).reshape(3, 5, 7, 4, 3)
  mean = x_64.mean(axis=(1, 2, 4), keepdims=True)
  var = x_64.var(axis=(1, 2, 4), keepdims=True)
  expected = ((x_64 - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias
  params = {'params': {'scale': scale, 'bias': bias}}
  actual = layers.GroupNorm(num_groups=4).apply(params, x)
  np.testing.assert_allclose(actual, expected, atol=1e-5 if offset == 0 else 1e-3)


def test_group_norm_of_bfloat16_is_computed_in_float32():
  x = (normal(2, 4, 4, 6) + 30).astype(jnp.bfloat16)
  params = {'params': {'scale': jnp.ones(6), 'bias': jnp.zeros(6)}}
  exact = layers.GroupNorm(num_groups=3).apply(params, x.astype(jnp.float32))
  actual = layers.GroupNorm(num_groups=3, dtype=jnp.bfloat16).apply(params, x)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_layer_norm_equals_numpy():
  x, scale, bias = normal(3, 5, 11) + 40, normal(11, seed=1), normal(11, seed=2)
  x_64 = x.astype(np.float64)
  centred = x_64 - x_64.mean(axis=-1, keepdims=True)
  expected = centred / np.sqrt(x_64.var(axis=-1, keepdims=True) + 1e-5) * scale + bias
  params = {'params': {'norm': {'scale': scale, 'bias': bias}}}
  np.testing.assert_allclose(layers.LayerNorm().apply(params, x), expected, atol=1e-4)


def test_timestep_embedding_is_cosines_then_sines_and_pads_an_odd_size():
  t = np.array([0, 1, 417, 999])
  frequencies = 1e4 ** (-np.arange(6) / 6)
  angles = t[:, None] * frequencies[None]
  expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((4, 1))], axis=1)
  np.testing.assert_allclose(layers.timestep_embedding(jnp.asarray(t), 13), expected, atol=2e-4)


def test_space_to_depth_puts_a_patch_into_channels_row_by_row_and_back():
  x = normal(2, 6, 9, 5)
  folded = layers.space_to_depth(x, 3)
  assert folded.shape == (2, 2, 3, 45)
  np.testing.assert_array_equal(folded[1, 1, 2], x[1, 3:6, 6:9].reshape(-1))
  np.testing.assert_array_equal(layers.depth_to_space(folded, 3), x)


def test_resampling_repeats_and_averages_pixels():
  x = normal(2, 4, 6, 3)
  repeated = x.repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_array_equal(layers.upsample_nearest(x), repeated)
  np.testing.assert_allclose(layers.downsample_mean(repeated), x, rtol=1e-6)
  mean = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
  np.testing.assert_allclose(layers.downsample_mean(x), mean, atol=1e-6)


def test_l2_normalize_gives_unit_norm_in_float32_and_keeps_zero():
  x = np.stack([normal(7), 1e-3 * normal(7), 0 * normal(7)])
  norms = np.linalg.norm(layers.l2_normalize(x.astype(jnp.bfloat16)), axis=1)
  np.testing.assert_allclose(norms, [1, 1, 0], atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'formula'),
  [
    ('quick_gelu', lambda x: x / (1 + np.exp(-1.702 * x))),
    ('silu', lambda x: x / (1 + np.exp(-x))),
  ],
)
def test_activation_is_the_formula_of_its_name(name, formula):
  x = normal(50)
  np.testing.assert_allclose(layers.activation(name)(x), formula(x), atol=1e-6)


def test_gelu_is_the_exact_one():
  # x Phi(x) at 1; the approximation by tanh gives 0.841192.
  np.testing.assert_allclose(layers.activation('gelu')(jnp.ones(1)), [0.8413447], atol=1e-6)


def test_unknown_activation_names_those_that_exist():
  with pytest.raises(ValueError, match=r"'relu'.*quick_gelu"):
    layers.activation('relu')


def test_attention_equals_numpy_with_any_mask():
  q, k, v = normal(3, 4, 5, 7), normal(3, 6, 5, 7, seed=1), normal(3, 6, 5, 7, seed=2)
  mask = np.random.default_rng(3).random((3, 1, 4, 6)) < 0.6
  mask[..., 0] = True
  for used in (None, mask, mask[:1], mask[:, :, :1]):
    logits = np.einsum('btnh,bsnh->bnts', q, k) / 7**0.5
    if used is not None:
      logits = np.where(used, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum('bnts,bsnh->btnh', weights, v)
    np.testing.assert_allclose(attend(q, k, v, used), expected, atol=1e-5)


def masks_of(b, t, s):
  rng = np.random.default_rng(2)
  some = rng.random((b, 1, t, s)) < 0.5
  return None, some | (np.arange(s) == 0), rng.random((b, 1, 1, s)) < 0.9


@pytest.mark.parametrize('mask', masks_of(2, 3, 7))
def test_attention_of_few_queries_by_sums_is_that_by_products(mask):
  q, k, v = normal(2, 3, 4, 8), normal(2, 7, 4, 8, seed=1), normal(2, 7, 4, 8, seed=3)
  mask = None if mask is None else np.broadcast_to(mask, (2, 1, 3, 7))
  expected = attend(q, k, v, mask)
  np.testing.assert_allclose(attention._by_sums(q, k, v, mask), expected, atol=1e-6)


@pytest.mark.parametrize('mask', masks_of(2, 5, 7))
def test_cudnn_is_given_even_numbers_of_queries_and_keys_and_changes_nothing(monkeypatch, mask):
  """What its gradients need; here XLA computes in its place."""
  q, k, v = normal(2, 5, 4, 8), normal(2, 7, 4, 8, seed=1), normal(2, 7, 4, 8, seed=3)
  mask = None if mask is None else np.broadcast_to(mask, (2, 1, 5, 7))
  expected = attend(q, k, v, mask)
  own, asked = jax.nn.dot_product_attention, []

  def in_its_place(q, k, v, *, mask, implementation):
    asked.append((implementation, q.shape[1], k.shape[1], v.shape[1]))
    return own(q, k, v, mask=mask)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', in_its_place)
  np.testing.assert_allclose(attention._cudnn(q, k, v, mask), expected, atol=1e-6)
  assert asked == [('cudnn', 8, 8, 8)]


def test_what_nvidias_gpus_compute_attention_by(monkeypatch):
  """Shapes of Karlo: the prior's three positions, a U-Net's pixels, CLIP's tokens."""
  device = types.SimpleNamespace(compute_capability='9.0')
  monkeypatch.setattr(jax, 'devices', lambda: [device])

  def chosen(t, s, head_dim, dtype):
    q, k = jnp.zeros((2, t, 4, head_dim), dtype), jnp.zeros((2, s, 4, head_dim), dtype)
    return attention._choose_on_cuda(q, k)

  assert chosen(3, 81, 64, jnp.bfloat16) is attention._by_sums
  assert chosen(1024, 1105, 64, jnp.bfloat16) is attention._cudnn
  assert chosen(1024, 1105, 64, jnp.float32) is attention._attend
  assert chosen(1024, 1105, 36, jnp.bfloat16) is attention._attend
  assert chosen(77, 77, 64, jnp.float16) is attention._attend
  device.compute_capability = '7.5'
  assert chosen(1024, 1105, 64, jnp.bfloat16) is attention._attend


# Without such a GPU JAX cannot trace the call; what is given to it is tested above, everywhere.
@pytest.mark.skipif(not attention._has_cuda(), reason='cuDNN runs on GPUs of NVIDIA alone')
@pytest.mark.parametrize('mask', masks_of(2, 257, 301))
def test_cudnn_equals_float32_to_16_bits(mask):
  """Also its gradients."""
  q, k, v = normal(2, 257, 4, 64), normal(2, 301, 4, 64, seed=1), normal(2, 301, 4, 64, seed=3)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  full = [x.astype(jnp.float32) for x in half]

  def both(*operands):
    return jax.value_and_grad(lambda *o: attend(*o, mask).astype(jnp.float32).sum(), (0, 1, 2))(
      *operands
    )

  for ours, exact in zip(jax.tree.leaves(both(*half)), jax.tree.leaves(both(*full)), strict=True):
    error = jnp.linalg.norm((ours.astype(jnp.float32) - exact).ravel())
    assert error < 0.02 * jnp.linalg.norm(exact.ravel())


def test_causal_mask_lets_the_last_positions_see_all_before_them():
  expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
  np.testing.assert_array_equal(causal_mask(3, 5)[0, 0], np.array(expected, bool))


def test_gradient_of_attention_is_finite_where_masked():
  q, k, v = normal(1, 2, 1, 4), normal(1, 3, 1, 4, seed=1), normal(1, 3, 1, 4, seed=2)
  mask = jnp.array([True, True, False])[None, None, None]
  grads = jax.grad(lambda *qkv: attend(*qkv, mask).sum(), argnums=(0, 1, 2))(q, k, v)
  assert all(np.isfinite(g).all() for g in grads)
  np.testing.assert_array_equal(grads[2][0, 2], 0)
