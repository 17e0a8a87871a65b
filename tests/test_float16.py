"""float16, for GPUs without bfloat16: near float32, its norms and logits safe, overflow named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from tiny_model import TEXTS, load_tiny, write_tiny_model

from unclip_jax import UnclipError, load
from unclip_jax.nn.attention import attend
from unclip_jax.nn.layers import GroupNorm, LayerNorm

EPS = 2.0**-11  # half a unit in the last place, relative
MOST = 65504.0  # the largest number


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'), dtype='float16')


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_samples_are_finite_and_near_those_of_float32(model, tmp_path):
  """A few roundings a layer, tens of layers, 4 steps: tens of units, and each stage adds its own.

  bfloat16, which rounds 8 times as coarsely, is beyond these bounds.
  """
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model.params['decoder'])}
  assert dtypes == {'float16'}
  assert model.params['prior']['statistics']['std'].dtype == np.float32
  half = model.sample(TEXTS[:2], 7)
  full = load(write_tiny_model(tmp_path)).sample(TEXTS[:2], 7)
  for mine, exact, units in (
    (half.z_t, full.z_t, 4),
    (half.z_i, full.z_i, 8),
    (half.stage_images[0], full.stage_images[0], 32),
    (half.stage_images[1], full.stage_images[1], 32),
  ):
    assert mine.dtype == np.float32
    error = np.sqrt(((mine - exact) ** 2).mean()) / exact.std()
    assert 0 < error < units * EPS
  # The noise that stages begin from, and so the schedule's tables, are of float32.
  np.testing.assert_array_equal(half.start_noise.decoder, full.start_noise.decoder)


def test_norms_are_of_float32():
  """Squares of these numbers, and their sum over a group, are beyond float16."""
  x = 3000 * normal(2, 5, 5, 8)
  x_16 = x.astype(np.float16)
  assert (x_16.astype(np.float64) ** 2).max() > MOST
  for norm, axes in ((GroupNorm(2, dtype=jnp.float16), None), (LayerNorm(dtype=jnp.float16), -1)):
    params = norm.init(jax.random.key(0), x_16)
    out = np.asarray(norm.apply(params, x_16), np.float64)
    exact = x_16.astype(np.float64)
    if axes is None:
      exact = exact.reshape(2, 25, 2, 4).transpose(0, 2, 1, 3).reshape(4, -1)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    if axes is None:
      exact = exact.reshape(2, 2, 25, 4).transpose(0, 2, 1, 3).reshape(out.shape)
    np.testing.assert_allclose(out, exact, rtol=2 * EPS, atol=1e-4)


def test_logits_beyond_float16_are_no_infinities():
  q, k, v = (normal(2, 5, 3, 16, seed=i) for i in range(3))
  q, k = (300 * x for x in (q, k))
  half = [x.astype(np.float16) for x in (q, k, v)]
  logits = np.einsum('btnh,bsnh->bnts', *(x.astype(np.float64) for x in half[:2]))
  assert np.abs(logits).max() > MOST
  logits /= 4
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('bnts,bsnh->btnh', weights, half[2].astype(np.float64))
  out = jax.jit(attend)(*half)
  assert out.dtype == np.float16
  np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=4 * EPS, atol=4 * EPS)
  masked = jax.jit(attend)(*half, np.tril(np.ones((1, 1, 5, 5), bool)))
  np.testing.assert_array_equal(masked[:, 0], half[2][:, 0])


@pytest.mark.parametrize('platform', ['cuda', 'rocm', 'tpu'])
def test_attention_is_lowered_for_accelerators_too(platform):
  x = jax.ShapeDtypeStruct((2, 5, 3, 16), jnp.float16)
  program = export.export(jax.jit(attend), platforms=[platform])(x, x, x).mlir_module()
  is_upcast = 'tensor<2x5x3x16xf16>) -> tensor<2x5x3x16xf32>' in program
  assert is_upcast == (platform == 'tpu')


def test_an_overflow_on_the_way_names_its_stage(model):
  """Kernels that float16 can hold, whose products it cannot; float32 has no difficulty."""

  def enlarge(path, leaf):
    last = jax.tree_util.keystr(path)
    return leaf * 3e4 if 'conv_in' in last and 'kernel' in last else leaf

  network = jax.tree_util.tree_map_with_path(enlarge, model.params['decoder'])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(network))
  broken = dataclasses.replace(model, params={**model.params, 'decoder': network})
  with pytest.raises(UnclipError, match=r'the decoder made a NaN .* take the dtype float32'):
    broken.generate(TEXTS[0], size=16)
  exact = jax.tree.map(lambda leaf: leaf.astype(np.float32), broken.params)
  in_full = dataclasses.replace(broken, params=exact, dtype=jnp.dtype('float32'))
  assert in_full.generate(TEXTS[0], size=16).shape == (1, 16, 16, 3)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
  from safetensors import numpy as safetensors

  path = write_tiny_model(tmp_path) / 'decoder.safetensors'
  tensors = safetensors.load_file(path)
  name = next(name for name in tensors if name.endswith('kernel'))
  tensors[name] = tensors[name] + np.float32(1e5)
  safetensors.save_file(tensors, path)
  with pytest.raises(UnclipError, match=f'{name} holds a NaN or an infinity as float16'):
    load(tmp_path, dtype='float16')
  assert load(tmp_path, dtype='bfloat16').dtype == jnp.bfloat16
