"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6).

Means and covariances are summed in float64 as features come, so that a set may be of any size.
Those of parts are put together as by Chan et al. 1983: the parts of a set may come in any order,
from several processes or from files.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple
from warnings import warn

import numpy as np

from unclip_jax.types import Array, UnclipError

MIN_ROWS_A_DIMENSION = 10  # with fewer, the covariances are mostly noise, and so the distance
MIN_ROWS = 2  # without a second one there is no covariance


class Moments(NamedTuple):
  """What a Gaussian is fitted from.

  Attributes:
    count: rows.
    mean: float64 [d].
    scatter: float64 [d, d], the sum of the outer products of what rows are off the mean.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @property
  def cov(self) -> np.ndarray:
    """The covariance [d, d], by count - 1, as that of numpy."""
    return self.scatter / (self.count - 1)


def moments_of(features: Array) -> Moments:
  """The moments of features [n, d]; n may be 0.

  Raises:
    UnclipError: they are of another shape, or hold a NaN or an infinity.
  """
  rows = np.asarray(features, np.float64)
  if rows.ndim != 2 or not rows.shape[1]:
    raise UnclipError(f'features {list(rows.shape)}: wanted are [n, d]')
  if not np.isfinite(rows).all():
    raise UnclipError('the features hold a NaN or an infinity: see to the pictures and the network')
  mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
  rows = rows - mean
  return Moments(len(rows), mean, rows.T @ rows)


def merge(parts: Iterable[Moments]) -> Moments:
  """The moments of all rows of several sets, in any order.

  Raises:
    UnclipError: there are none, or their widths differ.
  """
  parts = list(parts)
  if not parts:
    raise UnclipError('there are no moments to merge: give at least those of one set')
  return functools.reduce(_merge_two, parts)


def _merge_two(a: Moments, b: Moments) -> Moments:
  if a.mean.shape != b.mean.shape:
    raise UnclipError(
      f'features {len(a.mean)} and {len(b.mean)} wide cannot be merged: take those of one network'
    )
  if not a.count or not b.count:
    return a if a.count else b
  count, apart = a.count + b.count, b.mean - a.mean
  scatter = a.scatter + b.scatter + np.outer(apart, apart) * (a.count * (b.count / count))
  return Moments(count, a.mean + apart * (b.count / count), scatter)


def distance_of_moments(a: Moments, b: Moments) -> float:
  """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64.

  Raises:
    UnclipError: the widths differ, or a set has fewer than two rows.
  """
  if a.mean.shape != b.mean.shape:
    raise UnclipError(f'features {len(a.mean)} and {len(b.mean)} wide: take those of one network')
  for moments in (a, b):
    if moments.count < MIN_ROWS:
      raise UnclipError(
        f'a Fréchet distance needs at least {MIN_ROWS} images in each set, there is '
        f'{moments.count}: take at least {MIN_ROWS_A_DIMENSION * len(a.mean)} for one that tells '
        'more of the images than of their number'
      )
  cov_a, cov_b = a.cov, b.cov
  # The trace of the root of cov_a cov_b is the sum of the singular values of root_a root_b, as
  # cov_a cov_b has the eigenvalues of (root_a root_b) (root_a root_b)^T.
  cross = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
  distance = ((a.mean - b.mean) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
  return float(max(distance, 0.0))


def _root(cov: np.ndarray) -> np.ndarray:
  """The symmetric root. Of fewer rows than dimensions many eigenvalues are rounding: they are 0."""
  values, vectors = np.linalg.eigh(cov)
  floor = max(values[-1], 0) * len(cov) * np.finfo(np.float64).eps
  return (vectors * np.sqrt(np.where(values > floor, values, 0))) @ vectors.T


def notice_of_size(count_a: int, count_b: int, dims: int) -> str | None:
  """What is to be said of sets of so few rows that the distance tells more of their size."""
  fewest, wanted = min(count_a, count_b), MIN_ROWS_A_DIMENSION * dims
  if fewest >= wanted:
    return None
  return (
    f'{fewest:,} images are few for a Fréchet distance on {dims:,} dimensions, which comes out too '
    f'large: compare it only with those of as many images, or take at least {wanted:,}'
  )


def frechet_distance(features_a: Array, features_b: Array) -> float:
  """As `distance_of_moments`, of features [n, d] and [m, d].

  Warns of sets with fewer than ten rows a dimension, whose distance tells more of their size than
  of their images.

  Raises:
    UnclipError: as `moments_of` and `distance_of_moments`.
  """
  a, b = moments_of(features_a), moments_of(features_b)
  distance = distance_of_moments(a, b)
  if notice := notice_of_size(a.count, b.count, len(a.mean)):
    warn(notice, stacklevel=2)
  return distance
