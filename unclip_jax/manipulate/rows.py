"""Rows of pictures that differ in one thing: variations, interpolations, text diffs, PCA.

Section 3 (figures 3 to 6) and section 4 (figure 7). What differs along a row is the latent alone:
all frames have the noise of one seed.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from unclip_jax.configs import ArPriorConfig
from unclip_jax.manipulate.latents import (
  AS_USUAL,
  Drawing,
  at_size,
  check_pictures,
  decode,
  encode,
  encode_images,
  slerp,
)
from unclip_jax.systems import settings
from unclip_jax.systems.unclip import Unclip
from unclip_jax.train import pca as principal
from unclip_jax.types import UnclipError

NOISES = ('inverted', 'fixed')
# What stands for the picture's own caption (section 3.3).
BASELINES = ('caption', 'dummy', 'empty', 'none')
DUMMY = 'a photo'
_LEAST_APART = 1e-5  # of two captions' unit embeddings


class Row(NamedTuple):
  """Pictures side by side.

  Attributes:
    images: uint8 [n, h, w, 3].
    z_i: float32 [n, d], what was decoded; None where the model has none.
    measured: what there is to say of them, ready for json.dumps.
  """

  images: np.ndarray
  z_i: np.ndarray | None
  measured: dict[str, Any]


def reconstruct(model: Unclip, images: Sequence[Any], how: Drawing = AS_USUAL) -> Row:
  """Pictures there and back: encoded to (z_i, x_T), and decoded.

  Args:
    model: any with a decoder that is given z_i.
    images: each [h, w, 3], uint8 or float in [-1, 1].
    how: as `Drawing` describes it.

  Raises:
    UnclipError: as `encode`.
  """
  latents = encode(model, images, how)
  samples = decode(model, latents.z_i, latents.x_T, how=how)
  measured = {
    'error_levels': _listed(latents.error),
    # Noise has a deviation of 1: what is far from it the decoder never met.
    'x_T_std': _listed(latents.x_T.std(axis=(1, 2, 3))),
  }
  return Row(samples.images, samples.z_i, measured)


def variations(
  model: Unclip, image: Any, n: int = 4, eta: float = 1.0, how: Drawing = AS_USUAL
) -> Row:
  """Pictures that CLIP sees as it sees this one (section 3.1): DDIM from its x_T with noise.

  Args:
    model: any with a decoder that is given z_i.
    image: [h, w, 3], uint8 or float in [-1, 1].
    n: how many; they differ in their noise.
    eta: from 0, which gives the picture back, to 1.
    how: as `Drawing` describes it. No guidance scale is 1 at an eta of 0, the model's own at 1, and
      on the way from one to the other between.

  Raises:
    UnclipError: an argument is not as above, or the model has not what it takes.
  """
  settings.check_count('the number of variations', n, 1, settings.MAX_IMAGES)
  eta = _check_share('eta', eta)
  latents = encode(model, [image], how)
  if how.guidance_scale is None:
    # What has to give the picture back must not be guided, and what is drawn anew is better so.
    own = model.config.decoder.sampling.guidance_scale
    how = dataclasses.replace(how, guidance_scale=1 + eta * (own - 1))
  samples = decode(model, latents.z_i, latents.x_T, n, eta, how)
  measured = {
    'error_levels': _listed(latents.error),
    'eta': eta,
    'guidance_scale': how.guidance_scale,
  }
  return Row(samples.images, samples.z_i, measured)


def interpolate(
  model: Unclip,
  one: Any,
  other: Any,
  n: int = 7,
  noise: Literal['inverted', 'fixed'] = 'inverted',
  how: Drawing = AS_USUAL,
) -> Row:
  """The way from one picture to another, z_i by slerp (section 3.2).

  Args:
    model: any with a decoder that is given z_i.
    one: [h, w, 3], uint8 or float in [-1, 1].
    other: the same.
    n: frames, 2 or more, the ends among them.
    noise: 'inverted': x_T by slerp too, so that the ends are the pictures; 'fixed': that of the
      seed, so that they are variations of them.
    how: as `Drawing` describes it.

  Raises:
    UnclipError: as `variations`.
  """
  settings.check_count('the number of frames', n, 2, settings.MAX_IMAGES)
  if noise not in NOISES:
    raise UnclipError(f'there is no noise {noise!r}: take {" or ".join(NOISES)}')
  theta = np.linspace(0, 1, n)
  measured: dict[str, Any] = {'theta': _listed(theta)}
  if noise == 'inverted':
    z_i, x_T, error = encode(model, [one, other], how)
    x_T = slerp(*x_T, theta)
    measured['error_levels'] = _listed(error)
  else:
    pictures = check_pictures([one, other])
    z_i, x_T = encode_images(at_size(model, how.size), pictures), None
  measured['cosine_of_ends'] = _cosine(*z_i)
  samples = decode(model, _turn(*z_i, theta), x_T, how=how)
  return Row(samples.images, samples.z_i, measured)


def text_direction(
  model: Unclip,
  source: str | None,
  target: str,
  baseline: Literal['caption', 'dummy', 'empty', 'none'] = 'caption',
) -> np.ndarray:
  """z_d, float32 [d]: the unit vector from one caption's embedding to another's (section 3.3).

  A UserWarning names words that the model never saw, and the nearest that it knows.

  Args:
    model: any with CLIP's text tower.
    source: of the picture as it is; counts for the baseline 'caption' alone, others may have None.
    target: of the picture as it is to become.
    baseline: what z_d leads away from: 'caption', the source; 'dummy', "a photo"; 'empty', the
      empty caption; 'none', nothing: z_d is the target's own embedding.

  Raises:
    UnclipError: an argument is not as above, or the two captions are one to CLIP.
  """
  if baseline not in BASELINES:
    raise UnclipError(f'there is no baseline {baseline!r}: take {", ".join(BASELINES)}')
  settings.check_text(target, 'the target caption')
  if baseline == 'caption':
    settings.check_text(source, 'the source caption')
  away = {'caption': source, 'dummy': DUMMY, 'empty': '', 'none': None}[baseline]
  texts = [target] if away is None else [away, target]
  z_t = np.concatenate([np.asarray(model.encode_text([text])) for text in texts])
  model.warn_of_unseen(dict.fromkeys(texts))
  z_t = z_t / np.linalg.norm(z_t, axis=1, keepdims=True)
  if away is None:
    return z_t[0]
  direction = z_t[1] - z_t[0]
  length = np.linalg.norm(direction)
  if not length > _LEAST_APART:
    raise UnclipError(
      f'the captions {away!r} and {target!r} are the same to CLIP: there is no direction from one '
      'to the other'
    )
  return direction / length


def text_diff(
  model: Unclip,
  image: Any,
  source: str | None,
  target: str,
  theta: float = 0.5,
  n: int = 5,
  baseline: Literal['caption', 'dummy', 'empty', 'none'] = 'caption',
  how: Drawing = AS_USUAL,
) -> Row:
  """A picture on its way from one caption to another (section 3.3): z_i turned towards z_d.

  Args:
    model: any with a decoder that is given z_i and CLIP's text tower.
    image: [h, w, 3], uint8 or float in [-1, 1].
    source: what it shows, such as 'a flat cat'; as of `text_direction`.
    target: what it is to show, such as 'a 3D cat'.
    theta: how far the last frame is turned, above 0 to 1; the paper takes 0.25 to 0.5.
    n: frames, 2 or more, the first of them the picture itself.
    baseline: as of `text_direction`.
    how: as `Drawing` describes it; x_T is that of the picture.

  Raises:
    UnclipError: as `variations`, or of `text_direction`.
  """
  settings.check_count('the number of frames', n, 2, settings.MAX_IMAGES)
  theta = _check_share('theta', theta)
  if not theta:
    raise UnclipError('theta is 0, which changes nothing: take more, such as 0.5')
  z_d = text_direction(model, source, target, baseline)
  latents = encode(model, [image], how)
  thetas = np.linspace(0, theta, n)
  z_i = latents.z_i[0]
  frames = _turn(z_i, z_d * np.linalg.norm(z_i), thetas)
  samples = decode(model, frames, latents.x_T, how=how)
  measured = {
    'theta': _listed(thetas),
    'error_levels': _listed(latents.error),
    'cosine_of_direction': [_cosine(z, z_d) for z in frames],
  }
  return Row(samples.images, samples.z_i, measured)


def fit_pca(model: Unclip, batches: Iterable[Any]) -> principal.Pca:
  """The principal components of CLIP's embeddings of pictures, for `pca_reconstruct`.

  Args:
    model: any with the image tower of its CLIP.
    batches: of pictures, [b, h, w, 3] each, as `Unclip.encode_image` takes them.

  Raises:
    UnclipError: there are fewer pictures than it takes; says how many.
  """
  return principal.fit(np.asarray(model.encode_image(batch)) for batch in batches)


def pca_reconstruct(
  model: Unclip,
  images: Sequence[Any],
  dims: Sequence[int] | None = None,
  pca: principal.Pca | None = None,
  how: Drawing = AS_USUAL,
) -> Row:
  """What few components of z_i hold of pictures (section 4, figure 7): decoded on one seed.

  Args:
    model: any with a decoder that is given z_i.
    images: each [h, w, 3], uint8 or float in [-1, 1].
    dims: numbers of components, such as 20, 30, 40, 80, 120, 160, 200, 320; None is 5, twice that
      and so on, and all.
    pca: of `fit_pca`; None takes that of an autoregressive prior.
    how: as `Drawing` describes it.

  Returns:
    A row for each image, of a picture for each number, one after the other.

  Raises:
    UnclipError: as `variations`, or there are no components, or fewer than asked for.
  """
  pictures = check_pictures(images)
  mean, components = _components(model, pca)
  if dims is None:
    most = len(components)
    dims = [5 * 2**i for i in range(most.bit_length()) if 5 * 2**i < most] + [most]
  if not len(dims):
    raise UnclipError('there is no number of components: give one or more')
  for k in dims:
    settings.check_count('the number of components', k, 1, len(components))
  z_i = encode_images(at_size(model, how.size), pictures)
  if z_i.shape[1] != len(mean):
    raise UnclipError(
      f'components of {len(mean)} dimensions do not go with embeddings of {z_i.shape[1]}'
    )
  apart = z_i - mean
  kept = [mean + apart @ components[:k].T @ components[:k] for k in dims]
  frames = np.stack(kept, axis=1).reshape(-1, len(mean))
  if model.config.clip.unit_norm:
    frames = frames / np.linalg.norm(frames, axis=1, keepdims=True)
  cosines = [_cosine(z, frame) for z, frame in zip(z_i.repeat(len(dims), 0), frames, strict=True)]
  samples = decode(model, frames.astype(np.float32), how=how)
  return Row(samples.images, samples.z_i, {'dims': [int(k) for k in dims], 'cosine': cosines})


def _components(model: Unclip, pca: principal.Pca | None) -> tuple[np.ndarray, np.ndarray]:
  """The mean [d] and the components [k, d]."""
  if pca is not None:
    return pca.mean, pca.components
  if not isinstance(model.config.prior, ArPriorConfig):
    raise UnclipError(
      'this model has no autoregressive prior to take components from: give those of fit_pca, '
      'or of the command --fit FOLDER'
    )
  model.check_has('prior')
  quantiser = model.params['prior']['quantiser']
  return tuple(np.asarray(quantiser[name], np.float64) for name in ('mean', 'components'))


def _turn(one: np.ndarray, other: np.ndarray, theta: np.ndarray) -> np.ndarray:
  """Embeddings [n, d] between two: directions by slerp, lengths linearly (Karlo's have some)."""
  lengths = np.linalg.norm(one), np.linalg.norm(other)
  if not all(lengths):
    raise UnclipError('an embedding of zeros has no direction to interpolate from or to')
  directions = slerp(one / lengths[0], other / lengths[1], theta)
  return directions * ((1 - theta) * lengths[0] + theta * lengths[1])[:, None].astype(np.float32)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
  lengths = np.linalg.norm(one) * np.linalg.norm(other)
  return round(float(one @ other / lengths), 4)


def _check_share(what: str, value: Any) -> float:
  """`value` as a float within 0..1."""
  share = settings.check_number(what, value)
  if not 0 <= share <= 1:
    raise UnclipError(f'{what} is {share:g}: take 0 to 1')
  return share


def _listed(numbers: np.ndarray) -> list[float]:
  return [round(float(number), 4) for number in numbers]
