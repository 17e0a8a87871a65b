"""Training losses: the simple loss, min-SNR weighting, and the hybrid loss of Improved DDPM.

L_hybrid = L_simple + 0.001 L_vlb (Improved DDPM, Nichol & Dhariwal 2021, eq. 16). L_vlb trains
the variance alone: the mean in it is a constant to the gradient. It is counted in bits per
dimension and estimated from one timestep of T, which makes its weight 0.001 T.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from unclip_jax.diffusion import gaussian
from unclip_jax.types import Array, Step

# Half the width of one of 256 grey levels between -1 and 1.
HALF_LEVEL = 1 / 255
# guided-diffusion: the least probability of a grey level, 40 bits.
MIN_PROBABILITY = 1e-12
# A variance e^10 times too small is far outside the learned range. From there on exp goes on as
# its tangent: the loss stays convex and falls, the gradient stays finite.
MAX_EXPONENT = 10.0


def _mean(x: Array) -> Array:
  return x.reshape(x.shape[0], -1).mean(axis=1)


def _bounded_exp(x: Array) -> Array:
  return jnp.exp(jnp.minimum(x, MAX_EXPONENT)) * (1 + jnp.maximum(x - MAX_EXPONENT, 0.0))


def _log_level_probability(x_0: Array, error: Array, inverse_std: Array) -> Array:
  """log of the mass of N(x_0 - error, std^2) over the grey level of x_0 (DDPM, eq. 13).

  The first and last levels reach to infinity.
  """
  # Mirrored so that the level lies below the mean, where differences of ndtr keep their digits.
  distance = jnp.abs(error)
  inner = ndtr((HALF_LEVEL - distance) * inverse_std) - ndtr((-HALF_LEVEL - distance) * inverse_std)
  first = ndtr((HALF_LEVEL + error) * inverse_std)
  last = ndtr((HALF_LEVEL - error) * inverse_std)
  mass = jnp.where(x_0 < -0.999, first, jnp.where(x_0 > 0.999, last, inner))
  return jnp.log(jnp.maximum(mass, MIN_PROBABILITY))


def diffusion_loss(
  output: Array,
  x_0: Array,
  eps: Array,
  x_t: Array,
  step_b: Step,
  prediction_type: gaussian.PredictionType,
  learned_variance: bool,
  min_snr_gamma: float | None = None,
  vlb_weight: float = 1.0,
  noise_power: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
  """The loss of each sample: L_simple, plus vlb_weight * L_vlb where the variance is learned.

  Args:
    output: [b, ..., c or 2 c], the network at x_t, any float type.
    x_0: [b, ..., c]; with learned_variance an image of 256 levels within [-1, 1].
    eps: [b, ..., c], unit noise.
    x_t: [b, ..., c], q_sample(x_0, eps, step_b), in float32 where the variance is learned.
    step_b: rows of the training table, arrays [b].
    prediction_type: 'eps', 'x_0' or 'v', what L_simple is the mean squared error of.
    learned_variance: whether the second half of the channels is a learned range.
    min_snr_gamma: weights L_simple by min-SNR (the authors take 5); None weights it by 1.
    vlb_weight: 0.001 T; 1.0 for a schedule of 1000 steps.
    noise_power: weights L_simple by sigma_t ** noise_power, sigma_t^2 = 1 - alpha_bar. On v, 2 is
      the squared error of x_0; 1 lies between, and spends little on the least noise, which no
      picture shows.

  Returns:
    loss float32 [b], and {'mse': [b] unweighted, 'vlb': [b] bits per dimension, if learned}.

  Raises:
    ValueError: the output's shape does not fit, or the prediction type is unknown.
  """
  prediction_channels, variance = gaussian.split_output(output, x_t, learned_variance)
  target = gaussian.training_target(x_0, eps, step_b, prediction_type)
  mse = _mean((prediction_channels.astype(jnp.float32) - target) ** 2)
  metrics = {'mse': mse}
  loss = mse
  if min_snr_gamma is not None:
    loss = loss * min_snr_weight(step_b, prediction_type, min_snr_gamma)
  if noise_power:
    loss = loss * jnp.asarray(step_b.noise_var) ** (noise_power / 2)
  if learned_variance:
    fixed = jax.lax.stop_gradient(prediction_channels)
    x_0_pred = gaussian.predict(fixed, x_t, step_b, prediction_type).x_0
    metrics['vlb'] = vlb_term(x_0, x_0_pred, gaussian.learned_log_var(variance, step_b), step_b)
    loss = loss + vlb_weight * metrics['vlb']
  return loss, metrics


def min_snr_weight(step_b: Step, prediction_type: gaussian.PredictionType, gamma: float) -> Array:
  """Min-SNR weights [b]: min(SNR, gamma) on the error of x_0 (Hang et al. 2023, section 3.4).

  On the error of what the network predicts that is min(SNR, gamma) / SNR for eps,
  min(SNR, gamma) for x_0, min(SNR, gamma) / (SNR + 1) for v; SNR = alpha_bar / (1 - alpha_bar).
  """
  snr = jnp.asarray(step_b.alpha_bar) / jnp.asarray(step_b.noise_var)
  match prediction_type:
    case 'eps':
      return jnp.minimum(snr, gamma) / snr
    case 'x_0':
      return jnp.minimum(snr, gamma)
    case 'v':
      return jnp.minimum(snr, gamma) / (snr + 1)
    case _:
      raise ValueError(f"prediction_type {prediction_type!r}: one of 'eps', 'x_0', 'v'")


def vlb_term(x_0: Array, x_0_pred: Array, log_var: Array, step_b: Step) -> Array:
  """One term of the variational bound (DDPM, eq. 5; Improved DDPM, eq. 4-7), bits per dimension.

  The divergence of the model's Gaussian from the posterior q(x_s | x_t, x_0); where x_s is x_0,
  the negative log likelihood of x_0 under the model's Gaussian, integrated over each grey level.

  Args:
    x_0: [b, ...], images of 256 levels within [-1, 1].
    x_0_pred: [b, ...], what the model takes x_0 to be.
    log_var: [b, ...], log variance of the model's Gaussian, any finite value.
    step_b: rows of the training table, arrays [b].

  Returns:
    float32 [b].
  """
  error = x_0.astype(jnp.float32) - x_0_pred
  log_var_min = gaussian.per_sample(step_b.log_var_min, error)
  log_ratio = log_var_min - log_var
  # The means differ by mean_x_0 * error: x_t has the same weight in both.
  distance = gaussian.per_sample(step_b.mean_x_0, error) * error * jnp.exp(-0.5 * log_var_min)
  divergence = 0.5 * (_bounded_exp(log_ratio) * (1 + distance**2) - 1 - log_ratio)
  inverse_std = jnp.exp(-0.5 * log_var_min) * _bounded_exp(0.5 * log_ratio)
  likelihood = _log_level_probability(x_0.astype(jnp.float32), error, inverse_std)
  ends = gaussian.per_sample(step_b.noise_var_next, error) == 0
  return _mean(jnp.where(ends, -likelihood, divergence)) / math.log(2)
