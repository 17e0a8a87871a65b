"""What the diffusion stages share: a config's schedule, plan and sampler, and the denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import DiffusionConfig, SamplingConfig
from unclip_jax.diffusion import gaussian, guidance, samplers, schedule, solvers
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.types import Array, DenoiseFn, Prediction, Step, UnclipError

SAMPLERS = ('ddpm', 'ddim', 'analytic', 'dpmpp_2m', 'dpmpp_2m_sde', 'unipc', 'plms')
WITH_ETA = ('ddim', 'analytic')
SOLVERS = ('dpmpp_2m', 'dpmpp_2m_sde', 'unipc', 'plms')
SPACINGS = (
  'strided', 'karlo', 'fast27', 'leading', 'trailing', 'inner', 'linspace', 'log_snr',
)  # fmt: skip


def make_schedule(config: DiffusionConfig) -> schedule.Schedule:
  """The noise schedule of a config.

  Raises:
    UnclipError: an unknown schedule.
  """
  betas = config.betas or ()
  match config.schedule:
    case 'cosine' if not betas:
      return schedule.cosine_schedule(config.num_steps)
    case 'linear':
      return schedule.linear_schedule(config.num_steps, *betas)
    case 'scaled_linear':
      return schedule.scaled_linear_schedule(config.num_steps, *betas)
    case 'cosine':
      raise UnclipError('the cosine schedule has no betas to choose: take linear or scaled_linear')
  raise UnclipError(
    f'there is no schedule {config.schedule!r}: take cosine, linear or scaled_linear'
  )


def make_plan(diffusion: DiffusionConfig, sampling: SamplingConfig) -> Step:
  """The transitions of a full sampling run, Step of numpy arrays [num_steps]; plms has one more.

  Raises:
    UnclipError: an unknown spacing, one that has another number of steps, or more steps than the
      schedule has, or fewer than 1.
  """
  total, n = diffusion.num_steps, sampling.num_steps
  match sampling.spacing:
    case 'strided':
      timesteps = schedule.strided_timesteps(total, n)
    case 'karlo':
      timesteps = schedule.karlo_timesteps(total, n)
    case 'fast27':
      if n != schedule.FAST27_STEPS:
        raise UnclipError(f'fast27 has 27 steps, not {n}: take 27, or the spacing strided')
      timesteps = schedule.fast27_timesteps(total)
    case 'leading':
      timesteps = schedule.leading_timesteps(total, n, sampling.offset)
    case 'trailing':
      timesteps = schedule.trailing_timesteps(total, n)
    case 'inner':
      timesteps = schedule.inner_timesteps(total, n, sampling.offset)
    case 'linspace':
      timesteps = schedule.linspace_timesteps(total, n)
    case 'log_snr':
      timesteps = schedule.log_snr_timesteps(make_schedule(diffusion), n)
    case other:
      raise UnclipError(f'there is no spacing {other!r}: take {listed(SPACINGS)}')
  may_stay = sampling.sampler == 'plms'
  if may_stay:
    timesteps = schedule.plms_timesteps(timesteps)
  if not sampling.to_x_0 and timesteps[-1] > 0:
    timesteps = np.append(timesteps, 0)
  # From timestep 0 to itself nothing would change: such a step is left out.
  to_x_0 = sampling.to_x_0 or len(timesteps) == 1
  return schedule.make_plan(make_schedule(diffusion), timesteps, False, to_x_0, may_stay)


def make_sampler(
  name: str, variance: str, eta: Array | float = 0.0, prediction: str = 'eps'
) -> samplers.Sampler:
  """The sampler that a config names.

  Args:
    name: one of `SAMPLERS`.
    variance: of ddpm.
    eta: of those in `WITH_ETA`.
    prediction: what the network predicts, which plms averages.

  Raises:
    UnclipError: an unknown sampler or variance.
  """
  match name:
    case 'ddpm':
      return samplers.ddpm(variance)
    case 'ddim':
      return samplers.ddim(eta)
    case 'analytic':
      return samplers.analytic(eta)
    case 'dpmpp_2m':
      return solvers.dpm_solver_pp()
    case 'dpmpp_2m_sde':
      return solvers.dpm_solver_pp(1.0)
    case 'unipc':
      return solvers.unipc()
    case 'plms':
      return solvers.plms(prediction)
  raise UnclipError(f'there is no sampler {name!r}: take {listed(SAMPLERS)}')


def listed(words: tuple[str, ...]) -> str:
  """Words for a message: 'a, b or c'."""
  return f'{", ".join(words[:-1])} or {words[-1]}'


def draw_training_step(
  config: DiffusionConfig, key: Array, x_0: Array
) -> tuple[Array, Array, Step]:
  """Uniform timesteps and unit noise for a batch: x_t [b, ...], eps [b, ...], rows [b]."""
  key_t, key_eps = jax.random.split(key)
  t = jax.random.randint(key_t, x_0.shape[:1], 0, config.num_steps)
  step = schedule.take_rows(schedule.training_table(make_schedule(config)), t)
  eps = jax.random.normal(key_eps, x_0.shape, jnp.float32)
  return gaussian.q_sample(x_0, eps, step), eps, step


def make_denoise_fn(
  evaluate: Callable[[Array, Array, Any], Array],
  conditioning: Any,
  time_embs: Array,
  diffusion: DiffusionConfig,
  guided: Guidance | Array | None,
  edit_x_0: Callable[[Array], Array] | None = None,
) -> DenoiseFn:
  """The denoiser that a sampling loop calls.

  Args:
    evaluate: (x_t, time_emb, conditioning) -> output.
    conditioning: a pytree of arrays [b, ...]; of interleaved pairs, [2 b, ...], if guided.
    time_embs: [n, e], the embeddings of the plan's timesteps, by their index.
    diffusion: what the network predicts.
    guided: how, or the scale alone, a scalar or [b]; None runs the conditional half alone.
    edit_x_0: what else is done to x_0, before it is bounded: known pixels put into it, say.
  """
  limit = None
  if diffusion.dynamic_threshold is not None:
    limit = guidance.dynamic_threshold(diffusion.dynamic_threshold, diffusion.threshold_max)
  elif diffusion.clip_x_0 is not None:
    limit = guidance.clip_x_0(diffusion.clip_x_0)
  if edit_x_0 is not None:
    limit = _in_turn(edit_x_0, limit)

  learned = diffusion.learned_variance
  if guided is not None and not isinstance(guided, Guidance):
    guided = Guidance(guided)

  def of_time(x: Array, step: Step) -> Array:
    emb = jax.lax.dynamic_index_in_dim(time_embs, step.index, keepdims=True)
    return jnp.broadcast_to(emb, (x.shape[0], emb.shape[1]))

  def alone(x_t: Array, step: Step) -> Array:
    cond = conditioning
    if guided is not None:
      cond = jax.tree.map(lambda pairs: pairs[::2], conditioning)
    return evaluate(x_t, of_time(x_t, step), cond).astype(jnp.float32)

  def as_pair(x_t: Array, step: Step) -> Array:
    x = guidance.interleave(x_t, x_t)
    output = evaluate(x, of_time(x, step), conditioning)
    return guidance.guide(output, guided.scale, learned, guided.rescale)

  def denoise_fn(x_t: Array, step: Step) -> Prediction:
    if guided is None:
      output = alone(x_t, step)
    elif guided.is_on is None:
      output = as_pair(x_t, step)
    else:
      output = jax.lax.cond(jnp.asarray(guided.is_on)[step.index], as_pair, alone, x_t, step)
    kind, keep_eps = diffusion.prediction, diffusion.keep_eps
    return gaussian.predict(output, x_t, step, kind, learned, limit, keep_eps)

  return denoise_fn


def _in_turn(
  first: Callable[[Array], Array], second: Callable[[Array], Array] | None
) -> Callable[[Array], Array]:
  return first if second is None else lambda x: second(first(x))
