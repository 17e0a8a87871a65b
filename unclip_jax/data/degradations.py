"""What the upsamplers are conditioned on in training (paper, section 2.2 and appendix C).

The first upsampler sees its low-resolution image through a slight Gaussian blur, the second through
the BSR degradation of Zhang et al. (arXiv:2103.14006): blurs, resizes by several interpolations,
Gaussian and sensor noise and JPEG in random order. Blur and reduction are pure JAX; BSR runs on the
host, beside the loading of the images.
"""

import io
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from unclip_jax.types import Array

BLUR_KERNEL = 3  # table 3 of the paper, as is the sigma
BLUR_SIGMA = 0.6

MAX_SIGMA = 0.7  # in pixels of the small picture: BSRGAN's isotropic blur, 2.8 at a factor of 4

_INTERPOLATIONS = (
  Image.Resampling.NEAREST,
  Image.Resampling.BOX,
  Image.Resampling.BILINEAR,
  Image.Resampling.BICUBIC,
  Image.Resampling.LANCZOS,
)


def gaussian_blur(
  image_bhwc: Array, kernel_size: int = BLUR_KERNEL, sigma: float | Array = BLUR_SIGMA
) -> Array:
  """Blurs images with a normalised Gaussian; the border is mirrored without repeating its pixels.

  Args:
    image_bhwc: [b, h, w, c] floats of any range, h and w larger than kernel_size // 2.
    kernel_size: odd number of taps along each axis.
    sigma: standard deviation in pixels, a positive scalar, which may be traced.

  Returns:
    [b, h, w, c] of the same dtype.
  """
  if kernel_size % 2 == 0:
    raise ValueError(f'kernel_size must be odd, not {kernel_size}')
  radius = kernel_size // 2
  offset = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
  kernel = jnp.exp(-0.5 * (offset / sigma) ** 2)
  kernel /= kernel.sum()
  num_channels = image_bhwc.shape[-1]
  padded = jnp.pad(
    image_bhwc.astype(jnp.float32), ((0, 0), (radius, radius), (radius, radius), (0, 0)), 'reflect'
  )
  for shape in ((kernel_size, 1, 1, 1), (1, kernel_size, 1, 1)):
    # One filter a channel, one axis at a time: a Gaussian is separable.
    padded = lax.conv_general_dilated(
      padded,
      jnp.tile(kernel.reshape(shape), (1, 1, 1, num_channels)),
      window_strides=(1, 1),
      padding='VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=num_channels,
    )
  return padded.astype(image_bhwc.dtype)


