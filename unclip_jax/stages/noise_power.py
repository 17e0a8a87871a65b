"""What `samplers.analytic` has to know of a stage: how much of the noise its network finds.

E[eps_pred^2] over data, for each timestep (Analytic-DPM, Bao et al. 2022, eq. 8 and section 4.1).
E[eps^2] is known to be 1, and a control variate: where x_t is nearly all noise eps_pred^2 and eps^2
are nearly alike, and the little that they differ by, which is what counts there, needs few images.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import DiffusionConfig
from unclip_jax.diffusion import gaussian, schedule
from unclip_jax.diffusion.samplers import Sampler, Trajectory, start_noise, step_noise
from unclip_jax.stages.common import make_schedule
from unclip_jax.types import Array, Step, UnclipError


def make_plan(diffusion: DiffusionConfig, num_timesteps: int) -> Step:
  """Rows [num_timesteps] evenly spaced in log-SNR, where a stage is looked at.

  Raises:
    UnclipError: there are fewer than 2, or more than the schedule has.
  """
  if num_timesteps < 2:
    raise UnclipError(f'{num_timesteps} timesteps are too few to measure at: take 2 or more')
  full = make_schedule(diffusion)
  return schedule.make_plan(full, schedule.log_snr_timesteps(full, num_timesteps))


def visit(x_0: Array) -> Sampler:
  """A sampler that draws x_s ~ q(x_s | x_0) of known data [b, ...], whatever the network says.

  It takes a stage's `sample` past what that stage meets in training, conditioning and all.
  """

  def step_fn(key_b, x_t, prediction, step, state):
    noise = step_noise(key_b, step, x_0.shape[1:])
    to = step._replace(alpha_bar=step.alpha_bar_next, noise_var=step.noise_var_next)
    return gaussian.q_sample(x_0, noise, to), state

  return Sampler(lambda x_start: (), step_fn)


def visit_start(x_0: Array, key_b: Array, plan: Step) -> Array:
  """x_t of data [b, ...] where a plan begins."""
  first = jax.tree.map(lambda column: jnp.asarray(column)[0], plan)
  return gaussian.q_sample(x_0, start_noise(key_b, x_0.shape[1:]), first)


def squares(x_0: Array, x_start: Array, plan: Step, trajectory: Trajectory) -> Array:
  """The means of eps_pred^2 - eps^2 and of eps^2, of each row and image: float32 [2, n, b].

  Args:
    x_0: [b, ...], the data that `visit` was given.
    x_start: [b, ...], of `visit_start`.
    plan: of n rows.
    trajectory: of `sample` with `visit`.
  """

  def of_row(x_t: Array, x_0_pred: Array, step: Step) -> Array:
    signal, noise = gaussian.signal_and_noise(step, x_t)
    eps = gaussian.eps_from_x_0(x_t, x_0, step)
    # eps_pred - eps, without the cancellation of both at little noise.
    off = signal / noise * (x_0 - x_0_pred)
    both = jnp.stack([off * (2 * eps + off), eps**2])
    return both.mean(axis=tuple(range(2, both.ndim)))

  x_t = jnp.concatenate([x_start[None], trajectory.x_s[:-1]])
  rows = jax.tree.map(jnp.asarray, plan)
  return jax.vmap(of_row, out_axes=1)(x_t, trajectory.x_0, rows)


def eps_power(diffusion: DiffusionConfig, plan: Step, parts: Iterable[Array]) -> np.ndarray:
  """The statistics of a stage, float32 [T] within [0, 1]; between rows linear in log-SNR.

  Args:
    diffusion: of the stage.
    plan: of n rows, of `make_plan`.
    parts: of `squares`, [2, n, b] each; one is held at a time, and they are summed up in float64.

  Raises:
    UnclipError: there are none, or the network made a NaN.
  """
  total, count = np.zeros((2, len(plan.t))), 0
  for part in parts:
    total += np.asarray(part, np.float64).sum(axis=-1)
    count += part.shape[-1]
  if not count or not np.isfinite(total).all():
    raise UnclipError(
      'there are no images to measure noise on: give one or more'
      if not count
      else 'the network made a NaN or an infinity: take other weights, or float32'
    )
  more, of_noise = total / count
  # The best weight of the control variate, if eps and eps_pred are Gaussian.
  weight = np.clip(1 + more, 0, 1) ** 2
  power = 1 + more + (1 - weight) * (of_noise - 1)
  alpha_bar = make_schedule(diffusion).alpha_bar
  log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
  # Rows go from noise to data, as their log-SNR goes up.
  spread = np.interp(log_snr, log_snr[plan.t], power)
  return np.clip(spread, 0, 1).astype(np.float32)
