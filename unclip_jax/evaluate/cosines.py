"""Measures that are cosines of CLIP's embeddings: how well pictures meet captions, and differ."""

import numpy as np

from unclip_jax.evaluate.retrieval import Interval, bootstrap
from unclip_jax.types import Array, UnclipError


def clip_score(z_i: Array, z_t: Array, groups: Array | None = None) -> Interval:
  """The mean cosine of pictures and their captions, with its 95% interval.

  It is what Nichol et al. 2021 and later papers plot against FID. That of Hessel et al. 2021,
  equation 1, is 2.5 times the same, where no cosine is negative.

  Args:
    z_i: [n, d] CLIP embeddings of pictures, of any norm.
    z_t: [n, d], of the caption of each.
    groups: int [n]: pictures of one caption are drawn together for the interval; None draws each.

  Raises:
    UnclipError: there are no pictures, the shapes differ, or an embedding is zero.
  """
  z_i, z_t = unit_rows(z_i), unit_rows(z_t)
  if z_i.shape != z_t.shape or z_i.ndim != 2:
    raise UnclipError(
      f'embeddings {list(z_i.shape)} of pictures and {list(z_t.shape)} of captions: wanted is one '
      'of the captions for each of the pictures'
    )
  return bootstrap((z_i * z_t).sum(axis=1), groups)


def diversity(z_i: Array, groups: Array | None = None) -> Interval:
  """1 - the mean cosine of two pictures, of a caption where there are groups; 0 if all are alike.

  The mean of the groups, each of which counts the same, with its 95% interval. Groups of one
  picture are left out.

  Args:
    z_i: [n, d] embeddings, of any norm.
    groups: int [n], the caption of each; None takes all as one, whose interval has no width.

  Raises:
    UnclipError: no group has two pictures, or an embedding is zero.
  """
  z_i = unit_rows(z_i)
  labels = np.zeros(len(z_i), int) if groups is None else np.unique(groups, return_inverse=True)[1]
  counts = np.bincount(labels)
  sums = np.zeros((len(counts), z_i.shape[-1]))
  np.add.at(sums, labels, z_i)
  several = counts > 1
  if not several.any():
    raise UnclipError('diversity needs at least 2 pictures of a caption: draw more of each')
  counts = counts[several]
  # The sum over all pairs of rows is the square of their sum; pairs of a row with itself are 1.
  cosines = ((sums[several] ** 2).sum(axis=1) - counts) / (counts * (counts - 1))
  return bootstrap(1 - cosines)


def unit_rows(features: Array) -> np.ndarray:
  """Rows of unit norm, float64.

  Raises:
    UnclipError: a row is zero or not finite.
  """
  rows = np.asarray(features, np.float64)
  norms = np.linalg.norm(rows, axis=-1, keepdims=True)
  if not (np.isfinite(norms) & (norms > 0)).all():
    raise UnclipError('an embedding is zero or not finite: see to the pictures and the network')
  return rows / norms
