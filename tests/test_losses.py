"""Losses against float64 formulas of their own, what they may train, and extreme outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from unclip_jax.diffusion import gaussian, losses
from unclip_jax.diffusion.schedule import cosine_schedule, take_rows, training_table

SCHEDULE = cosine_schedule()
TABLE = training_table(SCHEDULE)
T_B = np.array([0, 1, 30, 700, 999, 0])
STEP_B = take_rows(TABLE, T_B)
SHAPE = (6, 5, 4, 3)


def normals(seed):
  return np.random.default_rng(seed).normal(size=SHAPE).astype('f')


def image(seed=0):
  levels = np.random.default_rng(seed).integers(0, 256, SHAPE)
  levels[:, 0], levels[:, 1] = 0, 255
  return (levels / 127.5 - 1).astype('f')


def vlb_bits(x_0, x_0_pred, x_t, log_var, t):
  """DDPM, eq. 5 and 13, term by term in float64."""
  alpha_bar = SCHEDULE.alpha_bar[t]
  before = SCHEDULE.alpha_bar[t - 1] if t else 1.0
  beta = 1 - alpha_bar / before
  a = np.sqrt(before) * beta / (1 - alpha_bar)
  b = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
  mean, true_mean = a * x_0_pred + b * x_t, a * x_0 + b * x_t
  if t:
    true_var = beta * (1 - before) / (1 - alpha_bar)
    ratio = true_var / np.exp(log_var)
    nats = 0.5 * (ratio - 1 - np.log(ratio) + (mean - true_mean) ** 2 / np.exp(log_var))
  else:
    model = stats.norm(mean, np.exp(0.5 * log_var))
    upper = np.where(x_0 > 0.999, 1.0, model.cdf(x_0 + 1 / 255))
    lower = np.where(x_0 < -0.999, 0.0, model.cdf(x_0 - 1 / 255))
    nats = -np.log(np.maximum(upper - lower, 1e-12))
  return nats.mean() / np.log(2)


@pytest.mark.parametrize('prediction_type', ['eps', 'x_0', 'v'])
def test_the_hybrid_loss_is_its_formula(prediction_type):
  x_0, eps = image(), normals(1)
  x_t = np.asarray(gaussian.q_sample(x_0, eps, STEP_B))
  target = np.asarray(gaussian.training_target(x_0, eps, STEP_B, prediction_type))
  # Errors as of a trained network: small where x_0 is nearly visible.
  wrong = target + normals(2) * np.where(T_B < 100, 0.05, 0.5).reshape(-1, 1, 1, 1)
  output = np.concatenate([wrong, normals(3)], axis=-1).astype('f')
  loss, metrics = losses.diffusion_loss(output, x_0, eps, x_t, STEP_B, prediction_type, True)
  np.testing.assert_allclose(metrics['mse'], ((wrong - target) ** 2).mean((1, 2, 3)), rtol=1e-5)
  np.testing.assert_allclose(loss, metrics['mse'] + metrics['vlb'], rtol=1e-6)
  log_var = np.asarray(gaussian.learned_log_var(normals(3), STEP_B), np.float64)
  x_0_pred = np.asarray(gaussian.predict(wrong, x_t, STEP_B, prediction_type).x_0, np.float64)
  for i, t in enumerate(T_B):
    expected = vlb_bits(x_0[i].astype(np.float64), x_0_pred[i], x_t[i], log_var[i], t)
    # 1e-4: (x_0 - x_0_pred) / std at t = 1 divides a float32 rounding of x_0_pred by 0.005.
    # 1e-8: two bounds that nearly agree, at t = 999, leave next to nothing to diverge.
    assert metrics['vlb'][i] == pytest.approx(expected, rel=1e-4, abs=1e-8), t


def test_weights():
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, STEP_B)
  output = np.concatenate([normals(2), normals(3)], axis=-1)
  loss, metrics = losses.diffusion_loss(
    output, x_0, eps, x_t, STEP_B, 'eps', True, min_snr_gamma=5.0, vlb_weight=0.25
  )
  weight = losses.min_snr_weight(STEP_B, 'eps', 5.0)
  np.testing.assert_allclose(loss, weight * metrics['mse'] + 0.25 * metrics['vlb'], rtol=1e-5)


def test_a_perfect_network_has_no_loss():
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, STEP_B)
  output = np.concatenate([eps, np.full(SHAPE, -1, 'f')], axis=-1)
  _, metrics = losses.diffusion_loss(output, x_0, eps, x_t, STEP_B, 'eps', True)
  assert not metrics['mse'].any()
  # x_0 and x_t are float32: their roundings are seen through 1 / std.
  np.testing.assert_allclose(metrics['vlb'][T_B > 0], 0, atol=1e-6)
  assert (metrics['vlb'][T_B == 0] > 0.1).all()


def test_the_bound_trains_the_variance_alone():
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, STEP_B)
  prediction, variance = normals(2), normals(3)

  def total(prediction, variance, learned):
    output = jnp.concatenate([prediction, variance], -1) if learned else prediction
    return losses.diffusion_loss(output, x_0, eps, x_t, STEP_B, 'eps', learned)[0].sum()

  hybrid, to_variance = jax.grad(total, (0, 1))(prediction, variance, True)
  simple = jax.grad(total)(prediction, variance, False)
  np.testing.assert_allclose(hybrid, simple, rtol=1e-6)
  assert (jnp.abs(to_variance).mean((1, 2, 3)) > 0).all()


def test_the_variance_goes_to_the_error_that_the_mean_makes():
  # The best variance of a Gaussian is its own plus the mean's squared error (Bao et al. 2022).
  t = 700
  step = take_rows(TABLE, jnp.array([t]))
  x_0, error = jnp.zeros((1, 20_000)), 0.3 * jax.random.normal(jax.random.key(0), (1, 20_000))
  best = np.exp(step.log_var_min) + (step.mean_x_0 * 0.3) ** 2
  grid = jnp.log(best) + jnp.linspace(-0.02, 0.02, 41)
  bits = jax.vmap(lambda v: losses.vlb_term(x_0, error, jnp.full_like(x_0, v), step)[0])(grid)
  # The minimum is flat: the sample's own error has a deviation of 1% of its square.
  assert abs(grid[jnp.argmin(bits)] - jnp.log(best)[0]) <= 0.01


@pytest.mark.parametrize('gamma', [1.0, 5.0])
def test_min_snr_weights_one_and_the_same_error_of_x_0(gamma):
  # Whatever the network predicts, the weighted loss is min(SNR, gamma) |x_0 - x_0_pred|^2.
  step_b = take_rows(TABLE, jnp.array([5, 50, 300, 600, 800, 950]))
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, step_b)
  x_0_pred = x_0 + 0.3 * normals(2)
  eps_pred = gaussian.eps_from_x_0(x_t, x_0_pred, step_b)
  outputs = {
    'x_0': x_0_pred,
    'eps': eps_pred,
    'v': gaussian.v_from_x_0(x_0_pred, eps_pred, step_b),
  }
  alpha_bar = SCHEDULE.alpha_bar[[5, 50, 300, 600, 800, 950]]
  snr = alpha_bar / (1 - alpha_bar)
  assert snr.min() < gamma < snr.max()
  expected = np.minimum(snr, gamma) * ((x_0_pred - x_0) ** 2).mean((1, 2, 3))
  for prediction_type, output in outputs.items():
    loss, _ = losses.diffusion_loss(
      output, x_0, eps, x_t, step_b, prediction_type, False, min_snr_gamma=gamma
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4, err_msg=prediction_type)


def test_v_weighted_by_the_noise_variance_is_the_error_of_x_0():
  step_b = take_rows(TABLE, jnp.array([5, 50, 300, 600, 800, 950]))
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, step_b)
  x_0_pred = x_0 + 0.3 * normals(2)
  v = gaussian.v_from_x_0(x_0_pred, gaussian.eps_from_x_0(x_t, x_0_pred, step_b), step_b)
  noise_var = 1 - SCHEDULE.alpha_bar[[5, 50, 300, 600, 800, 950]]
  error = ((x_0_pred - x_0) ** 2).mean((1, 2, 3))
  for power, expected in ((2.0, error), (1.0, error * noise_var**-0.5), (0.0, error / noise_var)):
    args = (v, x_0, eps, x_t, step_b, 'v', False)
    loss, metrics = losses.diffusion_loss(*args, noise_power=power)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    np.testing.assert_allclose(metrics['mse'], error / noise_var, rtol=1e-3)


@pytest.mark.parametrize('prediction_type', ['eps', 'x_0', 'v'])
@pytest.mark.parametrize('size', [0.0, 1.0, 30.0, 1e3, 3e4])
@pytest.mark.parametrize('sign', [-1, 1])
def test_extreme_bfloat16_outputs_leave_loss_and_gradient_finite(prediction_type, size, sign):
  x_0, eps = image(), normals(1)
  x_t = gaussian.q_sample(x_0, eps, STEP_B).astype(jnp.bfloat16)
  prediction = jnp.asarray(size * normals(2), jnp.bfloat16)
  variance = jnp.full(SHAPE, sign * size, jnp.bfloat16)
  output = jnp.concatenate([prediction, variance], axis=-1)

  def total(output):
    return losses.diffusion_loss(
      output, x_0, eps, x_t, STEP_B, prediction_type, True, min_snr_gamma=5.0
    )[0].sum()

  loss, gradient = jax.value_and_grad(total)(output)
  assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
  assert np.isfinite(loss)
  assert jnp.isfinite(gradient).all()


def test_a_variance_far_too_small_is_pushed_up_not_lost():
  # Where exp would overflow the bound goes on as a straight line, with its slope.
  step = take_rows(TABLE, jnp.array([500]))
  x_0, x_0_pred = jnp.zeros((1, 3)), jnp.full((1, 3), 0.1)
  slope = jax.grad(lambda v: losses.vlb_term(x_0, x_0_pred, jnp.full((1, 3), v), step)[0])
  for log_var in (-30.0, -200.0, -1e4):
    assert -1e6 < slope(log_var) < -1e3


def test_unknown_types_and_shapes():
  x = jnp.zeros(SHAPE)
  with pytest.raises(ValueError, match='noise'):
    losses.diffusion_loss(x, x, x, x, STEP_B, 'noise', False)
  with pytest.raises(ValueError, match='noise'):
    losses.min_snr_weight(STEP_B, 'noise', 5.0)
  with pytest.raises(ValueError, match='expected'):
    losses.diffusion_loss(x, x, x, x, STEP_B, 'eps', True)
