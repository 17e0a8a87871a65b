"""The bipartite latent of a picture, (z_i, x_T) (section 3): what CLIP sees of it, and the rest.

x_T is where DDIM that runs backwards from the picture comes to, conditioned on z_i, with the
caption dropped, no guidance and nothing clipped. DDIM forwards gives the picture back; how well is
measured each time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.inversion import inversion_plan
from unclip_jax.systems import programs, settings
from unclip_jax.systems.given import as_array
from unclip_jax.systems.samples import Request, Samples, StartNoise
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import UnclipError

# Two passes of 100 steps give pictures back nearer than one of 250, the paper's, and cost less.
_STEPS, _ITERATIONS = 100, 2
_NEARLY_ALIKE, _NEARLY_OPPOSITE = 1e-4, np.pi - 1e-4  # radians


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How a manipulation is drawn.

  Attributes:
    num_steps: of the decoder. None is 100 where a picture is inverted, 50 where a part or a little
      of it is painted anew, and else the model's own.
    guidance_scale: None is 1 where a picture is inverted, which it is without guidance, but for
      its `variations`, else the model's own.
    iterations: of each step of an inversion.
    seed: of all noise. What stands in a row has the same noise, each stage's and each step's.
    size: of the pictures, in pixels, as `Unclip.sample` takes it.
  """

  num_steps: int | None = None
  guidance_scale: float | None = None
  iterations: int = _ITERATIONS
  seed: int = 0
  size: int | None = None


AS_USUAL = Drawing()


class Latents(NamedTuple):
  """Pictures as a decoder knows them.

  Attributes:
    z_i: float32 [n, d], their CLIP embeddings.
    x_T: float32 [n, size, size, c], what the decoder begins from to give them back.
    error: float64 [n], the mean absolute error of what it gives back, in grey levels of 255, at
      the decoder's own size.
  """

  z_i: np.ndarray
  x_T: np.ndarray
  error: np.ndarray


def encode(model: Unclip, images: Sequence[Any], how: Drawing = AS_USUAL) -> Latents:
  """The latents of pictures, and how well they give them back.

  Args:
    model: any with a decoder that is given z_i, and the image tower of its CLIP.
    images: each [h, w, 3], uint8 or float in [-1, 1].
    how: steps, iterations, seed (Stable unCLIP noises z_i) and size count.

  Raises:
    UnclipError: an argument is not as above, the model has not what it takes, or the inversion
      diverges.
  """
  pictures = check_pictures(images)
  settings.check_count('the number of iterations', how.iterations)
  model = at_size(model, how.size)
  z_i = encode_images(model, pictures)
  pixels, x_0 = to_x_0(model, pictures)

  def backwards(request: Request) -> Request:
    plan = inversion_plan(request.decoder.plan, how.iterations)
    decoder = request.decoder._replace(plan=plan, sampler=programs.INVERSION)
    return request._replace(decoder=decoder)

  alone = _with_config(_unbounded(model), autoencoder=None, upsamplers=(), default_size=None)
  drawn = alone.sample(
    [''] * len(z_i),
    how.seed,
    z_i=z_i,
    start_noise=StartNoise(decoder=x_0),
    decoder=_ddim(how, 1.0, 0.0),
    revise=backwards,
  )
  x_T = drawn.stage_images[0]
  small = _with_config(model, upsamplers=(), default_size=None)
  back = decode(small, z_i, x_T, how=dataclasses.replace(how, size=None, guidance_scale=None))
  apart = np.abs(back.images.astype(np.int64) - np.asarray(programs.to_uint8(pixels)))
  return Latents(z_i, x_T, apart.mean(axis=(1, 2, 3)))


def decode(
  model: Unclip,
  z_i: Any,
  x_T: Any = None,
  num_images: int = 1,
  eta: float | None = None,
  how: Drawing = AS_USUAL,
) -> Samples:
  """Pictures of latents, all from the same noise where a seed gives it.

  Args:
    model: as of `encode`.
    z_i: float [n, d].
    x_T: float [n or 1, size, size, c]; None is the noise of the seed, the same for all.
    num_images: of each; these differ in their noise.
    eta: of DDIM, from 0 to 1; None is 0 where x_T is given, else as the model is sampled.
    how: all but its iterations counts.

  Raises:
    UnclipError: as `Unclip.sample`.
  """
  z_i = as_array('z_i', z_i)
  if x_T is None:
    sampling = Sampling(how.num_steps, guidance_scale=how.guidance_scale, eta=eta)
  else:
    scale = 1.0 if how.guidance_scale is None else how.guidance_scale
    # Where nothing is guided the bound would only undo what the inversion found.
    model = _unbounded(model) if scale == 1 else model
    sampling = _ddim(how, scale, eta or 0.0)
    x_T = as_array('x_T', x_T).repeat(num_images if len(x_T) > 1 else 1, axis=0)
  return model.sample(
    [''] * len(z_i),
    how.seed,
    num_images,
    z_i=z_i.repeat(num_images, axis=0),
    start_noise=StartNoise(decoder=x_T),
    decoder=sampling,
    size=how.size,
  )


