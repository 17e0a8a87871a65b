"""The Gaussian process: q(x_t | x_0), its posterior, and what a network's output says of them.

x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps. DDPM (Ho et al. 2020) eq. 4-7, Improved DDPM
(Nichol & Dhariwal 2021) eq. 15 for the learned variance, Salimans & Ho 2022 for v. A `Step` here
holds scalars (a row of a plan, in a sampling loop) or vectors [b] (rows of a training table).
Everything is computed in float32, whatever the network runs in.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from unclip_jax.types import Array, Prediction, Step

PredictionType = Literal['eps', 'x_0', 'v']


def _f32(x: Array) -> Array:
  return jnp.asarray(x, jnp.float32)


def _reciprocal(noise: Array) -> Array:
  """1 / noise, and 0 where there is none."""
  return jnp.where(noise > 0, 1 / jnp.where(noise > 0, noise, 1.0), 0.0)


def per_sample(coefficient: Array, x: Array) -> Array:
  """A coefficient, () or [b], as float32 with the rank of x [b, ...], to multiply it with."""
  coefficient = jnp.asarray(coefficient, jnp.float32)
  return coefficient.reshape(coefficient.shape + (1,) * (jnp.ndim(x) - coefficient.ndim))


def signal_and_noise(step: Step, x: Array) -> tuple[Array, Array]:
  """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at x_t, with the rank of x."""
  return jnp.sqrt(per_sample(step.alpha_bar, x)), jnp.sqrt(per_sample(step.noise_var, x))


def q_sample(x_0: Array, eps: Array, step: Step) -> Array:
  """x_t [b, ...] from x_0 and unit noise eps (DDPM, eq. 4)."""
  signal, noise = signal_and_noise(step, x_0)
  return signal * _f32(x_0) + noise * _f32(eps)


def x_0_from_eps(x_t: Array, eps: Array, step: Step) -> Array:
  """x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (DDPM, eq. 15)."""
  signal, noise = signal_and_noise(step, x_t)
  return (_f32(x_t) - noise * _f32(eps)) / signal


def eps_from_x_0(x_t: Array, x_0: Array, step: Step) -> Array:
  """eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar).

  0 where alpha_bar is 1: x_0 says nothing of the noise there.
  """
  signal, noise = signal_and_noise(step, x_t)
  return (_f32(x_t) - signal * _f32(x_0)) * _reciprocal(noise)


def v_from_x_0(x_0: Array, eps: Array, step: Step) -> Array:
  """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, appendix D)."""
  signal, noise = signal_and_noise(step, x_0)
  return signal * _f32(eps) - noise * _f32(x_0)


def x_0_from_v(x_t: Array, v: Array, step: Step) -> Array:
  """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
  signal, noise = signal_and_noise(step, x_t)
  return signal * _f32(x_t) - noise * _f32(v)


def eps_from_v(x_t: Array, v: Array, step: Step) -> Array:
  """eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
  signal, noise = signal_and_noise(step, x_t)
  return signal * _f32(v) + noise * _f32(x_t)


def posterior_mean(x_0: Array, x_t: Array, step: Step) -> Array:
  """The mean of q(x_s | x_t, x_0) (DDPM, eq. 7); of q(x_s | x_t) where the step goes up."""
  return per_sample(step.mean_x_0, x_t) * _f32(x_0) + per_sample(step.mean_x_t, x_t) * _f32(x_t)


def learned_log_var(output: Array, step: Step) -> Array:
  """The log variance between log_var_min (output -1) and log_var_max (1).

  Improved DDPM, eq. 15, with v = (output + 1) / 2 as in its code. The output is not bounded.
  """
  low, high = per_sample(step.log_var_min, output), per_sample(step.log_var_max, output)
  v = (_f32(output) + 1) / 2
  return low + v * (high - low)


def split_output(output: Array, x_t: Array, learned_variance: bool) -> tuple[Array, Array | None]:
  """The prediction channels [b, ..., c] of a network's output, and those of its variance or None.

  Raises:
    ValueError: the output has neither the c channels of x_t nor, with learned_variance, 2 c.
  """
  expected = (*jnp.shape(x_t)[:-1], jnp.shape(x_t)[-1] * (2 if learned_variance else 1))
  if jnp.shape(output) != expected:
    raise ValueError(f'the network returned {jnp.shape(output)}, expected {expected}')
  return tuple(jnp.split(output, 2, axis=-1)) if learned_variance else (output, None)


def predict(
  output: Array,
  x_t: Array,
  step: Step,
  prediction_type: PredictionType,
  learned_variance: bool = False,
  limit_x_0: Callable[[Array], Array] | None = None,
  keep_eps: bool = False,
) -> Prediction:
  """What a network's output at x_t says of x_0, of the noise and of the variance of x_s.

  Args:
    output: [b, ..., c], or [b, ..., 2 c] with learned_variance (prediction first), any float type.
    x_t: [b, ..., c].
    step: the transition; scalars or [b].
    prediction_type: what the network predicts, 'eps', 'x_0' or 'v'.
    learned_variance: whether the second half of the channels is a learned range.
    limit_x_0: bounds x_0 (guidance.clip_x_0, guidance.dynamic_threshold). eps then follows the
      bounded x_0, so that both describe the same x_t.
    keep_eps: whether eps stays what the network said, also where x_0 is bounded.

  Returns:
    Prediction in float32.

  Raises:
    ValueError: the output's shape does not fit, or the prediction type is unknown.
  """
  output, variance = split_output(output, x_t, learned_variance)
  match prediction_type:
    case 'eps':
      x_0, eps = x_0_from_eps(x_t, output, step), _f32(output)
    case 'x_0':
      x_0, eps = _f32(output), eps_from_x_0(x_t, output, step)
    case 'v':
      x_0, eps = x_0_from_v(x_t, output, step), eps_from_v(x_t, output, step)
    case _:
      raise ValueError(f"prediction_type {prediction_type!r}: one of 'eps', 'x_0', 'v'")
  if limit_x_0 is not None:
    signal, noise = signal_and_noise(step, x_t)
    limited = limit_x_0(x_0)
    if not keep_eps:
      # As a correction: where nothing was limited, eps stays what the network said, to the bit.
      eps = eps + (x_0 - limited) * signal * _reciprocal(noise)
    x_0 = limited
  return Prediction(x_0, eps, None if variance is None else learned_log_var(variance, step))


def training_target(x_0: Array, eps: Array, step: Step, prediction_type: PredictionType) -> Array:
  """What a network of this prediction type should return for x_t = q_sample(x_0, eps, step)."""
  match prediction_type:
    case 'eps':
      return _f32(eps)
    case 'x_0':
      return _f32(x_0)
    case 'v':
      return v_from_x_0(x_0, eps, step)
    case _:
      raise ValueError(f"prediction_type {prediction_type!r}: one of 'eps', 'x_0', 'v'")
