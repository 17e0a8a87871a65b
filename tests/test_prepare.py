"""Pictures as CLIP is given them: resized and cut out in one step, as if one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.systems.programs import prepare


def resized_then_cut(image_bhwc: np.ndarray, size: int) -> np.ndarray:
  """The definition, in float64: all of the picture is resized, and the middle is kept."""
  b, *sides, c = image_bhwc.shape
  height, width = (size * side // min(sides) for side in sides)
  with jax.enable_x64(True):
    image = jnp.asarray(image_bhwc, jnp.float64)
    image = jax.image.resize(image, (b, height, width, c), 'cubic', antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return np.clip(np.asarray(image)[:, top : top + size, left : left + size], -1, 1)


@pytest.mark.parametrize('size', [7, 20])
@pytest.mark.parametrize(
  'shape',
  [(20, 20), (37, 53), (53, 37), (9, 31), (20, 31), (21, 20), (3, 5), (400, 90), (1, 2), (2, 61)],
)
def test_it_is_resizing_and_then_cutting(shape, size):
  # Noise: a pixel beside the right one shows.
  image = np.random.default_rng(0).uniform(-1, 1, (2, *shape, 3)).astype(np.float32)
  ours = np.asarray(prepare(image, size))
  assert ours.shape == (2, size, size, 3)
  np.testing.assert_allclose(ours, resized_then_cut(image, size), atol=1e-5)


def test_a_large_picture_is_as_exact():
  image = np.random.default_rng(0).uniform(-1, 1, (1, 480, 640, 3)).astype(np.float32)
  # What float32 says of where a pixel is ends at its fifth digit.
  np.testing.assert_allclose(prepare(image, 224), resized_then_cut(image, 224), atol=5e-5)


@pytest.mark.parametrize('shape', [(1, 4000), (4000, 1), (2, 10**5)])
def test_a_thin_picture_takes_no_more_memory_than_its_middle(shape):
  size, long = 224, max(shape)
  # A ramp along the longer side: resized it is one again, whose middle is known.
  image = np.broadcast_to(np.linspace(-1, 1, long, dtype=np.float32), (min(shape), long))
  image = np.broadcast_to((image if shape[0] < long else image.T)[None, ..., None], (1, *shape, 3))
  compiled = jax.jit(prepare, static_argnums=1).lower(image, size).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 16 * size * size * 3 * 4
  out = np.asarray(prepare(image, size))
  assert out.shape == (1, size, size, 3)
  along = out[0, :, :, 0] if shape[0] < long else out[0, :, :, 0].T
  scale = size / min(shape)
  positions = (np.arange(size) + (int(long * scale) - size) // 2 + 0.5) / scale - 0.5
  # Cubic kernels keep a ramp; steps of one grey level apart, 1e-6 is far from the next pixel.
  np.testing.assert_allclose(along[0], 2 * positions / (long - 1) - 1, atol=2e-5)
  np.testing.assert_allclose(along, np.broadcast_to(along[0], along.shape), atol=1e-6)


def test_levels_of_grey_become_numbers_around_zero():
  levels = np.uint8([[0, 51], [204, 255]])[None, ..., None]
  np.testing.assert_allclose(prepare(levels, 2)[0, ..., 0], [[-1, -0.6], [0.6, 1]], atol=1e-6)
