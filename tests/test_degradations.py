import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from unclip_jax.data import degradations
from unclip_jax.data.degradations import area_downsample, bsr_degrade, gaussian_blur


def _noise(shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(('kernel_size', 'sigma', 'radius'), [(3, 0.6, 1), (7, 1.3, 3)])
def test_blur_agrees_with_scipy(kernel_size, sigma, radius):
  image_bhwc = _noise((2, 9, 12, 3))
  expected = scipy.ndimage.gaussian_filter(
    image_bhwc.astype(np.float64), sigma, mode='mirror', radius=radius, axes=(1, 2)
  )
  np.testing.assert_allclose(gaussian_blur(image_bhwc, kernel_size, sigma), expected, atol=2e-6)


def test_blur_default_is_the_papers():
  image_bhwc = np.zeros((1, 5, 5, 1), np.float32)
  image_bhwc[0, 2, 2, 0] = 1
  weights = np.exp(-np.array([1, 0, 1]) / (2 * 0.6**2))
  weights /= weights.sum()
  blurred = gaussian_blur(image_bhwc)[0, 1:4, 1:4, 0]
  np.testing.assert_allclose(blurred, np.outer(weights, weights), rtol=1e-5)


def test_blur_takes_a_traced_sigma_and_keeps_the_type():
  image_bhwc = jnp.asarray(_noise((1, 8, 8, 3)), jnp.bfloat16)
  blurred = jax.jit(lambda sigma: gaussian_blur(image_bhwc, 3, sigma))(0.6)
  assert blurred.dtype == jnp.bfloat16
  with pytest.raises(ValueError, match='odd'):
    gaussian_blur(image_bhwc, 4)


def test_area_downsample_agrees_with_pillow():
  image_bhwc = _noise((1, 12, 20, 3))
  for channel in range(3):
    plane = Image.fromarray(image_bhwc[0, :, :, channel])
    expected = np.asarray(plane.resize((5, 3), Image.Resampling.BOX))
    np.testing.assert_allclose(
      area_downsample(image_bhwc, 4)[0, :, :, channel], expected, atol=1e-6
    )
  with pytest.raises(ValueError, match='multiple'):
    area_downsample(image_bhwc, 8)


def _picture(size=96):
  y, x = np.mgrid[:size, :size] / size
  disk = (x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.08
  return np.stack([np.where(disk, 220, 40), 255 * x, 255 * y], axis=-1).astype(np.uint8)


def test_bsr_depends_on_its_seed_alone():
  image = _picture()
  first = bsr_degrade(image, 4, (3, 14))
  np.testing.assert_array_equal(first, bsr_degrade(image, 4, (3, 14)))
  assert first.shape == (24, 24, 3)
  assert first.dtype == np.uint8
  assert (first != bsr_degrade(image, 4, (3, 15))).any()
  with pytest.raises(ValueError, match='multiple'):
    bsr_degrade(image, 5, 0)


def test_bsr_varies():
  image = _picture()
  clean = image.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3))
  degraded = np.stack([bsr_degrade(image, 4, seed) for seed in range(60)]).astype(np.float64)
  error = np.sqrt(((degraded - clean) ** 2).mean(axis=(1, 2, 3)))
  assert error.max() > 1.5 * error.min()


def test_bsr_shifts_nothing():
  y, x = np.mgrid[:96, :96] - 47.5
  disk = np.where(x**2 + y**2 < 400, 230, 20)
  image = np.repeat(disk[..., None], 3, axis=2).astype(np.uint8)
  degraded = np.mean([bsr_degrade(image, 4, seed) for seed in range(150)], axis=(0, 3)) - 20
  place = np.arange(24) - 11.5
  for axis in (0, 1):
    centre = (degraded.sum(axis) * place).sum() / degraded.sum()
    assert abs(centre) < 0.1  # pixels of the small picture


def test_bsr_keeps_the_colour_of_a_plain_picture():
  plain = np.full((64, 64, 3), (200, 120, 40), np.uint8)
  mean = np.mean([bsr_degrade(plain, 4, seed).mean(axis=(0, 1)) for seed in range(40)], axis=0)
  np.testing.assert_allclose(mean, (200, 120, 40), atol=4)


STEPS = ('_random_blur', '_random_resize', '_gaussian_noise', '_sensor_noise', '_jpeg')


def test_bsr_takes_its_steps_in_an_order_of_the_seed(monkeypatch):
  taken = []

  def record(name):
    step = getattr(degradations, name)

    def run(rng, image, *args):
      taken.append(name)
      return step(rng, image, *args)

    return run

  for name in STEPS:
    monkeypatch.setattr(degradations, name, record(name))

  def order(seed):
    taken.clear()
    bsr_degrade(_picture(32), 4, seed)
    return tuple(taken)

  orders = [order(seed) for seed in range(80)]
  assert orders[:5] == [order(seed) for seed in range(5)]
  assert len(set(orders)) > 50
  assert {taken[0] for taken in orders} == set(STEPS)
  assert {taken[-1] for taken in orders} == {'_jpeg'}  # always, whatever was taken before it
  assert {taken[-2] for taken in orders} == set(STEPS)
  for taken_of_one in orders:
    assert taken_of_one.count('_random_blur') == 2 and taken_of_one.count('_gaussian_noise') == 1


@pytest.mark.parametrize('factor', [4, 8])
def test_bsr_blurs_as_much_in_pixels_of_the_small_picture_at_any_factor(factor, monkeypatch):
  blur, kernel, widths = degradations._random_blur, degradations._gaussian_kernel, []

  def blur_of(rng, image, target):
    widths.append(image.width / target[0])
    return blur(rng, image, target)

  def kernel_of(sigma_u, sigma_v, angle):
    widths[-1] = max(sigma_u, sigma_v) / widths[-1]
    return kernel(sigma_u, sigma_v, angle)

  monkeypatch.setattr(degradations, '_random_blur', blur_of)
  monkeypatch.setattr(degradations, '_gaussian_kernel', kernel_of)
  for seed in range(40):
    bsr_degrade(_picture(8 * factor), factor, seed)
  assert 0.65 < max(widths) <= 0.7  # 2.8 at a factor of 4
