"""Noise schedules, respacing, and the plans that a sampling loop scans over.

All but `take_rows` is numpy in float64 and runs before a program is traced; only the rows of a
plan are float32. Sources: DDPM (Ho et al. 2020) eq. 4-7, Improved DDPM (Nichol & Dhariwal 2021)
eq. 15-17, DDIM (Song et al. 2021) eq. 16.
"""

import dataclasses
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from unclip_jax.types import Array, Step, UnclipError

# GLIDE's sections for 27 DDIM steps: dense near x_0, sparse near x_T (glide-text2im, respace.py).
FAST27_SECTIONS = (10, 10, 3, 2, 2)
FAST27_STEPS = sum(FAST27_SECTIONS)
_LEAST_VAR = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """The signal power of each timestep of the full chain.

  Attributes:
    alpha_bar: float64 [T], alpha_bar[t] for t = 0..T-1, strictly falling within (0, 1).
  """

  alpha_bar: np.ndarray

  def __post_init__(self):
    alpha_bar = np.array(self.alpha_bar, np.float64)
    falls = np.all(np.diff(alpha_bar, prepend=1.0) < 0) if alpha_bar.ndim == 1 else False
    if not (falls and alpha_bar.size and alpha_bar[-1] > 0):
      raise ValueError('alpha_bar must be a vector that falls strictly from below 1 to above 0')
    alpha_bar.setflags(write=False)
    object.__setattr__(self, 'alpha_bar', alpha_bar)

  @property
  def num_steps(self) -> int:
    """T, the number of timesteps of the full chain."""
    return len(self.alpha_bar)


def _count(n: int, what: str, most: int | None = None) -> int:
  try:
    n = operator.index(n)
  except TypeError:
    raise UnclipError(f'{what}: {n!r} is not a whole number') from None
  if n < 1:
    raise UnclipError(f'{what}: {n} is too few, take 1 or more')
  if most is not None and n > most:
    raise UnclipError(f'{what}: {n} is too many, take at most {most}')
  return n


def _section(start: int, size: int, n: int) -> np.ndarray:
  """n timesteps strided over [start, start + size), both ends included; n is 2 or more."""
  # Strides are added up, not multiplied: it decides how a tie rounds in improved-diffusion.
  steps = np.cumsum([0.0] + [(size - 1) / (n - 1)] * (n - 1))
  return start + np.round(steps).astype(np.int64)


def _rows(t: np.ndarray, alpha_bar: np.ndarray, alpha_bar_next: np.ndarray) -> Step:
  """The transitions between contiguous signal powers (float64 [n]); only the last may reach 1."""
  up = alpha_bar_next < alpha_bar
  noise_var, noise_var_next = 1 - alpha_bar, 1 - alpha_bar_next
  high, low = np.maximum(alpha_bar, alpha_bar_next), np.minimum(alpha_bar, alpha_bar_next)
  beta = (high - low) / high
  signal = np.sqrt(low / high)
  # On the way up there is no posterior, and x_t may be x_0, without noise to divide by.
  divisor = np.where(up, 1.0, noise_var)
  mean_x_0 = np.where(up, 0.0, np.sqrt(alpha_bar_next) * beta / divisor)
  mean_x_t = np.where(up, signal, signal * noise_var_next / divisor)
  posterior_var = np.where(up, 0.0, beta * noise_var_next / divisor)
  # On the way down this is noise_var_next - posterior_var, without its cancellation.
  direction = np.where(up, np.sqrt(noise_var_next), mean_x_t * np.sqrt(noise_var))
  # A row that stays where it is has no variance, but a finite log.
  log_var_max = np.log(np.maximum(beta, _LEAST_VAR))
  log_var_min = np.where(
    posterior_var > 0, np.log(np.maximum(posterior_var, _LEAST_VAR)), log_var_max
  )
  if noise_var_next[-1] == 0 and len(t) > 1 and not up[-2]:
    # The last posterior variance is 0, its log -inf: Improved DDPM takes the one before.
    log_var_min[-1] = log_var_min[-2]
  floats = {
    'alpha_bar': alpha_bar,
    'alpha_bar_next': alpha_bar_next,
    'noise_var': noise_var,
    'noise_var_next': noise_var_next,
    'mean_x_0': mean_x_0,
    'mean_x_t': mean_x_t,
    'log_var_min': log_var_min,
    'log_var_max': log_var_max,
    'sigma': np.sqrt(posterior_var),
    'direction': direction,
    'eps_power': np.ones_like(alpha_bar),
  }
  return Step(
    index=np.arange(len(t), dtype=np.int32),
    t=t.astype(np.int32),
    **{name: column.astype(np.float32) for name, column in floats.items()},
  )


