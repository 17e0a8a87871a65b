"""The Fréchet distance between two sets of features (Heusel et al. 2017, equation 6)."""

import numpy as np

from unclip_jax.types import Array, UnclipError

MIN_ROWS_A_DIMENSION = 10  # with fewer, the covariances are mostly noise, and so the distance


def frechet_distance(features_a: Array, features_b: Array) -> float:
  """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in float64.

  Args:
    features_a: [n, d], of one set of images.
    features_b: [m, d], of the other.

  Raises:
    UnclipError: the widths differ, or a set has fewer than ten rows a dimension, whose distance
      would tell more of its size than of its images.
  """
  sets = [np.asarray(features, np.float64) for features in (features_a, features_b)]
  if sets[0].ndim != 2 or sets[1].ndim != 2 or sets[0].shape[1] != sets[1].shape[1]:
    raise UnclipError(f'features {sets[0].shape} and {sets[1].shape}: wanted are [n, d] and [m, d]')
  for rows in sets:
    if len(rows) < MIN_ROWS_A_DIMENSION * rows.shape[1]:
      raise UnclipError(
        f'{len(rows)} images are too few for a Fréchet distance on {rows.shape[1]} dimensions: '
        f'take at least {MIN_ROWS_A_DIMENSION * rows.shape[1]}'
      )
  (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in sets)
  cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
  # The eigenvalues of cov_a cov_b are those of the symmetric root_a cov_b root_a.
  values, vectors = np.linalg.eigh(cov_a)
  root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  between = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
  cross = np.sqrt(np.maximum(between, 0)).sum()
  distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
  return float(max(distance, 0.0))
