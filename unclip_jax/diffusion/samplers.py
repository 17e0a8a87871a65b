"""Samplers as pure steps, and the one loop that runs them over a plan.

A step gets everything it needs from its row of the plan: it gathers nothing and branches on
nothing. On a row that goes up (more noise), `ddpm` draws from the forward process q(x_s | x_t),
which is the resampling of RePaint, and `ddim` walks its ODE backwards, which is inversion.
Sources: DDPM (Ho et al. 2020) eq. 7 and algorithm 2, DDIM (Song et al. 2021) eq. 12 and 16.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import per_sample, posterior_mean, signal_and_noise
from unclip_jax.types import Array, DenoiseFn, Prediction, Step, UnclipError

State = Any


class Sampler(NamedTuple):
  """A sampling method: two pure functions. Multistep solvers keep their history in the state.

  Attributes:
    init: x_start [b, ...] -> state, a pytree of arrays.
    step: (key_b, x_t, prediction, step, state) -> (x_s, state).
  """

  init: Callable[[Array], State]
  step: Callable[[Array, Array, Prediction, Step, State], tuple[Array, State]]


class Trajectory(NamedTuple):
  """What a loop went through, one row a transition.

  Attributes:
    x_s: float32 [n, b, ...], where each transition ended; the last one is the sample.
    x_0: float32 [n, b, ...], what the network took x_0 to be at its start.
  """

  x_s: Array
  x_0: Array


def _noise(key_b: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
  def draw(key):
    return jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)

  return jax.vmap(draw)(key_b)


def start_noise(key_b: Array, shape: tuple[int, ...]) -> Array:
  """x_T, float32 [b, *shape]: unit noise, each sample's from its own key.

  Args:
    key_b: typed keys [b].
    shape: of one sample, without the batch.
  """
  return _noise(key_b, 0, shape)


def step_noise(key_b: Array, step: Step, shape: tuple[int, ...]) -> Array:
  """The unit noise [b, *shape] of one transition, from each sample's key and the step's index."""
  return _noise(key_b, 1 + step.index, shape)


def ddpm(
  variance: Literal['fixed_small', 'fixed_large', 'learned'] = 'fixed_small',
) -> Sampler:
  """Ancestral sampling, x_s ~ N(posterior_mean(x_0, x_t), variance) (DDPM, algorithm 2).

  Args:
    variance: 'fixed_small', that of the posterior; 'fixed_large', beta; 'learned', between the
      two, from the prediction. The transition that ends at x_0 adds no noise.

  Raises:
    UnclipError: an unknown variance.
    ValueError: in the step, 'learned' with a network that predicts no variance.
  """
  if variance not in ('fixed_small', 'fixed_large', 'learned'):
    raise UnclipError(f"variance {variance!r}: take 'fixed_small', 'fixed_large' or 'learned'")

  def step_fn(key_b, x_t, prediction, step, state):
    match variance:
      case 'fixed_small':
        log_var = per_sample(step.log_var_min, x_t)
      case 'fixed_large':
        log_var = per_sample(step.log_var_max, x_t)
      case 'learned':
        if prediction.log_var is None:
          raise ValueError("ddpm('learned') needs a network that predicts its variance")
        log_var = prediction.log_var
    noisy = per_sample(step.noise_var_next, x_t) > 0
    std = jnp.where(noisy, jnp.exp(0.5 * log_var), 0.0)
    noise = step_noise(key_b, step, x_t.shape[1:])
    return posterior_mean(prediction.x_0, x_t, step) + std * noise, state

  return Sampler(lambda x_start: (), step_fn)


def ddim(eta: float | Array = 0.0) -> Sampler:
  """DDIM (eq. 12 and 16): eta 0 is deterministic, eta 1 is DDPM with the fixed small variance.

  Args:
    eta: a number or [b]; may be traced. Without effect on rows that go up: inversion is
      deterministic, and exact as the steps become small, if nothing limits x_0.

  Raises:
    UnclipError: a number that is not within [0, 1].
  """
  if isinstance(eta, int | float | np.number) and not 0 <= eta <= 1:
    raise UnclipError(f'eta {eta} is not within 0..1')

  def step_fn(key_b, x_t, prediction, step, state):
    eta_b, sigma = per_sample(eta, x_t), per_sample(step.sigma, x_t)
    signal = jnp.sqrt(per_sample(step.alpha_bar_next, x_t))
    # 1 - alpha_bar_next - (eta sigma)^2, as a sum: the difference has no digits left at eta = 1
    # where x_t is all noise.
    direction = jnp.sqrt(per_sample(step.direction, x_t) ** 2 + (1 - eta_b**2) * sigma**2)
    noise = step_noise(key_b, step, x_t.shape[1:])
    return signal * prediction.x_0 + direction * prediction.eps + eta_b * sigma * noise, state

  return Sampler(lambda x_start: (), step_fn)


def analytic(eta: float | Array = 1.0) -> Sampler:
  """Analytic-DPM (Bao et al. 2022, theorem 1): the best variance that noise alike everywhere has.

  What x_t leaves unknown of eps has the variance 1 - E[eps_pred^2] (`Step.eps_power`, measured once
  for a model), so that of x_0 is (1 - alpha_bar) / alpha_bar times as much, and at most 1, as data
  is within [-1, 1] or standardised (theorem 2). It adds to DDIM's through the weight of x_0 in x_s.

  Args:
    eta: 1 is Analytic-DDPM, 0 Analytic-DDIM; a number or [b], may be traced.

  Raises:
    UnclipError: a number that is not within [0, 1].
  """
  mean = ddim(eta)

  def step_fn(key_b, x_t, prediction, step, state):
    eta_b, sigma = per_sample(eta, x_t), per_sample(step.sigma, x_t)
    known = (1 - eta_b**2) * sigma**2
    direction = jnp.sqrt(per_sample(step.direction, x_t) ** 2 + known)
    signal, noise = signal_and_noise(step, x_t)
    noise = jnp.where(noise > 0, noise, 1.0)
    weight = jnp.sqrt(per_sample(step.alpha_bar_next, x_t)) - direction * signal / noise
    x_0_var = (noise / signal) ** 2 * (1 - per_sample(step.eps_power, x_t))
    unknown = weight**2 * jnp.minimum(x_0_var, 1.0)
    down = per_sample(step.alpha_bar_next > step.alpha_bar, x_t)
    unknown = unknown * down * (per_sample(step.noise_var_next, x_t) > 0)
    # ddim adds eta sigma of this noise: what is added here makes up the whole.
    variance = (eta_b * sigma) ** 2
    more = jnp.sqrt(variance + unknown) - jnp.sqrt(variance)
    x_s, state = mean.step(key_b, x_t, prediction, step, state)
    return x_s + more * step_noise(key_b, step, x_t.shape[1:]), state

  return Sampler(lambda x_start: (), step_fn)


def sample_loop(
  denoise_fn: DenoiseFn,
  sampler: Sampler,
  plan: Step,
  x_start: Array,
  key_b: Array,
  with_trajectory: bool = False,
) -> Array | tuple[Array, Trajectory]:
  """Runs a sampler over a plan, from x_start to the plan's end, as one `lax.scan`.

  Image i is the same whatever the batch: noise comes from key_b[i] and the index of the step
  alone. Two plans that one image goes through (there and back) want two sets of keys.

  Args:
    denoise_fn: (x_t [b, ...], step of scalars) -> Prediction.
    sampler: `ddpm(...)`, `ddim(...)`, one of `solvers`.
    plan: Step of arrays [n], from make_plan.
    x_start: [b, ...], at the signal power where the plan begins.
    key_b: typed keys [b].
    with_trajectory: whether to return what lay between, at n times the memory.

  Returns:
    x at the end of the plan, float32 [b, ...]; with_trajectory, also a Trajectory.
  """

  def body(carry, step):
    x_t, state = carry
    prediction = denoise_fn(x_t, step)
    x_s, state = sampler.step(key_b, x_t, prediction, step, state)
    return (x_s, state), Trajectory(x_s, prediction.x_0) if with_trajectory else None

  x_start = jnp.asarray(x_start, jnp.float32)
  plan = jax.tree.map(jnp.asarray, plan)
  (x_end, _), trajectory = jax.lax.scan(body, (x_start, sampler.init(x_start)), plan)
  return (x_end, trajectory) if with_trajectory else x_end