def cosine_schedule(num_steps: int = 1000, max_beta: float = 0.999) -> Schedule:
  """The cosine schedule (Improved DDPM, eq. 17), with betas clipped at max_beta.

  alpha_bar is recomputed from the clipped betas, so that the chain ends above zero.

  Raises:
    UnclipError: num_steps is below 1.
  """
  num_steps = _count(num_steps, 'num_steps')
  # 0.008: so that the first noise, sqrt(beta_0), is a little below the size of one of 256 levels.
  angle = (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2
  alpha_bar = np.cos(angle) ** 2
  betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)
  return Schedule(np.cumprod(1 - betas))


def linear_schedule(
  num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
  """The linear schedule (DDPM, section 4), betas scaled by 1000 / num_steps (Improved DDPM).

  Raises:
    UnclipError: num_steps is below 1, or so small that a scaled beta reaches 1.
  """
  num_steps = _count(num_steps, 'num_steps')
  scale = 1000 / num_steps
  if not 0 < beta_start * scale <= beta_end * scale < 1:
    raise UnclipError(
      f'a linear schedule of {num_steps} steps has betas from {beta_start * scale:g} to '
      f'{beta_end * scale:g}, outside (0, 1): take more steps or smaller betas'
    )
  return Schedule(np.cumprod(1 - np.linspace(beta_start * scale, beta_end * scale, num_steps)))


def scaled_linear_schedule(
  num_steps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 0.012
) -> Schedule:
  """Stable Diffusion's schedule: the square roots of the betas are linear (Rombach et al. 2022).

  Raises:
    UnclipError: num_steps is below 1, or the betas do not rise within (0, 1).
  """
  num_steps = _count(num_steps, 'num_steps')
  if not 0 < beta_start <= beta_end < 1:
    raise UnclipError(
      f'a schedule has betas from {beta_start:g} to {beta_end:g}: they must rise within (0, 1)'
    )
  return Schedule(np.cumprod(1 - np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2))


def strided_timesteps(total: int, n: int) -> np.ndarray:
  """n evenly strided timesteps from total - 1 down to 0 (Improved DDPM, section 4).

  The rounding is that of space_timesteps in improved-diffusion, except that a single step is
  total - 1: noise is where sampling starts.

  Args:
    total: number of timesteps of the full chain.
    n: number of timesteps to keep.

  Returns:
    int64 [n], descending.

  Raises:
    UnclipError: n is below 1 or above total.
  """
  n = _count(n, 'sampling steps', total)
  return _section(0, total, n)[::-1] if n > 1 else np.array([total - 1])


def karlo_timesteps(total: int, n: int) -> np.ndarray:
  """n timesteps, round(arange(n) * (total - 1) / (n - 1)), descending (Karlo, UnCLIPScheduler).

  Differs from strided_timesteps only where a product falls half-way between two integers.

  Raises:
    UnclipError: n is below 1 or above total.
  """
  n = _count(n, 'sampling steps', total)
  if n == 1:
    return np.array([total - 1])
  return np.round(np.arange(n) * ((total - 1) / (n - 1))).astype(np.int64)[::-1]


def leading_timesteps(total: int, n: int, offset: int = 0) -> np.ndarray:
  """n timesteps, multiples of total // n plus an offset, descending (DDIM; diffusers' 'leading').

  Raises:
    UnclipError: n is below 1 or above total, or the offset leads out of the chain.
  """
  n = _count(n, 'sampling steps', total)
  timesteps = np.arange(n)[::-1] * (total // n) + offset
  if offset < 0 or timesteps[0] >= total:
    raise UnclipError(
      f'{n} steps of {total // n} with an offset of {offset} leave the {total} of the schedule: '
      'take other numbers'
    )
  return timesteps


def trailing_timesteps(total: int, n: int) -> np.ndarray:
  """n timesteps that begin at total - 1, in strides of total / n (Lin et al. 2024, table 2).

  Raises:
    UnclipError: n is below 1 or above total.
  """
  n = _count(n, 'sampling steps', total)
  return np.round(total - np.arange(n) * (total / n)).astype(np.int64) - 1


def log_snr_timesteps(schedule: Schedule, n: int) -> np.ndarray:
  """n timesteps from T - 1 to 0, as evenly spaced in log-SNR as whole timesteps can be.

  What DPM-Solver calls logSNR (Lu et al. 2022, section 5.1): dense at both ends of a cosine
  schedule.

  Raises:
    UnclipError: n is below 1 or above T.
  """
  total = schedule.num_steps
  n = _count(n, 'sampling steps', total)
  log_snr = np.log(schedule.alpha_bar) - np.log1p(-schedule.alpha_bar)
  wanted = np.linspace(log_snr[-1], log_snr[0], n)
  timesteps = np.round(np.interp(wanted, log_snr[::-1], np.arange(total)[::-1])).astype(np.int64)
  # No timestep twice: at the coarse end neighbours move apart, from either end inwards.
  rank = np.arange(n)
  timesteps = np.minimum.accumulate(timesteps + rank) - rank
  return np.maximum(timesteps, n - 1 - rank)


def linspace_timesteps(total: int, n: int) -> np.ndarray:
  """n timesteps, the first of n + 1 evenly spaced from total - 1 to 0 (diffusers' solvers).

  Raises:
    UnclipError: n is below 1 or not below total.
  """
  n = _count(n, 'sampling steps', total - 1)
  return np.round(np.linspace(0, total - 1, n + 1)).astype(np.int64)[:0:-1]


def inner_timesteps(total: int, n: int, offset: int = 0) -> np.ndarray:
  """n timesteps, multiples of total // (n + 1) but 0, plus an offset (diffusers' solvers).

  Raises:
    UnclipError: n is below 1 or not below total, or the offset leads out of the chain.
  """
  return leading_timesteps(total, _count(n, 'sampling steps', total - 1) + 1, offset)[:-1]


def plms_timesteps(timesteps: np.ndarray) -> np.ndarray:
  """Timesteps with the second one twice, if there is one: a plan for `solvers.plms`."""
  return np.insert(timesteps, 1, timesteps[1:2])


def with_eps_power(plan: Step, eps_power: np.ndarray) -> Step:
  """A plan with what `samplers.analytic` needs to know, for each timestep of the schedule [T].

  Raises:
    UnclipError: it is of another schedule, or not within [0, 1].
  """
  eps_power = np.asarray(eps_power, np.float32)
  if eps_power.ndim != 1 or eps_power.size <= plan.t.max():
    raise UnclipError(
      f'statistics of {eps_power.shape} timesteps are not of a schedule that has {plan.t.max()}'
    )
  if not np.all((eps_power >= 0) & (eps_power <= 1)):
    raise UnclipError('the mean square of predicted noise must lie within 0..1')
  return plan._replace(eps_power=eps_power[plan.t])


def fast27_timesteps(total: int) -> np.ndarray:
  """The 27 DDIM timesteps of GLIDE's upsampler, dense near x_0; int64 [27], descending.

  Raises:
    UnclipError: the chain is too short.
  """
  count = len(FAST27_SECTIONS)
  sizes = [total // count + (i < total % count) for i in range(count)]
  if any(size < n for size, n in zip(sizes, FAST27_SECTIONS, strict=True)):
    raise UnclipError(f'fast27 needs a schedule of 47 steps or more, this one has {total}')
  starts = np.cumsum([0, *sizes[:-1]])
  steps = np.concatenate(list(map(_section, starts, sizes, FAST27_SECTIONS)))
  # GLIDE: the noisiest timestep gives DDIM artifacts.
  steps[-1] = total - 3
  return steps[::-1]


def make_plan(
  schedule: Schedule,
  timesteps: Sequence[int] | np.ndarray,
  from_x_0: bool = False,
  to_x_0: bool = True,
  may_stay: bool = False,
) -> Step:
  """The transitions through `timesteps`, in the order given, with betas recomputed between them.

  A plan may start at any t (image-to-image), run upwards, or jump back up on its way down
  (resampling as in RePaint). What a row that goes up means is the sampler's: `ddpm` draws from
  the forward process, `ddim` inverts. DDIM inversion is
  `make_plan(schedule, timesteps[::-1], from_x_0=True, to_x_0=False)`. Rows keep their index when
  a plan is sliced.

  Args:
    schedule: the full chain.
    timesteps: original timesteps, each within [0, T); neighbours differ.
    from_x_0: begin with the transition from x_0 to timesteps[0]. The network is given
      timesteps[0] there, the least noise that it knows on this path.
    to_x_0: end with the transition from timesteps[-1] to x_0.
    may_stay: allow a timestep twice in a row, for a sampler that looks there again (`plms`).

  Returns:
    Step of numpy arrays [n]: n = len(timesteps) - 1 + from_x_0 + to_x_0.

  Raises:
    UnclipError: no timesteps or no transition, a timestep outside the schedule, or one twice in a
      row, unless it may be.
  """
  t = np.asarray(timesteps)
  if t.ndim != 1 or not t.size or not np.issubdtype(t.dtype, np.integer):
    raise UnclipError('timesteps must be a list of one or more integers')
  if t.min() < 0 or t.max() >= schedule.num_steps:
    culprit = t.min() if t.min() < 0 else t.max()
    raise UnclipError(f'timestep {culprit} is outside 0..{schedule.num_steps - 1} of the schedule')
  if not may_stay and np.any(t[1:] == t[:-1]):
    raise UnclipError(f'timestep {t[1:][t[1:] == t[:-1]][0]} stands twice in a row in a plan')
  if t.size == 1 and not (from_x_0 or to_x_0):
    raise UnclipError(f'a plan of timestep {t[0]} alone has no transition: set to_x_0')
  nodes = np.concatenate([[1.0] * from_x_0, schedule.alpha_bar[t], [1.0] * to_x_0])
  t = np.concatenate([t[:1][: int(from_x_0)], t if to_x_0 else t[:-1]])
  return _rows(t, nodes[:-1], nodes[1:])


def take_part(plan: Step, rows: np.ndarray | slice) -> Step:
  """Some rows of a plan, in the order given, as a plan of its own: their indices count from 0."""
  part = Step(*(column[rows] for column in plan))
  return part._replace(index=np.arange(len(part.t), dtype=np.int32))


def training_table(schedule: Schedule) -> Step:
  """The T transitions t -> t - 1 of the full chain, row t for timestep t; row 0 ends at x_0."""
  plan = make_plan(schedule, np.arange(schedule.num_steps)[::-1])
  return Step(*(column[::-1].copy() for column in plan))


def take_rows(table: Step, t_b: Array) -> Step:
  """The rows t_b [b] (int, within [0, T)) of a training table, as a Step of arrays [b]."""
  return Step(*(column[t_b] for column in map(jnp.asarray, table)))
