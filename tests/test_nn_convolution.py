"""The 3x3 convolution against flax's own, and against float64."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.nn import convolution
from unclip_jax.nn.convolution import MIN_CHANNELS, Conv3x3

WIDE = MIN_CHANNELS + 3


def make(c, features, shape=(2, 6, 8), seed=0):
  key_x, key_k, key_b = jax.random.split(jax.random.key(seed), 3)
  x = jax.random.normal(key_x, (*shape, c))
  params = {
    'kernel': jax.random.normal(key_k, (3, 3, c, features)) / (9 * c) ** 0.5,
    'bias': jax.random.normal(key_b, (features,)),
  }
  return x, {'params': params}


# Of tiles of 4 and of 2, and of none.
@pytest.mark.parametrize(
  'shape', [(40, 6, 9), (1, 61, 35), (2048, 1, 1), (1, 2, 1027), (5, 7, 9), (256, 1, 1), (2, 6, 8)]
)
@pytest.mark.parametrize(('c', 'features'), [(WIDE, WIDE + 2), (3, WIDE), (WIDE, 3), (5, 7)])
def test_it_is_flaxs_convolution(shape, c, features):
  x, variables = make(c, features, shape)
  expected = nn.Conv(features, (3, 3)).apply(variables, x)
  actual = jax.jit(Conv3x3(features).apply)(variables, x)
  np.testing.assert_allclose(actual, expected, atol=5e-5)


def test_its_parameters_are_those_of_flax():
  x, _ = make(5, 7)
  ours, theirs = (m.init(jax.random.key(1), x) for m in (Conv3x3(7), nn.Conv(7, (3, 3))))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(('tile', 'most'), [(2, 2.0), (4, 6.0)])
def test_the_error_of_winograd_is_near_that_of_a_direct_convolution(tile, most):
  x, variables = make(256, 256, (1, 16, 16))
  kernel = variables['params']['kernel']
  with jax.enable_x64(True):
    exact = np.asarray(
      convolution.direct(*(jnp.asarray(np.asarray(a), jnp.float64) for a in (x, kernel)))
    )

  def error(conv):
    return np.sqrt(((np.asarray(jax.jit(conv)(x, kernel)) - exact) ** 2).mean())

  assert exact.std() > 0.9
  tiled = error(lambda x, kernel: convolution.winograd(x, kernel, tile))
  assert 1e-8 < tiled < most * error(convolution.direct)


def lowered(x, dtype=jnp.float32, deterministic=True):
  _, variables = make(x.shape[-1], WIDE)
  layer = Conv3x3(WIDE, dtype=dtype)
  apply = jax.jit(lambda variables, x: layer.apply(variables, x, deterministic))
  return apply.lower(variables, x).as_text()


@pytest.mark.cpu_program
def test_only_float32_of_wide_layers_and_enough_pixels_goes_by_winograd():
  wide = jnp.zeros((1, 32, 32, WIDE))
  assert 'dot_general' in lowered(wide) and 'convolution' not in lowered(wide)
  for other in (
    lowered(wide, jnp.bfloat16),
    lowered(wide, deterministic=False),
    lowered(jnp.zeros((1, 32, 32, MIN_CHANNELS - 1))),
    lowered(jnp.zeros((1, 15, 17, WIDE))),
  ):
    assert 'stablehlo.convolution' in other and 'dot_general' not in other


def test_other_platforms_keep_their_convolution():
  _, variables = make(WIDE, WIDE)
  exported = jax.export.export(jax.jit(Conv3x3(WIDE).apply), platforms=['cuda'])
  text = exported(variables, jnp.zeros((1, 32, 32, WIDE))).mlir_module()
  assert 'stablehlo.convolution' in text and 'dot_general' not in text


def test_a_loop_keeps_no_transformed_kernels():
  x, variables = make(WIDE, WIDE, (1, 32, 32))
  layer = Conv3x3(WIDE)

  @jax.jit
  def loop(variables, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(layer.apply(variables, x)), None), x, None, 5)[0]

  text = loop.lower(variables, x).compile().as_text()
  carried = re.search(r'%while[.\w]* = \((.*?)\) while', text).group(1)
  assert f'f32[3,3,{WIDE},{WIDE}]' in carried
  assert not re.search(rf'f32\[(16|36|4,4|6,6),{WIDE},{WIDE}\]', carried)


def test_gradients_flow_through_it():
  x, variables = make(WIDE, WIDE, (1, 65, 32))

  def gradient(module):
    return jax.grad(lambda x, v: (module.apply(v, x) ** 2).mean(), (0, 1))(x, variables)

  ours, theirs = gradient(Conv3x3(WIDE)), gradient(nn.Conv(WIDE, (3, 3)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, theirs)


def test_transformed_kernels_are_in_memory_one_at_a_time():
  x, variables = make(WIDE, WIDE, (1, 32, 32))
  layer = Conv3x3(WIDE)

  def temporaries(depth):
    def deep(x, variables):
      for each in variables:
        x = jnp.tanh(layer.apply(each, x))
      return x

    memory = jax.jit(deep).lower(x, [variables] * depth).compile().memory_analysis()
    return memory.temp_size_in_bytes

  # One more is 16/9 of a kernel at least.
  assert temporaries(6) - temporaries(3) < variables['params']['kernel'].nbytes


@pytest.mark.cpu_program
def test_a_nan_in_the_kernel_shows():
  x, variables = make(WIDE, WIDE, (1, 32, 32))
  kernel = variables['params']['kernel'].at[0, 0, 0, 0].set(jnp.nan)
  out = Conv3x3(WIDE).apply({'params': {**variables['params'], 'kernel': kernel}}, x)
  assert jnp.isnan(out).all()
