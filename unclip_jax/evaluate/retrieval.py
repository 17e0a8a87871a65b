"""Retrieval among a gallery, and how far its figures can be trusted."""

from typing import NamedTuple

import numpy as np

from unclip_jax.types import Array, UnclipError


class Interval(NamedTuple):
  """A mean with the ends of its 95% bootstrap interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]'


def is_first(queries: Array, gallery: Array, labels: Array) -> np.ndarray:
  """Which queries find their own row of the gallery before all others: bool [n].

  Args:
    queries: [n, d] of unit norm.
    gallery: [m, d] of unit norm.
    labels: int [n], the row of the gallery that each query belongs to.
  """
  scores = np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
  labels = np.asarray(labels)
  own = scores[np.arange(len(labels)), labels]
  scores[np.arange(len(labels)), labels] = -np.inf
  # A tie is a miss: rows that are all alike retrieve nothing.
  return own > scores.max(axis=1)


def bootstrap(
  values: Array, groups: Array | None = None, num_draws: int = 2000, seed: int = 0
) -> Interval:
  """The mean of values with its 95% interval, by draws of whole groups with replacement.

  Args:
    values: [n] numbers or bools.
    groups: int [n]; samples of one caption share more than samples of two, and are drawn together.
      None draws each on its own.
    num_draws: of the bootstrap.
    seed: of its draws.

  Raises:
    UnclipError: there are no values.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise UnclipError(f'values {values.shape}: wanted is a row of at least one')
  groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
  sums, counts = np.bincount(groups, weights=values), np.bincount(groups)
  rows = np.random.default_rng(seed).integers(len(sums), size=(num_draws, len(sums)))
  means = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
  low, high = np.percentile(means, (2.5, 97.5))
  return Interval(float(values.mean()), float(low), float(high))
