"""Retrieval among a gallery, and how far its figures can be trusted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unclip_jax.types import Array, UnclipError

_BLOCK = 1024  # queries


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


def recall_at(
  queries: Array,
  gallery: Array,
  query_groups: Array,
  gallery_groups: Array,
  ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
  """R@k: the share of queries that find a row of their own group among the k nearest.

  Args:
    queries: [n, d] of unit norm.
    gallery: [m, d] of unit norm.
    query_groups: int [n]: a picture and all of its captions are of one group.
    gallery_groups: int [m].
    ks: each gives a figure. Of rows that are equally near, those of other groups come first.

  Raises:
    UnclipError: a k is no number of rows that a gallery has left to choose from, or a query has no
      row of its group.
  """
  query_groups, gallery_groups = np.asarray(query_groups), np.asarray(gallery_groups)
  if not len(queries):
    raise UnclipError('there are no queries: retrieval needs at least one')
  for k in ks:
    if not 1 <= k < len(gallery):
      raise UnclipError(
        f'R@{k} needs a k of 1 or more and at least {max(k, 1) + 1} to choose from, there are '
        f'{len(gallery)}'
      )
  gallery = np.asarray(gallery, np.float64)
  ranks = []
  for start in range(0, len(queries), _BLOCK):
    rows = slice(start, start + _BLOCK)
    scores = np.asarray(queries[rows], np.float64) @ gallery.T
    is_own = query_groups[rows, None] == gallery_groups[None]
    if not is_own.any(axis=1).all():
      raise UnclipError('a query has nothing of its group to find: check the groups')
    own = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
    # A score that is not a number makes a miss, whichever it is.
    ranks.append(1 + (~is_own & ~(scores < own)).sum(axis=1))
  rank = np.concatenate(ranks)
  return {k: float((rank <= k).mean()) for k in ks}


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
