"""Principal components of a stream: against numpy on all rows at once, and what they leave out."""

import numpy as np
import pytest

from unclip_jax.train import pca
from unclip_jax.types import UnclipError


def rows_of(n=400, d=7, seed=0):
  """Correlated, of a mean that is not zero, each direction of another variance."""
  draw = np.random.default_rng(seed)
  mix = draw.normal(size=(d, d)) * 0.7 ** np.arange(d)[:, None]
  return draw.normal(size=(n, d)) @ mix + draw.normal(size=d)


def in_batches(rows, size=37):
  return [rows[i : i + size] for i in range(0, len(rows), size)]


def signed(components):
  """Rows whose largest entry is positive, one by one."""
  return np.array([row * (1 if row[np.argmax(abs(row))] > 0 else -1) for row in components])


def test_components_of_a_stream_are_those_of_all_rows():
  rows = rows_of()
  found = pca.fit(in_batches(rows))
  eigenvalues, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
  assert found.count == 400
  np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-12)
  np.testing.assert_allclose(found.eigenvalues, eigenvalues[::-1], rtol=1e-10)
  assert (np.diff(found.eigenvalues) < 0).all()
  np.testing.assert_allclose(found.components, signed(vectors.T[::-1]), atol=1e-9)
  np.testing.assert_allclose(found.components @ found.components.T, np.eye(7), atol=1e-12)


def test_neither_batches_nor_shards_nor_a_sign_of_the_rows_change_them():
  rows = rows_of()
  found = pca.fit([rows])
  sharded = pca.components_of(pca.merge(pca.add(None, rows[:99]), pca.add(None, rows[99:])))
  with_nothing = pca.fit([rows[:0], rows[:1], rows[1:1], rows[1:]])
  mirrored = pca.fit([-rows])
  for other in (sharded, with_nothing, mirrored):
    np.testing.assert_allclose(other.eigenvalues, found.eigenvalues, rtol=1e-10)
    np.testing.assert_allclose(other.components, found.components, atol=1e-9)


def test_a_mean_far_from_zero_costs_no_digits():
  rows = rows_of()
  far = pca.fit(in_batches(rows + 1e6))
  near = pca.fit([rows])
  # float64 holds rows of a million to 1e-10. Sums of squares would keep 1e-4 of the variances.
  np.testing.assert_allclose(far.eigenvalues, near.eigenvalues, rtol=1e-6)


def test_error_shares_are_those_of_reconstructions():
  rows = rows_of()
  found = pca.fit(in_batches(rows))
  shares = pca.error_shares(found)
  centred = rows - rows.mean(axis=0)
  for k in range(8):
    kept = found.components[:k]
    error = ((centred - centred @ kept.T @ kept) ** 2).sum()
    np.testing.assert_allclose(shares[k], error / (centred**2).sum(), atol=1e-12)
  for k in range(1, 8):
    just_above = (shares[k - 1] + shares[k]) / 2
    assert pca.num_components(found, just_above) == k
  assert pca.num_components(found, 2.0) == 1


def test_what_can_be_no_components_is_refused():
  rows = rows_of()
  broken = rows.copy()
  broken[123, 4] = np.inf
  for call, message in (
    (lambda: pca.fit([rows[:7]]), '7 embeddings are too few .* 7 dimensions: give 8 or more'),
    (lambda: pca.fit([]), 'there are no embeddings'),
    (lambda: pca.fit(in_batches(broken)), 'embedding 123 is not finite'),
    (lambda: pca.fit([rows, rows[:, :3]]), r'\[400, 3\]: they must be \[b, 7\]'),
    (lambda: pca.fit([rows[0]]), r'shape \[7\]'),
    (lambda: pca.num_components(pca.fit([rows]), 0.0), 'more than 0'),
  ):
    with pytest.raises(UnclipError, match=message):
      call()
