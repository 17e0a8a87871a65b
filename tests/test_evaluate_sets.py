"""Measures of sets of features, against computations of SciPy and numpy that are written out."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
from scipy.spatial.distance import cdist

from unclip_jax.evaluate import kernel
from unclip_jax.evaluate.cosines import clip_score, diversity
from unclip_jax.evaluate.frechet import Moments, distance_of_moments, merge, moments_of
from unclip_jax.evaluate.linear_probe import choose, fit
from unclip_jax.evaluate.neighbours import precision_recall
from unclip_jax.evaluate.retrieval import recall_at
from unclip_jax.types import UnclipError

EXACT = 1e-6  # relative


def draw(n, d, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d))) + shift


# --- Fréchet distance.


def test_moments_of_parts_are_those_of_the_whole_in_any_order():
  # Far from 0, where the mean of squares less the square of the mean would lose all digits.
  rows = draw(257, 5, 0) + 1e6
  parts = [moments_of(rows[a:b]) for a, b in ((40, 257), (0, 0), (1, 40), (0, 1))]
  whole = merge(parts)
  assert whole.count == 257
  np.testing.assert_allclose(whole.mean, rows.mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(whole.cov, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-8)
  turned = merge(parts[::-1])
  np.testing.assert_allclose(turned.cov, whole.cov, rtol=1e-8, atol=1e-8)
  half = draw(50, 5, 1).astype(np.float16)
  np.testing.assert_array_equal(moments_of(half).scatter, moments_of(half.astype('d')).scatter)


def test_distance_of_fewer_rows_than_dimensions_is_that_of_the_samples():
  # The covariances are singular. Their roots' products have the singular values of the product of
  # the centred rows themselves, n by m, which is another way to the same number.
  a, b = draw(12, 40, 0), draw(17, 40, 1, 0.2)
  centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
  cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
  wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * cross
  found = distance_of_moments(moments_of(a), moments_of(b))
  assert found == pytest.approx(wanted, rel=EXACT)
  assert distance_of_moments(moments_of(a), moments_of(a)) == pytest.approx(0, abs=1e-9)


def test_distance_of_gaussians_is_scipys():
  a, b = draw(500, 8, 2), draw(300, 8, 3, 0.1)
  moments = [merge(map(moments_of, np.array_split(x, 7))) for x in (a, b)]
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
  wanted = apart + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  assert distance_of_moments(*moments) == pytest.approx(wanted, rel=EXACT)


# --- Kernels.


def written_out_mmd(a, b, kernel_of_two, unbiased):
  within = []
  for rows in (a, b):
    values = [
      kernel_of_two(x, y)
      for i, x in enumerate(rows)
      for j, y in enumerate(rows)
      if i != j or not unbiased
    ]
    within.append(np.mean(values))
  return sum(within) - 2 * np.mean([kernel_of_two(x, y) for x in a for y in b])


def test_kid_is_the_mean_of_unbiased_cubic_discrepancies(monkeypatch):
  monkeypatch.setattr(kernel, '_BLOCK', 7)  # so that these few rows are of several blocks
  a, b = draw(40, 6, 0), draw(30, 6, 1, 0.3)
  subsets = list(kernel.draw_subsets(40, 30, size=17, num=3, seed=5))
  cubic = lambda x, y: (x @ y / 6 + 1) ** 3  # noqa: E731
  values = [written_out_mmd(a[i], b[j], cubic, True) for i, j in subsets]
  found = kernel.kid(a, b, subsets)
  assert found.mean == pytest.approx(np.mean(values), rel=EXACT)
  assert found.std == pytest.approx(np.std(values), rel=EXACT)
  for i, j in subsets:
    assert len(set(i)) == len(set(j)) == 17 and max(j) < 30
  assert not np.array_equal(subsets[0][0], subsets[1][0])


def test_an_unbiased_discrepancy_is_zero_on_average():
  values = [
    kernel.mmd(draw_half[:25], draw_half[25:], kernel.cubic_kernel)
    for draw_half in np.random.default_rng(0).normal(size=(200, 50, 3))
  ]
  assert min(values) < 0
  assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_cmmd_is_a_gaussian_discrepancy_of_unit_embeddings(monkeypatch):
  monkeypatch.setattr(kernel, '_BLOCK', 7)
  a, b = draw(23, 6, 0), draw(30, 6, 1, 0.3)
  unit_a, unit_b = (x / np.sqrt((x**2).sum(axis=1, keepdims=True)) for x in (a, b))
  gaussian = lambda x, y: np.exp(-((x - y) ** 2).sum() / 200)  # noqa: E731
  wanted = 1000 * written_out_mmd(unit_a, unit_b, gaussian, False)
  assert kernel.cmmd(a, 17 * b) == pytest.approx(wanted, rel=EXACT)
  assert kernel.cmmd(a, a[::-1]) == pytest.approx(0, abs=1e-9)


# --- Precision and recall.


@pytest.mark.parametrize('k', [1, 3])
def test_precision_and_recall_count_what_lies_in_balls(monkeypatch, k):
  monkeypatch.setattr('unclip_jax.evaluate.neighbours._BLOCK', 16)
  real = draw(70, 4, 0)
  # Half of what is generated is narrow, half far away: precise in part, and recalled in part.
  generated = np.concatenate([0.4 * draw(25, 4, 1), draw(25, 4, 2, 6.0)])

  def share(queries, centres):
    radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # the first is the row itself
    return np.mean([any(cdist([q], centres)[0] <= radii) for q in queries])

  wanted = share(generated, real), share(real, generated)
  assert 0 < wanted[0] < 0.6 and 0 < wanted[1] < 1
  assert precision_recall(generated, real, k) == pytest.approx(wanted, rel=EXACT)
  assert precision_recall(real, real, k) == (1.0, 1.0)


# --- Cosines and retrieval.


def test_clip_score_is_the_mean_cosine():
  z_i, z_t = draw(30, 5, 0), draw(30, 5, 1)
  wanted = np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(z_i, z_t, strict=True)])
  found = clip_score(z_i, 3 * z_t)
  assert found.mean == pytest.approx(wanted, rel=EXACT)
  assert found.low < wanted < found.high


def test_diversity_is_one_less_the_mean_cosine_within_captions():
  z_i, groups = draw(9, 5, 0), np.array([4, 4, 7, 4, 9, 9, 1, 9, 9])
  wanted = []
  for group in (4, 9):  # 7 and 1 have one picture each
    rows = z_i[groups == group]
    similar = 1 - cdist(rows, rows, 'cosine')
    wanted.append(1 - similar[~np.eye(len(rows), dtype=bool)].mean())
  assert diversity(z_i, groups).mean == pytest.approx(np.mean(wanted), rel=EXACT)
  whole = 1 - (1 - cdist(z_i, z_i, 'cosine'))[~np.eye(9, dtype=bool)].mean()
  assert diversity(z_i).mean == pytest.approx(whole, rel=EXACT)
  assert diversity(np.ones((3, 2))).mean == pytest.approx(0, abs=1e-12)


def test_recall_at_k_counts_queries_whose_group_is_among_the_nearest(monkeypatch):
  monkeypatch.setattr('unclip_jax.evaluate.retrieval._BLOCK', 4)
  z_i = draw(12, 5, 0)
  caption_groups = np.arange(36) // 3  # three captions a picture
  z_t = z_i[caption_groups] + 2 * draw(36, 5, 1)
  z_i, z_t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z_i, z_t))
  groups = np.arange(12)
  for queries, gallery, own, theirs in (
    (z_i, z_t, groups, caption_groups),
    (z_t, z_i, caption_groups, groups),
  ):
    order = np.argsort(-queries @ gallery.T, axis=1)
    wanted = {
      k: np.mean([own[i] in theirs[row[:k]] for i, row in enumerate(order)]) for k in (1, 3, 7)
    }
    assert 0 < wanted[1] < wanted[3] < wanted[7]
    assert recall_at(queries, gallery, own, theirs, (1, 3, 7)) == pytest.approx(wanted)


def test_what_is_alike_retrieves_nothing():
  alike, groups = np.ones((6, 2)), np.arange(6)
  assert recall_at(alike, alike, groups, groups, (1, 5)) == {1: 0.0, 5: 0.0}
  assert recall_at(np.full((6, 2), np.nan), alike, groups, groups, (5,)) == {5: 0.0}


# --- Linear probe.


@pytest.fixture(scope='module')
def classes():
  rng = np.random.default_rng(0)
  labels = rng.integers(3, size=90)
  features = rng.normal(size=(3, 4))[labels] + 0.9 * rng.normal(size=(90, 4)) + 2
  return features, labels


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float64', EXACT), ('float32', 1e-5)])
def test_a_linear_probe_is_at_the_minimum_that_scipy_finds(classes, dtype, tolerance):
  features, labels = classes
  l2 = 1e-2

  def objective(flat):
    weights, bias = flat[:12].reshape(4, 3), flat[12:]
    log_p = scipy.special.log_softmax(features @ weights + bias, axis=1)
    return -log_p[np.arange(90), labels].mean() + l2 / 2 * (weights**2).sum()

  wanted = scipy.optimize.minimize(
    objective, np.zeros(15), method='BFGS', options={'gtol': 1e-9, 'maxiter': 2000}
  )
  probe = fit(features, labels, 3, l2, tolerance=1e-8 if dtype == 'float64' else 1e-5, dtype=dtype)
  assert 0 < probe.steps < 200
  flat = np.concatenate([probe.weights.ravel(), probe.bias]).astype('d')
  assert objective(flat) == pytest.approx(wanted.fun, rel=tolerance)
  right = scipy.special.softmax(features @ flat[:12].reshape(4, 3) + flat[12:], axis=1)
  share = (right.argmax(axis=1) == labels).mean()
  assert 0.6 < share < 1
  assert probe.accuracy(features, labels) == pytest.approx(share)


def test_the_penalty_is_chosen_on_held_out_features(classes):
  features, labels = classes
  noise = np.random.default_rng(1).normal(size=(90, 30))
  wide = np.concatenate([features, noise], axis=1)
  l2, found = choose(wide[:45], labels[:45], wide[45:], labels[45:], 3, (1e-6, 1e-1))
  assert found[1e-1] > found[1e-6]
  assert l2 == 1e-1


# --- Sets that are too small, and what makes no sense.

TWO, THREE = np.eye(2), np.eye(3)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: merge([]), 'no moments'),
    (lambda: merge([moments_of(TWO), moments_of(THREE)]), 'features 2 and 3 wide'),
    (
      lambda: distance_of_moments(moments_of(TWO), moments_of(TWO[:0])),
      'at least 2 images in each set, there is 0: take at least 20',
    ),
    (lambda: kernel.mmd(TWO[:1], TWO, kernel.cubic_kernel), 'needs at least 2 images'),
    (lambda: kernel.mmd(TWO, THREE, kernel.cubic_kernel), 'wanted are'),
    (lambda: kernel.kid(TWO, TWO, []), 'give at least one'),
    (lambda: kernel.draw_subsets(5, 9, 6), 'over subsets of 6 images needs 6 in each set.* are 5'),
    (lambda: kernel.draw_subsets(5, 9, 1), '100 subsets of 1 images: take .* 2 or more'),
    (lambda: kernel.draw_subsets(5, 9, 3, num=0), '0 subsets'),
    (lambda: kernel.cmmd(TWO, np.zeros((2, 2))), 'is zero'),
    (lambda: precision_recall(THREE, THREE), 'at least 4 images in each set, there are 3'),
    (lambda: precision_recall(THREE, THREE, 0), 'neighbour 0'),
    (lambda: precision_recall(THREE, TWO, 1), 'wanted are'),
    (lambda: clip_score(TWO[:0], TWO[:0]), 'at least one'),
    (lambda: clip_score(TWO, TWO[:1]), 'one of the captions for each'),
    (lambda: diversity(TWO, [0, 1]), 'at least 2 pictures of a caption'),
    (lambda: diversity(np.zeros((2, 2))), 'is zero'),
    (lambda: recall_at(THREE, THREE, [0, 1, 2], [0, 1, 2], [3]), 'R@3 needs .* least 4 .* are 3'),
    (lambda: recall_at(THREE, THREE, [0, 1, 2], [0, 1, 2], [0]), 'R@0 needs a k of 1'),
    (lambda: recall_at(THREE, THREE, [0, 1, 5], [0, 1, 2], [1]), 'nothing of its group'),
    (lambda: recall_at(THREE[:0], THREE, [], [0, 1, 2], [1]), 'no queries'),
    (lambda: fit(TWO, [0, 0], 1, 1.0), '1 classes: .* at least 2'),
    (lambda: fit(TWO, [0, 1], 3, 1.0), 'class 2 has no features'),
    (lambda: fit(TWO, [0, 2], 2, 1.0), 'a label is 2, and there are 2 classes'),
    (lambda: fit(TWO, [0, 1], 2, 0.0), 'l2 0.0: take more'),
    (lambda: fit(TWO, [0, 1, 1], 2, 1.0), 'wanted are'),
    (lambda: fit(np.nan * TWO, [0, 1], 2, 1.0), 'NaN'),
    (lambda: choose(TWO, [0, 1], TWO, [0, 1], 2, ()), 'no l2'),
  ],
)
def test_sets_that_are_too_small_say_what_they_need(call, message):
  with pytest.raises(UnclipError, match=message):
    call()


def test_moments_are_kept_whole():
  found = moments_of(np.zeros((0, 3)))
  assert isinstance(found, Moments) and found.count == 0
  np.testing.assert_array_equal(merge([found, moments_of(THREE)]).cov, np.cov(THREE))
