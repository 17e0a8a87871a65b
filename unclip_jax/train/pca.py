"""Principal components of a stream of embeddings, for the autoregressive prior (section 2.2).

Mean and scatter of all rows seen are float64, and batches are merged into them by the update of
Chan, Golub & LeVeque (1983): sums of squares would lose the digits that embeddings of a mean far
from zero differ in. Memory does not grow with the stream.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from unclip_jax.types import UnclipError


class Moments(NamedTuple):
  """What a stream of rows has come to.

  Attributes:
    count: of the rows.
    mean: float64 [d].
    scatter: float64 [d, d], the sum of the outer products of deviations from the mean.
  """

  count: int
  mean: np.ndarray
  scatter: np.ndarray


class Pca(NamedTuple):
  """The principal components of a distribution.

  Attributes:
    count: of the rows that it was fitted to.
    mean: float64 [d].
    components: float64 [d, d], a unit vector a row, by decreasing eigenvalue. Of each the entry of
      the largest magnitude is positive.
    eigenvalues: float64 [d], the variance along each.
  """

  count: int
  mean: np.ndarray
  components: np.ndarray
  eigenvalues: np.ndarray


def add(moments: Moments | None, rows: np.ndarray) -> Moments:
  """Moments with further rows [b, d] in them; None has none yet.

  Raises:
    UnclipError: the rows are no matrix, of another width, or not finite.
  """
  rows = np.asarray(rows, np.float64)
  if rows.ndim != 2 or (moments is not None and rows.shape[1] != len(moments.mean)):
    wanted = 'd' if moments is None else len(moments.mean)
    raise UnclipError(f'embeddings of shape {list(rows.shape)}: they must be [b, {wanted}]')
  seen = 0 if moments is None else moments.count
  finite = np.isfinite(rows).all(axis=1)
  if not finite.all():
    raise UnclipError(
      f'embedding {seen + int(finite.argmin())} is not finite: leave it out, or mend what made it'
    )
  if not len(rows):
    return moments or Moments(0, np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2))
  mean = rows.mean(axis=0)
  apart = rows - mean
  batch = Moments(len(rows), mean, apart.T @ apart)
  return batch if not seen else merge(moments, batch)


def merge(one: Moments, other: Moments) -> Moments:
  """The moments of the rows of both, such as of two shards; neither is empty."""
  count, apart = one.count + other.count, other.mean - one.mean
  mean = one.mean + apart * (other.count / count)
  between = np.outer(apart, apart) * (one.count * other.count / count)
  return Moments(count, mean, one.scatter + other.scatter + between)


def components_of(moments: Moments) -> Pca:
  """The principal components of what was seen.

  Raises:
    UnclipError: there are too few rows to span all dimensions; says how many are needed.
  """
  d = len(moments.mean)
  if moments.count <= d:
    raise UnclipError(
      f'{moments.count} embeddings are too few for components of {d} dimensions: give {d + 1} or '
      'more'
    )
  eigenvalues, vectors = np.linalg.eigh(moments.scatter / moments.count)
  components = vectors.T[::-1]
  # An eigenvector is one up to its sign, which would else depend on the library.
  largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
  # Rounding leaves some that are zero a little below.
  eigenvalues = np.maximum(eigenvalues[::-1], 0)
  return Pca(moments.count, moments.mean, components * np.sign(largest), eigenvalues)


def fit(batches: Iterable[np.ndarray]) -> Pca:
  """The principal components of a stream of batches [b, d].

  Raises:
    UnclipError: as `add` and `components_of`, or there is no batch.
  """
  moments = None
  for rows in batches:
    moments = add(moments, rows)
  if moments is None:
    raise UnclipError('there are no embeddings to find the components of: give some')
  return components_of(moments)


def error_shares(pca: Pca) -> np.ndarray:
  """The mean squared error that 0, 1, ..., d components leave, over the variance: [d + 1]."""
  # Summed from the smallest on, so that what little the last ones leave has all its digits.
  left = np.append(np.cumsum(pca.eigenvalues[::-1])[::-1], 0.0)
  return left / max(left[0], np.finfo(np.float64).tiny)


def num_components(pca: Pca, error_share: float = 0.01) -> int:
  """The fewest components, 1 at least, that leave less than a share of the squared error.

  The paper keeps 319 of 1024, which leave under 1%.

  Raises:
    UnclipError: the share is not above 0.
  """
  if not error_share > 0:
    raise UnclipError(f'an error share of {error_share:g}: take more than 0')
  return max(1, int((error_shares(pca) < error_share).argmax()))
