"""Precision and recall of generated images by nearest neighbours (Kynkäänniemi et al. 2019).

A set covers the balls around its rows that reach to their k-th neighbours within the set (equation
1). Precision is how much of what was generated lies where real images do; recall is how much of the
real images lies where generated ones do.
"""

from typing import NamedTuple

import numpy as np

from unclip_jax.types import Array, UnclipError

NUM_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3.1
_BLOCK = 1024  # rows


class PrecisionRecall(NamedTuple):
  """Shares in [0, 1]."""

  precision: float
  recall: float


def precision_recall(generated: Array, real: Array, k: int = NUM_NEIGHBOURS) -> PrecisionRecall:
  """Precision and recall of generated features [n, d], given real ones [m, d]; in float64.

  Args:
    generated: of the generated images.
    real: of real images, best as many.
    k: the neighbour that a ball reaches to, from 1.

  Raises:
    UnclipError: k is not positive, a set has no k-th neighbours, or the widths differ.
  """
  a, b = (np.asarray(features, np.float64) for features in (generated, real))
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
    raise UnclipError(f'features {list(a.shape)} and {list(b.shape)}: wanted are [n, d] and [m, d]')
  if k < 1:
    raise UnclipError(f'neighbour {k}: take 1 or more')
  for rows in (a, b):
    if len(rows) <= k:
      raise UnclipError(
        f'precision and recall by the {k} nearest neighbours need at least {k + 1} images in each '
        f'set, there are {len(rows)}: take more images, or fewer neighbours'
      )
  return PrecisionRecall(_covered(a, b, _radii(b, k)), _covered(b, a, _radii(a, k)))


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
  """The squared distances [n] of rows to their k-th neighbours, themselves not counted."""
  found = []
  for start in range(0, len(rows), _BLOCK):
    distances = _squares(rows[start : start + _BLOCK], rows)
    own = np.arange(len(distances))
    distances[own, start + own] = -1.0  # before all others
    found.append(np.partition(distances, k, axis=1)[:, k])
  return np.concatenate(found)


def _covered(queries: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
  """The share of queries within a ball."""
  inside = [
    (_squares(queries[start : start + _BLOCK], centres) <= radii[None]).any(axis=1)
    for start in range(0, len(queries), _BLOCK)
  ]
  return float(np.concatenate(inside).mean())


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Squared distances [n, m]."""
  squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
  return np.maximum(squares, 0)