def area_downsample(image_bhwc: Array, factor: int) -> Array:
  """Reduces images by a whole factor; each pixel is the mean of the block it replaces.

  Args:
    image_bhwc: [b, h, w, c], h and w multiples of `factor`.
    factor: how many times smaller the result is.

  Returns:
    [b, h / factor, w / factor, c] of the same dtype.
  """
  b, h, w, c = image_bhwc.shape
  if h % factor or w % factor:
    raise ValueError(f'{h}x{w} is no multiple of {factor}')
  blocks = image_bhwc.reshape(b, h // factor, factor, w // factor, factor, c)
  return blocks.astype(jnp.float32).mean(axis=(2, 4)).astype(image_bhwc.dtype)


def bsr_degrade(image: np.ndarray, factor: int, seed: int | tuple[int, ...]) -> np.ndarray:
  """Degrades one image as a bad camera, a resize and a bad JPEG would, in random order.

  Args:
    image: uint8 [h, w, 3], h and w multiples of `factor`.
    factor: how many times smaller the result is, 4 in the paper. What a pixel of the result loses
      is the same for all.
    seed: the result is a function of the image and of this, e.g. (seed, index).

  Returns:
    uint8 [h / factor, w / factor, 3], registered with the image: no shift of its content.
  """
  height, width = image.shape[:2]
  if height % factor or width % factor:
    raise ValueError(f'{height}x{width} is no multiple of {factor}')
  rng = np.random.default_rng(seed)
  target = (width // factor, height // factor)
  steps: list[Callable[[Image.Image], Image.Image]] = [
    lambda img: _random_blur(rng, img, target),
    lambda img: _random_blur(rng, img, target),
    lambda img: _random_resize(rng, img, target),
    lambda img: img.resize(target, _pick(rng, _INTERPOLATIONS[1:])),
    lambda img: _gaussian_noise(rng, img),
    lambda img: _sensor_noise(rng, img) if rng.random() < 0.25 else img,
    lambda img: _jpeg(rng, img) if rng.random() < 0.75 else img,
  ]
  degraded = Image.fromarray(image)
  for step in rng.permutation(len(steps)):
    degraded = steps[step](degraded)
  if degraded.size != target:
    degraded = degraded.resize(target, Image.Resampling.BICUBIC)
  return np.asarray(_jpeg(rng, degraded))


def _random_blur(
  rng: np.random.Generator, image: Image.Image, target: tuple[int, int]
) -> Image.Image:
  """Blurs with a Gaussian, half of the time with one of any direction and two widths."""
  # As wide before a reduction as after it.
  widest = MAX_SIGMA * image.width / target[0]
  sigma_u = max(0.1, rng.uniform(0, widest))
  sigma_v = sigma_u if rng.random() < 0.5 else max(0.1, rng.uniform(0, widest))
  kernel = _gaussian_kernel(sigma_u, sigma_v, rng.uniform(0, np.pi))
  radius = kernel.shape[0] // 2
  pixels = np.asarray(image, np.float32)
  padded = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), 'symmetric')
  spectrum = np.fft.rfft2(padded, axes=(0, 1))
  transfer = np.fft.rfft2(kernel, s=padded.shape[:2])
  blurred = np.fft.irfft2(spectrum * transfer[..., None], s=padded.shape[:2], axes=(0, 1))
  # The product of spectra is a convolution that lags by the radius; with the padding, twice.
  return _to_image(blurred[2 * radius :, 2 * radius :])


def _gaussian_kernel(sigma_u: float, sigma_v: float, angle: float) -> np.ndarray:
  radius = max(1, int(np.ceil(3 * max(sigma_u, sigma_v))))
  y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
  u = np.cos(angle) * x + np.sin(angle) * y
  v = np.cos(angle) * y - np.sin(angle) * x
  kernel = np.exp(-0.5 * ((u / sigma_u) ** 2 + (v / sigma_v) ** 2))
  return kernel / kernel.sum()


def _random_resize(
  rng: np.random.Generator, image: Image.Image, target: tuple[int, int]
) -> Image.Image:
  """Resizes to anything between the target size and the present one and a half."""
  scale = rng.uniform(target[0] / image.width, 1.5) if image.width > target[0] else 1.0
  size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
  return image.resize(size, _pick(rng, _INTERPOLATIONS))


def _gaussian_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
  """Adds noise of 1 to 25 levels: independent in the channels, equal in them, or correlated."""
  sigma = rng.uniform(1, 25)
  shape = (image.height, image.width, 3)
  kind = rng.integers(3)
  if kind == 0:
    noise = rng.standard_normal(shape)
  elif kind == 1:
    noise = np.repeat(rng.standard_normal((*shape[:2], 1)), 3, axis=2)
  else:
    mixing = rng.standard_normal((3, 3))
    mixing /= np.linalg.norm(mixing, axis=1, keepdims=True)
    noise = rng.standard_normal(shape) @ mixing.T
  return _to_image(np.asarray(image, np.float32) + sigma * noise)


def _sensor_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
  """Adds in linear light what a sensor adds: shot noise, which grows with it, and read noise."""
  linear = (np.asarray(image, np.float32) / 255) ** 2.2
  photons = 10 ** rng.uniform(2, 4)  # of a white pixel, as in BSRGAN's Poisson noise
  noisy = rng.poisson(linear * photons) / photons
  noisy += rng.uniform(0, 0.01) * rng.standard_normal(linear.shape)
  return _to_image(255 * np.clip(noisy, 0, 1) ** (1 / 2.2))


def _jpeg(rng: np.random.Generator, image: Image.Image) -> Image.Image:
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=int(rng.integers(30, 96)))
  return Image.open(buffer).convert('RGB')


def _to_image(pixels: np.ndarray) -> Image.Image:
  return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _pick(rng: np.random.Generator, options: tuple) -> Image.Resampling:
  return options[int(rng.integers(len(options)))]
