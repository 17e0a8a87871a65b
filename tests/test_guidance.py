"""Guidance acts on the prediction alone, pair by pair; bounds on x_0 are each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import guidance
from unclip_jax.types import UnclipError


def normals(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


def test_pairs_are_interleaved():
  cond = {'z': jnp.arange(3.0), 'mask': jnp.ones((3, 2), bool), 'none': None}
  uncond = {'z': -jnp.arange(3.0) - 10, 'mask': jnp.zeros((3, 2), bool), 'none': None}
  both = guidance.interleave(cond, uncond)
  assert both['z'].tolist() == [0, -10, 1, -11, 2, -12]
  assert both['mask'][:, 0].tolist() == [True, False] * 3
  with pytest.raises(ValueError, match='differ'):
    guidance.interleave(jnp.zeros(3), jnp.zeros(2))


@pytest.mark.parametrize('scale', [0.0, 1.0, 1.25, 8.0, 'per_sample'])
@pytest.mark.parametrize('learned_variance', [False, True])
def test_guidance_leaves_the_variance_alone(scale, learned_variance):
  scale = np.array([0.0, 1.0, 4.0], 'f') if scale == 'per_sample' else scale
  channels = 6 if learned_variance else 3
  cond, uncond = normals(0, (3, 4, 5, channels)), normals(1, (3, 4, 5, channels))
  guided = guidance.guide(guidance.interleave(cond, uncond), scale, learned_variance)
  factor = np.broadcast_to(np.float64(scale), 3).reshape(3, 1, 1, 1)
  expected = cond.astype(np.float64)
  expected[..., :3] = (1 - factor) * uncond[..., :3] + factor * cond[..., :3]
  np.testing.assert_allclose(guided, expected, atol=1e-5)
  assert np.array_equal(guided[..., 3:], cond[..., 3:])


def test_guidance_of_bfloat16_is_computed_in_float32():
  pair = jnp.asarray(normals(0, (2, 8)), jnp.bfloat16)
  guided = guidance.guide(pair, 8.0)
  cond, uncond = np.asarray(pair.astype(jnp.float32))
  assert guided.dtype == jnp.float32
  np.testing.assert_allclose(guided[0], uncond + 8 * (cond - uncond), rtol=1e-6)


def test_the_scale_may_be_traced():
  traces = []

  @jax.jit
  def guide(output, scale):
    traces.append(scale)
    return guidance.guide(output, scale)

  output = normals(0, (4, 6))
  assert not np.allclose(guide(output, 1.0), guide(output, 7.5))
  assert len(traces) == 1


def test_clip():
  assert guidance.clip_x_0(2.0)(jnp.array([-3.0, 0.5, 9.0])).tolist() == [-2, 0.5, 2]


def test_dynamic_threshold_is_each_samples_own():
  x_0 = normals(0, (4, 6, 5, 3)) * np.array([0.1, 1.0, 3.0, 20.0], 'f').reshape(4, 1, 1, 1)
  bounded = np.asarray(guidance.dynamic_threshold(95.0)(x_0))
  for sample, actual in zip(x_0.astype(np.float64), bounded, strict=True):
    s = max(1.0, np.percentile(np.abs(sample), 95.0))
    np.testing.assert_allclose(actual, np.clip(sample, -s, s) / s, atol=1e-6)
  assert np.abs(bounded).max() <= 1
  assert np.array_equal(bounded[0], x_0[0]), 'a sample within [-1, 1] is left as it is'


@pytest.mark.parametrize('percentile', [0.995, 101, -5])
def test_a_fraction_is_not_a_percentile(percentile):
  with pytest.raises(UnclipError, match=str(percentile)):
    guidance.dynamic_threshold(percentile)


@pytest.mark.parametrize('learned_variance', [False, True])
def test_rescaled_guidance_has_the_contrast_of_the_conditional_half(learned_variance):
  channels = 6 if learned_variance else 3
  cond, uncond = normals(0, (2, 8, 8, channels)), normals(1, (2, 8, 8, channels))
  pair = guidance.interleave(cond, uncond)
  plain, half, whole = (
    np.asarray(guidance.guide(pair, 5.0, learned_variance, rescale)) for rescale in (0.0, 0.5, 1.0)
  )
  np.testing.assert_allclose(plain, guidance.guide(pair, 5.0, learned_variance), rtol=1e-6)
  assert np.array_equal(whole[..., 3:], cond[..., 3:])
  for i in range(2):
    assert whole[i, ..., :3].std() == pytest.approx(cond[i, ..., :3].std(), rel=1e-5)
    assert plain[i, ..., :3].std() > 3 * cond[i, ..., :3].std()
  np.testing.assert_allclose(half, (plain + whole) / 2, atol=1e-5)