def slerp(one: Any, other: Any, theta: Any) -> np.ndarray:
  """Spherical interpolation between two arrays as vectors (Shoemake 1985).

  Args:
    one: float [...], what theta = 0 gives.
    other: float [...], what theta = 1 gives.
    theta: float [n].

  Returns:
    float32 [n, ...].

  Raises:
    UnclipError: one of them is zero, or they are opposite, with no way from one to the other.
  """
  one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
  theta = np.asarray(theta, np.float64).reshape(-1, *[1] * one.ndim)
  lengths = np.linalg.norm(one.ravel()), np.linalg.norm(other.ravel())
  if not all(lengths):
    raise UnclipError('a vector of zeros has no direction to interpolate from or to')
  angle = np.arccos(np.clip(np.vdot(one, other) / np.prod(lengths), -1, 1))
  if angle > _NEARLY_OPPOSITE:
    raise UnclipError('the two vectors are opposite: there is no one way between them')
  weights = 1 - theta, theta
  if angle > _NEARLY_ALIKE:
    weights = tuple(np.sin(weight * angle) / np.sin(angle) for weight in weights)
  return (weights[0] * one[None] + weights[1] * other[None]).astype(np.float32)


def check_pictures(images: Sequence[Any]) -> list[np.ndarray]:
  """Pictures as arrays [h, w, 3], uint8 or float32 in [-1, 1].

  Raises:
    UnclipError: one is not; names it.
  """
  pictures = [as_array('image', image) for image in images]
  if not pictures:
    raise UnclipError('there is no image: give one or more')
  for i, picture in enumerate(pictures):
    name = f'image {i + 1}' if len(pictures) > 1 else 'image'
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
      raise UnclipError(f'{name} must be an array [h, w, 3], not {list(picture.shape)}')
    if picture.dtype == np.uint8:
      continue
    if not jnp.issubdtype(picture.dtype, jnp.floating) or not np.abs(picture).max() <= 1:
      raise UnclipError(f'{name} must be uint8, or float in [-1, 1] without a NaN')
    pictures[i] = picture.astype(np.float32)
  return pictures


def at_size(model: Unclip, size: int | None) -> Unclip:
  """The model with its decoder for pictures of `size` pixels, where it paints latents of any.

  Raises:
    UnclipError: it has no decoder, or does not make that size.
  """
  if model.config.decoder is None:
    raise UnclipError('this model has no decoder: it draws no pictures')
  config = settings.at_size(model.config, size)
  settings.num_upsamplers(config, size)
  return dataclasses.replace(model, config=config)


def encode_images(model: Unclip, pictures: Sequence[np.ndarray]) -> np.ndarray:
  """z_i float32 [n, d] of pictures, each of its own size."""
  return np.concatenate([np.asarray(model.encode_image(picture[None])) for picture in pictures])


def to_x_0(model: Unclip, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Pictures [n, size, size, 3] at the decoder's size, and x_0 as it paints it, maybe latents."""
  size = settings.sizes(model.config)[0]
  pixels = np.concatenate([np.asarray(programs.prepare(x[None], size)) for x in pictures])
  if model.config.autoencoder is None:
    return pixels, pixels
  model.check_has('autoencoder')
  x_0 = programs.encode_latents(
    model.params['autoencoder'], pixels, config=model.config.autoencoder, dtype=model.dtype
  )
  return pixels, np.asarray(x_0)


def thumbnail(picture: np.ndarray, size: int) -> np.ndarray:
  """The middle square of a picture [h, w, 3] as uint8 [size, size, 3]."""
  return np.asarray(programs.to_uint8(programs.prepare(picture[None], size)))[0]


def _ddim(how: Drawing, guidance_scale: float, eta: float) -> Sampling:
  num_steps = _STEPS if how.num_steps is None else how.num_steps
  # Strides begin at the noisiest timestep and end at the least noisy one, whatever the model's do.
  return Sampling(num_steps, 'ddim', guidance_scale, eta, spacing='strided')


def _unbounded(model: Unclip) -> Unclip:
  """The model with a decoder whose x_0 nothing limits."""
  decoder = model.config.decoder
  diffusion = dataclasses.replace(decoder.diffusion, clip_x_0=None, dynamic_threshold=None)
  return _with_config(model, decoder=dataclasses.replace(decoder, diffusion=diffusion))


def _with_config(model: Unclip, **changes: Any) -> Unclip:
  return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
