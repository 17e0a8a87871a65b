"""The Gaussian process against float64 formulas of its own, and round trips of x_0, eps, v."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, guidance
from unclip_jax.diffusion.schedule import cosine_schedule, make_plan, take_rows, training_table

SCHEDULE = cosine_schedule()
TABLE = training_table(SCHEDULE)
T_B = np.array([0, 40, 500, 900])
STEP_B = take_rows(TABLE, T_B)
SHAPE = (4, 5, 3, 3)


def normals(seed, shape=SHAPE):
  return np.random.default_rng(seed).normal(size=shape)


def column(values, rank=4):
  return np.asarray(values, np.float64).reshape(-1, *(1,) * (rank - 1))


def scalar_step(t):
  return jax.tree.map(lambda values: jnp.asarray(values[t]), TABLE)


@pytest.mark.parametrize('shape', [SHAPE, (4, 7)])
def test_q_sample_is_equation_4(shape):
  x_0, eps = normals(0, shape), normals(1, shape)
  alpha_bar = column(SCHEDULE.alpha_bar[T_B], len(shape))
  expected = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
  actual = gaussian.q_sample(x_0.astype('f'), eps.astype('f'), STEP_B)
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_posterior_is_the_product_of_two_gaussians():
  # Bayes, in precisions: q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0).
  t, s = 600, 450
  alpha_bar, alpha_bar_next = SCHEDULE.alpha_bar[[t, s]]
  ratio = alpha_bar / alpha_bar_next
  precision = ratio / (1 - ratio) + 1 / (1 - alpha_bar_next)
  x_0, x_t = normals(0), normals(1)
  mean = np.sqrt(ratio) / (1 - ratio) * x_t + np.sqrt(alpha_bar_next) / (1 - alpha_bar_next) * x_0
  step = jax.tree.map(lambda values: values[0], make_plan(SCHEDULE, [t, s]))
  actual = gaussian.posterior_mean(x_0.astype('f'), x_t.astype('f'), step)
  np.testing.assert_allclose(actual, mean / precision, rtol=2e-6, atol=1e-6)
  assert np.exp(step.log_var_min) == pytest.approx(1 / precision, rel=1e-6)
  assert step.sigma**2 == pytest.approx(1 / precision, rel=1e-6)


@pytest.mark.parametrize('prediction_type', ['eps', 'x_0', 'v'])
@pytest.mark.parametrize('scalar', [True, False])
def test_a_perfect_network_gives_x_0_and_eps_back(prediction_type, scalar):
  step = scalar_step(500) if scalar else STEP_B
  x_0, eps = normals(0).astype('f'), normals(1).astype('f')
  x_t = gaussian.q_sample(x_0, eps, step)
  output = gaussian.training_target(x_0, eps, step, prediction_type)
  prediction = gaussian.predict(output, x_t, step, prediction_type)
  # Dividing by the smaller of signal and noise (both above 0.0064) amplifies a rounding.
  np.testing.assert_allclose(prediction.x_0, x_0, atol=1e-5)
  np.testing.assert_allclose(prediction.eps, eps, atol=1e-4)
  assert prediction.log_var is None


def test_v_is_the_velocity_of_the_angle():
  # Salimans & Ho: v = d x / d phi with signal = cos(phi), noise = sin(phi).
  phi, x_0, eps = 0.7, normals(0), normals(1)
  velocity = -np.sin(phi) * x_0 + np.cos(phi) * eps
  step = STEP_B._replace(
    alpha_bar=jnp.full(4, np.cos(phi) ** 2), noise_var=jnp.full(4, np.sin(phi) ** 2)
  )
  actual = gaussian.v_from_x_0(x_0.astype('f'), eps.astype('f'), step)
  np.testing.assert_allclose(actual, velocity, atol=1e-6)


def test_the_learned_range_ends_at_posterior_and_beta():
  x_t = normals(0).astype('f')
  for channel, expected in ((-1.0, STEP_B.log_var_min), (1.0, STEP_B.log_var_max)):
    output = np.concatenate([x_t, np.full_like(x_t, channel)], axis=-1)
    log_var = gaussian.predict(output, x_t, STEP_B, 'eps', learned_variance=True).log_var
    np.testing.assert_allclose(log_var, np.broadcast_to(column(expected), SHAPE), rtol=1e-6)
  middle = gaussian.learned_log_var(jnp.zeros(SHAPE), STEP_B)
  expected = (column(STEP_B.log_var_min) + column(STEP_B.log_var_max)) / 2
  np.testing.assert_allclose(middle, np.broadcast_to(expected, SHAPE), rtol=1e-6)


@pytest.mark.parametrize('prediction_type', ['eps', 'x_0', 'v'])
def test_a_limited_x_0_takes_eps_along(prediction_type):
  x_t, output = normals(0).astype('f'), 2 * normals(1).astype('f')
  step = scalar_step(300)
  limited = gaussian.predict(output, x_t, step, prediction_type, False, guidance.clip_x_0(0.5))
  free = gaussian.predict(output, x_t, step, prediction_type)
  assert np.abs(limited.x_0).max() == 0.5 and np.abs(free.x_0).max() > 1
  np.testing.assert_allclose(gaussian.q_sample(limited.x_0, limited.eps, step), x_t, atol=1e-5)
  inside = np.abs(free.x_0) <= 0.5
  assert inside.any()
  assert np.array_equal(limited.eps[inside], free.eps[inside])


@pytest.mark.parametrize('prediction_type', ['eps', 'x_0', 'v'])
@pytest.mark.parametrize('limit_x_0', [None, guidance.clip_x_0(0.5)])
def test_predictions_at_x_0_itself_are_finite(prediction_type, limit_x_0):
  plan = make_plan(SCHEDULE, [5], from_x_0=True, to_x_0=False)
  step = jax.tree.map(lambda values: values[0], plan)
  prediction = gaussian.predict(
    normals(0).astype('f'), normals(1).astype('f'), step, prediction_type, False, limit_x_0
  )
  assert np.isfinite(prediction.x_0).all() and np.isfinite(prediction.eps).all()


def test_bfloat16_outputs_are_taken_to_float32_first():
  x_t = normals(0).astype('f')
  output = jnp.asarray(normals(1, (*SHAPE[:-1], 6)), jnp.bfloat16)
  low = gaussian.predict(output, x_t, STEP_B, 'eps', True)
  exact = gaussian.predict(output.astype(jnp.float32), x_t, STEP_B, 'eps', True)
  for a, b in zip(low, exact, strict=True):
    assert a.dtype == jnp.float32
    assert np.array_equal(a, b)


def test_misshapen_outputs_and_unknown_types():
  x_t = jnp.zeros(SHAPE)
  with pytest.raises(ValueError, match=r'expected \(4, 5, 3, 6\)'):
    gaussian.predict(x_t, x_t, STEP_B, 'eps', learned_variance=True)
  with pytest.raises(ValueError, match=r'expected \(4, 5, 3, 3\)'):
    gaussian.predict(jnp.zeros((4, 5, 3, 6)), x_t, STEP_B, 'eps')
  with pytest.raises(ValueError, match='noise'):
    gaussian.predict(x_t, x_t, STEP_B, 'noise')
  with pytest.raises(ValueError, match='noise'):
    gaussian.training_target(x_t, x_t, STEP_B, 'noise')
