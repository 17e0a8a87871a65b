"""Multistep solvers: fewer evaluations of the network, each with a memory of those before.

What they extrapolate is x_0 along half the log-SNR, lambda = log(sqrt(alpha_bar) / sqrt(1 -
alpha_bar)); h is the step in it. On their first step, on one that ends at x_0 (where h is
infinite), and where a plan turns round they are of order one, which is DDIM. Sources: DPM-Solver++
(Lu et al. 2022, arXiv 2211.01095), UniPC (Zhao et al. 2023, arXiv 2302.04867), PNDM (Liu et al.
2022, arXiv 2202.09778).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.gaussian import per_sample, signal_and_noise
from unclip_jax.diffusion.samplers import Sampler, step_noise
from unclip_jax.types import Array, Prediction, Step, UnclipError

# Adams-Bashforth of order 1 to 4: what weighs the outputs of this step and of those before.
ADAMS_BASHFORTH = (
  (1.0, 0.0, 0.0, 0.0),
  (3 / 2, -1 / 2, 0.0, 0.0),
  (23 / 12, -16 / 12, 5 / 12, 0.0),
  (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

_NO_STEP = Step(
  *(np.zeros((), np.int32 if f in ('index', 't') else np.float32) for f in Step._fields)
)


class _Last(NamedTuple):
  """What a solver of order two keeps of the step before; h is 0 where there was none."""

  x_0: Array
  h: Array


def _half_log_snr_step(step: Step) -> Array:
  """h of a transition; infinite where it begins or ends at x_0."""
  up = jnp.log(step.alpha_bar_next) - jnp.log(step.alpha_bar)
  return 0.5 * (up + jnp.log(step.noise_var) - jnp.log(step.noise_var_next))


def _extrapolate(x_0: Array, h: Array, last: _Last) -> Array:
  """x_0 half-way along the step (DPM-Solver++, algorithm 2, line 9)."""
  known = jnp.isfinite(h) & jnp.isfinite(last.h) & (h * last.h > 0)
  weight = jnp.where(known, h / (2 * jnp.where(known, last.h, 1.0)), 0.0)
  return x_0 + weight * (x_0 - last.x_0)


def _move(x_t: Array, x_0: Array, prediction: Prediction, step: Step, kept: Array | float) -> Array:
  """x_s without its noise, x_0 in place of what was predicted; `kept` is the share of eps."""
  noise = jnp.sqrt(per_sample(step.noise_var, x_t))
  # What x_t says beside x_0, whatever the network said: at x_0 itself only that can be had.
  eps = jnp.where(noise > 0, gaussian.eps_from_x_0(x_t, x_0, step), prediction.eps)
  signal_next = jnp.sqrt(per_sample(step.alpha_bar_next, x_t))
  return signal_next * x_0 + kept * jnp.sqrt(per_sample(step.noise_var_next, x_t)) * eps


def _phi(k: int, z: Array) -> Array:
  """phi_k(z), the sum of z^i / (i + k)! (UniPC, appendix A), without its cancellation at 0."""
  series = sum(z**i * (1 / math.factorial(i + k)) for i in range(12))
  exact = jnp.expm1(z) / z
  for i in range(1, k):
    exact = (exact - 1 / math.factorial(i)) / z
  return jnp.where(jnp.abs(z) < 1, series, exact)


def _arrays(step: Step) -> Step:
  return jax.tree.map(jnp.asarray, step)


def dpm_solver_pp(eta: float | Array = 0.0) -> Sampler:
  """DPM-Solver++ 2M (algorithm 2): second order, one evaluation a step.

  Args:
    eta: 0 solves the probability flow; 1 the reverse SDE (SDE-DPM-Solver++ 2M, eq. 14 of the
      appendix), with as much noise as `ddim(1.0)`. Without effect on rows that go up.

  Raises:
    UnclipError: a number that is not within [0, 1].
  """
  if isinstance(eta, int | float | np.number) and not 0 <= eta <= 1:
    raise UnclipError(f'eta {eta} is not within 0..1')

  def step_fn(key_b, x_t, prediction, step, last):
    h = _half_log_snr_step(step)
    x_0 = _extrapolate(prediction.x_0, h, last)
    kept = jnp.exp(-per_sample(eta, x_t) * jnp.where(jnp.isfinite(h), jnp.maximum(h, 0.0), 0.0))
    x_s = _move(x_t, x_0, prediction, step, kept)
    std = jnp.sqrt((1 - kept**2) * per_sample(step.noise_var_next, x_t))
    noise = step_noise(key_b, step, x_t.shape[1:])
    return x_s + std * noise, _Last(prediction.x_0, h)

  return Sampler(lambda x_start: _Last(jnp.zeros_like(x_start), jnp.zeros(())), step_fn)


class _Corrected(NamedTuple):
  """What UniPC keeps: where the step before began, and the two predictions before this one."""

  last: _Last
  before: _Last
  x_t: Array
  step: Step


def unipc() -> Sampler:
  """UniPC of order two with B(h) = exp(h) - 1 (algorithms 5 and 6), deterministic.

  Its predictor is that of `dpm_solver_pp`. Each evaluation also corrects the x_t that it was made
  at; x_0 is predicted at the one before.
  """

  def init(x_start):
    nothing = _Last(jnp.zeros_like(x_start), jnp.zeros(()))
    return _Corrected(nothing, nothing, jnp.zeros_like(x_start), _arrays(_NO_STEP))

  def correct(x_t, x_0, state):
    """x_t once more from where its step began, now that x_0 is known at its end."""
    last, before = state.last, state.before
    h = last.h
    usable = jnp.isfinite(h) & (h > 0)
    h = jnp.where(usable, h, 1.0)
    # The solution of eq. 10 for the two differences, where B(h) is h phi_1.
    b_1, b_2 = _phi(2, -h) / _phi(1, -h), 2 * _phi(3, -h) / _phi(1, -h)
    two = (before.h > 0) & jnp.isfinite(before.h)
    ratio = jnp.where(two, -before.h / h, -1.0)
    older = jnp.where(two, (b_1 - b_2) / (1 - ratio), 0.0)
    newer = jnp.where(two, b_1 - older, 0.5)
    change = older * (before.x_0 - last.x_0) / ratio + newer * (x_0 - last.x_0)
    _, noise = signal_and_noise(state.step, x_t)
    signal_t = jnp.sqrt(per_sample(state.step.alpha_bar_next, x_t))
    noise_t = jnp.sqrt(per_sample(state.step.noise_var_next, x_t))
    moved = noise_t / jnp.where(noise > 0, noise, 1.0) * state.x_t
    moved = moved - signal_t * jnp.expm1(-h) * (last.x_0 + change)
    return jnp.where(usable, moved, x_t)

  def step_fn(key_b, x_t, prediction, step, state):
    h = _half_log_snr_step(step)
    x_t = correct(x_t, prediction.x_0, state)
    x_0 = _extrapolate(prediction.x_0, h, state.last)
    x_s = _move(x_t, x_0, prediction, step, 1.0)
    return x_s, _Corrected(_Last(prediction.x_0, h), state.last, x_t, step)

  return Sampler(init, step_fn)


class _Outputs(NamedTuple):
  """What PLMS keeps: the outputs before, the newest first, and the first step whole."""

  outputs: tuple[Array, Array, Array]
  count: Array
  x_t: Array
  step: Step


def plms(prediction_type: gaussian.PredictionType = 'eps') -> Sampler:
  """The linear multistep of PNDM (eq. 12) that Stable Diffusion is published with.

  Up to four of the network's outputs are averaged. Its plan stays for a row (`plms_timesteps`): the
  second timestep is evaluated twice, the first time to take the first step again (Heun).

  Args:
    prediction_type: of the network, whose raw outputs are what is averaged.
  """

  def init(x_start):
    zeros = jnp.zeros_like(x_start)
    return _Outputs((zeros, zeros, zeros), jnp.zeros((), jnp.int32), zeros, _arrays(_NO_STEP))

  def step_fn(key_b, x_t, prediction, step, state):
    output = gaussian.training_target(prediction.x_0, prediction.eps, step, prediction_type)
    # Where nothing came before, as in a loop that begins with such a row, x stays too.
    stays = (step.alpha_bar_next == step.alpha_bar) & (state.count > 0)
    weights = jnp.asarray(ADAMS_BASHFORTH)[jnp.minimum(state.count, 3)]
    mean = sum(w * past for w, past in zip(weights, (output, *state.outputs), strict=True))
    mean = jnp.where(stays, (output + state.outputs[0]) / 2, mean)
    begin = jnp.where(stays, state.x_t, x_t)
    row = jax.tree.map(lambda first, this: jnp.where(stays, first, this), state.step, step)
    moved = gaussian.predict(mean, begin, row, prediction_type)
    x_s = _move(begin, moved.x_0, moved, row, 1.0)
    kept = (output, *state.outputs[:2])
    outputs = jax.tree.map(lambda old, new: jnp.where(stays, old, new), state.outputs, kept)
    return x_s, _Outputs(outputs, state.count + jnp.where(stays, 0, 1), x_t, step)

  return Sampler(init, step_fn)
