"""Squared maximum mean discrepancies between sets of features (Gretton et al. 2012).

KID (Bińkowski et al. 2018) is that of a cubic kernel, the mean over subsets, each without bias.
CMMD (Jayasumana et al. 2024) is that of a Gaussian kernel on unit embeddings of CLIP. Neither
assumes Gaussians, and both are usable with fewer images than the Fréchet distance.

All sums are float64, and taken in blocks: of n and m rows no [n, m] is ever held.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from unclip_jax.evaluate.cosines import unit_rows
from unclip_jax.types import Array, UnclipError

MIN_ROWS = 2
CMMD_SIGMA = 10.0  # Jayasumana et al. 2024, section 4: the kernel's width, for unit embeddings
CMMD_SCALE = 1000.0  # and what they multiply the distance by, to be readable
_BLOCK = 1024  # rows
# (rows [n, d], rows [m, d]) -> [n, m]
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Spread(NamedTuple):
  """The mean of a figure over subsets, and its standard deviation between them."""

  mean: float
  std: float


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """(x · y / d + 1)^3 (Bińkowski et al. 2018, section 3.1)."""
  return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel_less_one(x: np.ndarray, y: np.ndarray, sigma: float = CMMD_SIGMA) -> np.ndarray:
  """exp(-|x - y|^2 / (2 sigma^2)) - 1.

  A constant cancels from a discrepancy. Without it nothing is lost where all values are near 1.
  """
  squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
  return np.expm1(-np.maximum(squares, 0) / (2 * sigma**2))


def mmd(features_a: Array, features_b: Array, kernel: Kernel, unbiased: bool = True) -> float:
  """The squared discrepancy of two sets of features [n, d] and [m, d].

  Args:
    features_a: of one set of images.
    features_b: of the other.
    kernel: of two blocks of rows.
    unbiased: whether a row is not compared with itself (Gretton et al. 2012, equation 3), so that
      sets of one distribution give 0 on average, and less than 0 at times; else equation 5.

  Raises:
    UnclipError: a set has fewer than two rows, or the widths differ.
  """
  a, b = _checked(features_a, features_b)
  for rows in (a, b):
    if len(rows) < MIN_ROWS:
      raise UnclipError(
        f'a kernel distance needs at least {MIN_ROWS} images in each set, there is {len(rows)}'
      )
  return _within(a, kernel, unbiased) + _within(b, kernel, unbiased) - 2 * _mean(a, b, kernel)


def kid(
  features_a: Array, features_b: Array, subsets: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Spread:
  """The kernel Inception distance: the mean of unbiased discrepancies over subsets.

  Args:
    features_a: [n, d].
    features_b: [m, d].
    subsets: pairs of rows of the one and of the other, int [s] each, of `draw_subsets` say.

  Raises:
    UnclipError: there are no subsets, or as `mmd`.
  """
  a, b = _checked(features_a, features_b)
  values = [mmd(a[rows_a], b[rows_b], cubic_kernel) for rows_a, rows_b in subsets]
  if not values:
    raise UnclipError('KID is the mean over subsets: give at least one')
  return Spread(float(np.mean(values)), float(np.std(values)))


def draw_subsets(
  count_a: int, count_b: int, size: int, num: int = 100, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pairs of rows for `kid`, each drawn without replacement.

  Args:
    count_a: rows of the one set.
    count_b: rows of the other.
    size: of each subset.
    num: how many.
    seed: of the draws.

  Raises:
    UnclipError: a set has fewer rows than a subset, a subset fewer than two, or `num` is not
      positive.
  """
  if size < MIN_ROWS or num < 1:
    raise UnclipError(f'{num} subsets of {size} images: take at least one, of {MIN_ROWS} or more')
  if min(count_a, count_b) < size:
    raise UnclipError(
      f'KID over subsets of {size} images needs {size} in each set, there are '
      f'{min(count_a, count_b)}: take smaller subsets, or more images'
    )
  draw = np.random.default_rng(seed)
  pairs = ((draw.permutation(count_a)[:size], draw.permutation(count_b)[:size]) for _ in range(num))
  return pairs


def cmmd(z_a: Array, z_b: Array, sigma: float = CMMD_SIGMA) -> float:
  """1000 times the squared discrepancy of CLIP embeddings [n, d] and [m, d] by a Gaussian kernel.

  As its authors' own figures it compares rows with themselves too: it is never negative, and that
  of two sets of one distribution falls with their size.

  Raises:
    UnclipError: as `mmd`, or an embedding is zero.
  """
  a, b = (unit_rows(z) for z in (z_a, z_b))
  kernel = lambda x, y: gaussian_kernel_less_one(x, y, sigma)  # noqa: E731
  return CMMD_SCALE * mmd(a, b, kernel, unbiased=False)


def _checked(features_a: Array, features_b: Array) -> tuple[np.ndarray, np.ndarray]:
  a, b = (np.asarray(features, np.float64) for features in (features_a, features_b))
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
    raise UnclipError(f'features {list(a.shape)} and {list(b.shape)}: wanted are [n, d] and [m, d]')
  return a, b


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
  return (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))


def _mean(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> float:
  total = sum(kernel(x, y).sum() for x in _blocks(a) for y in _blocks(b))
  return float(total / (len(a) * len(b)))


def _within(rows: np.ndarray, kernel: Kernel, unbiased: bool) -> float:
  n = len(rows)
  if not unbiased:
    return _mean(rows, rows, kernel)
  total = 0.0
  for i, x in enumerate(_blocks(rows)):
    for j, y in enumerate(_blocks(rows)):
      values = kernel(x, y)
      total += values.sum() - (np.trace(values) if i == j else 0.0)
  return float(total / (n * (n - 1)))
