"""The measures of generated pictures, on cases whose values are known."""

import numpy as np
import pytest
import scipy.linalg

from unclip_jax.evaluate.frechet import frechet_distance
from unclip_jax.evaluate.retrieval import bootstrap, is_first
from unclip_jax.types import UnclipError


def test_frechet_distance_is_that_of_scipys_matrix_root():
  draw = np.random.default_rng(0)
  a = draw.normal(size=(300, 6)) @ draw.normal(size=(6, 6))
  b = draw.normal(size=(200, 6)) @ draw.normal(size=(6, 6)) + 0.5
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(cov_a @ cov_b).real
  wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
  assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
  assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-6)
  assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
  # A shift alone is its squared length; a stretch alone is the squared difference of the widths.
  assert frechet_distance(a, a + 2.0) == pytest.approx(24, rel=1e-6)
  line = draw.normal(size=(100, 1))
  assert frechet_distance(line, 3 * line) == pytest.approx(
    4 * (line.mean() ** 2 + line.var(ddof=1)), rel=1e-6
  )


def test_frechet_distance_warns_of_few_images_and_refuses_one():
  rows = np.random.default_rng(0).normal(size=(50, 5))
  frechet_distance(rows, rows)
  with pytest.warns(UserWarning, match=r'49 images are few .* 5 dimensions.*take at least 50'):
    frechet_distance(rows, rows[1:])
  with pytest.raises(UnclipError, match='needs at least 2 images in each set, there is 1'):
    frechet_distance(rows, rows[:1])
  with pytest.raises(UnclipError, match='features 5 and 4 wide'):
    frechet_distance(rows, rows[:, 1:])
  with pytest.raises(UnclipError, match='wanted are'):
    frechet_distance(rows, rows[0])
  with pytest.raises(UnclipError, match='NaN'):
    frechet_distance(rows, np.full((50, 5), np.nan))


def test_a_query_is_first_if_its_own_row_beats_all_others():
  gallery = np.eye(4)
  queries = np.array([[1.0, 0.9, 0, 0], [1.0, 0.9, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0.1]])
  found = is_first(queries, gallery, np.array([0, 1, 2, 3]))
  assert found.tolist() == [True, False, False, True]  # the third is a tie
  assert not is_first(np.ones((3, 2)), np.ones((5, 2)), np.arange(3)).any()


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
  draw = np.random.default_rng(0)
  intervals = [bootstrap(draw.random(60) < 0.4, num_draws=300, seed=i) for i in range(300)]
  covered = np.mean([i.low <= 0.4 <= i.high for i in intervals])
  assert 0.9 < covered < 0.985
  assert all(i.low <= i.mean <= i.high for i in intervals)


def test_bootstrap_draws_groups_whole():
  values, groups = np.repeat([0.0, 1.0] * 20, 4), np.repeat(np.arange(40), 4)
  apart, together = bootstrap(values), bootstrap(values, groups)
  assert apart.mean == together.mean == 0.5
  # Four alike are worth one: the interval is twice as wide.
  assert 1.6 < (together.high - together.low) / (apart.high - apart.low) < 2.4
  assert str(bootstrap([1.0, 1.0])) == '1.000 [1.000, 1.000]'
  with pytest.raises(UnclipError, match='at least one'):
    bootstrap([])
