"""Every step of a plan against diffusers' schedulers, with the same noise fed to both.

diffusers keeps its tables in float32, where 1 - alpha_bar loses three digits near x_0. Each step
is therefore compared twice: with the scheduler as it ships, to what float32 tables allow, and
with its tables replaced by the float64 ones, which `test_tables` proves to be the same schedule.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm, scheduling_unclip

from unclip_jax.configs import DiffusionConfig, SamplingConfig
from unclip_jax.diffusion import gaussian, guidance, samplers
from unclip_jax.diffusion import schedule as sch
from unclip_jax.stages import common
from unclip_jax.types import Step

SHAPE = (3, 4, 5, 3)
SCHEDULES = {'squaredcos_cap_v2': sch.cosine_schedule(), 'linear': sch.linear_schedule()}
PREDICTION_TYPES = {'epsilon': 'eps', 'sample': 'x_0', 'v_prediction': 'v'}
# Largest difference of one step over the standard deviation of its result.
EXACT, AS_SHIPPED = 5e-6, 2e-3


def to_torch(x):
  return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 1))


def to_numpy(x):
  return np.moveaxis(x.numpy(), 1, -1)


def with_float64_tables(scheduler, schedule):
  scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha_bar.copy())
  scheduler.alphas = scheduler.alphas_cumprod / torch.cat(
    [torch.ones(1), scheduler.alphas_cumprod[:-1]]
  )
  scheduler.betas = 1 - scheduler.alphas
  return scheduler


def rows(plan):
  return [Step(*map(jnp.asarray, row)) for row in zip(*plan, strict=True)]


def inputs(step, channels):
  """x_t of deviation 1 and an output of deviation 0.6, other ones at each step."""
  rng = np.random.default_rng(int(step.index))
  x_t = rng.normal(size=SHAPE).astype('f')
  return x_t, (0.6 * rng.normal(size=(*SHAPE[:-1], channels))).astype('f')


def compare_steps(plan, reference_step, sampler, prediction_type, learned=False, limit_x_0=None):
  """The largest deviation of x_s and of x_0 from reference_step(i, output, x_t, noise)."""
  key_b = jax.random.split(jax.random.key(0), SHAPE[0])
  worst = 0.0
  for i, step in enumerate(rows(plan)):
    x_t, output = inputs(step, 6 if learned else 3)
    prediction = gaussian.predict(output, x_t, step, prediction_type, learned, limit_x_0)
    x_s, _ = sampler.step(key_b, x_t, prediction, step, sampler.init(x_t))
    noise = to_torch(samplers.step_noise(key_b, step, SHAPE[1:]))
    expected = reference_step(i, to_torch(output), to_torch(x_t), noise)
    for actual, reference in zip(
      (x_s, prediction.x_0), (expected.prev_sample, expected.pred_original_sample), strict=True
    ):
      reference = to_numpy(reference)
      worst = max(worst, np.abs(np.asarray(actual) - reference).max() / reference.std())
  return worst


@pytest.fixture
def feed(monkeypatch):
  """Hands the noise of our step to a scheduler that would draw its own."""

  def feed_noise(noise):
    for module in (scheduling_unclip, scheduling_ddpm):
      monkeypatch.setattr(module, 'randn_tensor', lambda *shape, **options: noise)

  return feed_noise


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('num_steps', [50, 1000])
def test_tables(name, num_steps):
  schedule = sch.cosine_schedule(num_steps) if name != 'linear' else sch.linear_schedule(num_steps)
  scale = 1000 / num_steps
  scheduler = diffusers.DDPMScheduler(
    num_steps, beta_schedule=name, beta_start=1e-4 * scale, beta_end=0.02 * scale
  )
  # A cumulative product of float32, whose last factor 1 - 0.999 has four digits.
  np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), schedule.alpha_bar, rtol=1e-4)
  np.testing.assert_allclose(scheduler.betas.numpy()[1:], _betas(schedule)[1:], rtol=1e-6)


def _betas(schedule):
  return 1 - schedule.alpha_bar / np.append(1.0, schedule.alpha_bar[:-1])


@pytest.mark.parametrize('n', [2, 7, 25, 1000])
def test_karlos_timesteps(n):
  scheduler = diffusers.UnCLIPScheduler()
  scheduler.set_timesteps(n)
  assert scheduler.timesteps.tolist() == sch.karlo_timesteps(1000, n).tolist()


@pytest.mark.parametrize('shipped', [False, True])
@pytest.mark.parametrize('variance', ['fixed_small', 'learned'])
@pytest.mark.parametrize('prediction_type', ['epsilon', 'sample'])
@pytest.mark.parametrize('limit', [1.0, 5.0, None])
@pytest.mark.parametrize('n', [7, 25])
def test_unclip_scheduler(feed, n, limit, prediction_type, variance, shipped):
  scheduler = diffusers.UnCLIPScheduler(
    variance_type='learned_range' if variance == 'learned' else 'fixed_small_log',
    prediction_type=prediction_type,
    clip_sample=limit is not None,
    clip_sample_range=limit or 0.0,
  )
  schedule = SCHEDULES['squaredcos_cap_v2']
  if not shipped:
    with_float64_tables(scheduler, schedule)
  timesteps = sch.karlo_timesteps(1000, n)

  def reference_step(i, output, x_t, noise):
    feed(noise)
    t = int(timesteps[i])
    return scheduler.step(output, t, x_t, int(timesteps[i + 1]) if i + 1 < n else None)

  worst = compare_steps(
    sch.make_plan(schedule, timesteps),
    reference_step,
    samplers.ddpm(variance),
    PREDICTION_TYPES[prediction_type],
    variance == 'learned',
    None if limit is None else guidance.clip_x_0(limit),
  )
  assert worst < (AS_SHIPPED if shipped else EXACT)


@pytest.mark.parametrize('shipped', [False, True])
@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large', 'learned'])
@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('clip', [False, True])
def test_ddpm_scheduler(feed, clip, prediction_type, variance, name, shipped):
  scheduler = diffusers.DDPMScheduler(
    beta_schedule=name,
    variance_type='learned_range' if variance == 'learned' else variance,
    prediction_type=prediction_type,
    clip_sample=clip,
  )
  schedule = SCHEDULES[name]
  if not shipped:
    with_float64_tables(scheduler, schedule)
  timesteps = sch.strided_timesteps(1000, 27)
  scheduler.set_timesteps(timesteps=timesteps.tolist())

  def reference_step(i, output, x_t, noise):
    feed(noise)
    return scheduler.step(output, int(timesteps[i]), x_t)

  worst = compare_steps(
    sch.make_plan(schedule, timesteps),
    reference_step,
    samplers.ddpm(variance),
    PREDICTION_TYPES[prediction_type],
    variance == 'learned',
    guidance.clip_x_0(1.0) if clip else None,
  )
  assert worst < (AS_SHIPPED if shipped else EXACT)


@pytest.mark.parametrize('shipped', [False, True])
@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('prediction_type', PREDICTION_TYPES)
@pytest.mark.parametrize('limit', ['clip', 'dynamic', None])
@pytest.mark.parametrize('eta', [0.0, 0.4, 1.0])
def test_ddim_scheduler(eta, limit, prediction_type, name, shipped):
  scheduler = diffusers.DDIMScheduler(
    beta_schedule=name,
    prediction_type=prediction_type,
    clip_sample=limit == 'clip',
    thresholding=limit == 'dynamic',
    dynamic_thresholding_ratio=0.9,
    sample_max_value=1e9,
  )
  schedule = SCHEDULES[name]
  if not shipped:
    with_float64_tables(scheduler, schedule)
  scheduler.set_timesteps(25)
  timesteps = scheduler.timesteps.numpy()
  bounds = {'clip': guidance.clip_x_0(1.0), 'dynamic': guidance.dynamic_threshold(90.0)}

  def reference_step(i, output, x_t, noise):
    # The noise is always re-derived from the limited x_0, as in GLIDE.
    return scheduler.step(output, int(timesteps[i]), x_t, eta, True, variance_noise=noise)

  worst = compare_steps(
    sch.make_plan(schedule, timesteps),
    reference_step,
    samplers.ddim(eta),
    PREDICTION_TYPES[prediction_type],
    limit_x_0=bounds.get(limit),
  )
  assert worst < (AS_SHIPPED if shipped else EXACT)


@pytest.mark.parametrize('num_steps', [10, 30, 500])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('to_x_0', [False, True])
@pytest.mark.parametrize('spacing', ['leading', 'trailing'])
def test_stable_diffusions_plans(spacing, to_x_0, offset, num_steps):
  """Schedule, spacing, offset and end as a scheduler_config.json names them."""
  diffusion = DiffusionConfig(schedule='scaled_linear', betas=(0.00085, 0.012))
  sampling = SamplingConfig(num_steps, spacing=spacing, offset=offset, to_x_0=to_x_0)
  plan = common.make_plan(diffusion, sampling)
  scheduler = diffusers.DDIMScheduler(
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing=spacing,
    steps_offset=offset,
    set_alpha_to_one=to_x_0,
    clip_sample=False,
  )
  scheduler.set_timesteps(num_steps)
  # diffusers also steps from timestep 0 to itself, which changes nothing.
  n = num_steps - int(not to_x_0 and scheduler.timesteps[-1].item() == 0)
  assert plan.t.tolist() == scheduler.timesteps[:n].tolist()
  np.testing.assert_allclose(plan.alpha_bar, scheduler.alphas_cumprod[plan.t], rtol=1e-4)
  stride = 1000 // num_steps
  previous = scheduler.timesteps - stride
  ends = torch.where(
    previous >= 0,
    scheduler.alphas_cumprod[previous.clamp(min=0)],
    torch.as_tensor(scheduler.final_alpha_cumprod),
  )
  # In trailing strides diffusers rounds each step down on its own, ours lead from one to the next.
  exact = slice(None) if spacing == 'leading' or 1000 % num_steps == 0 else slice(-1, None)
  np.testing.assert_allclose(plan.alpha_bar_next[exact], ends[:n][exact], rtol=1e-4)


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('name', SCHEDULES)
def test_ddim_inverse_scheduler(name, prediction_type):
  scheduler = diffusers.DDIMInverseScheduler(
    beta_schedule=name, prediction_type=prediction_type, clip_sample=False
  )
  with_float64_tables(scheduler, SCHEDULES[name])
  scheduler.set_timesteps(25)
  timesteps = scheduler.timesteps.numpy()
  plan = sch.make_plan(SCHEDULES[name], timesteps, from_x_0=True, to_x_0=False)

  def reference_step(i, output, x_t, noise):
    return scheduler.step(output, int(timesteps[i]), x_t)

  worst = compare_steps(plan, reference_step, samplers.ddim(0.5), PREDICTION_TYPES[prediction_type])
  assert worst < EXACT


def test_noising_and_velocity():
  schedule = SCHEDULES['linear']
  scheduler = with_float64_tables(diffusers.DDPMScheduler(), schedule)
  t_b = np.array([0, 480, 999])
  step_b = sch.take_rows(sch.training_table(schedule), t_b)
  x_0, eps = inputs(rows(sch.make_plan(schedule, [5]))[0], 3)
  both = to_torch(x_0), to_torch(eps), torch.from_numpy(t_b)
  x_t = gaussian.q_sample(x_0, eps, step_b)
  np.testing.assert_allclose(x_t, to_numpy(scheduler.add_noise(*both)), atol=1e-6)
  v = gaussian.v_from_x_0(x_0, eps, step_b)
  np.testing.assert_allclose(v, to_numpy(scheduler.get_velocity(*both)), atol=1e-6)


@pytest.mark.parametrize('learned', [False, True])
def test_a_guided_unclip_loop(feed, learned):
  """25 steps end to end: interleaved guidance, variance of the conditional half, clipping."""
  schedule, scale, n = SCHEDULES['squaredcos_cap_v2'], 4.0, 25
  timesteps = sch.karlo_timesteps(1000, n)
  scheduler = with_float64_tables(
    diffusers.UnCLIPScheduler(variance_type='learned_range' if learned else 'fixed_small_log'),
    schedule,
  )
  key_b = jax.random.split(jax.random.key(0), SHAPE[0])
  plan = sch.make_plan(schedule, timesteps)
  x_T = samplers.start_noise(key_b, SHAPE[1:])

  def network(x_t, t, cond, lib):
    channels = [lib.sin(1.3 * x_t + cond + 0.01 * t), lib.cos(2 * x_t - cond)]
    return channels if learned else channels[:1]

  def denoise_fn(x_t, step):
    cond = jnp.tile(jnp.array([0.5, -0.3]), len(x_t)).reshape(-1, 1, 1, 1)
    outputs = network(guidance.interleave(x_t, x_t), step.t, cond, jnp)
    output = guidance.guide(jnp.concatenate(outputs, -1), scale, learned)
    return gaussian.predict(output, x_t, step, 'eps', learned, guidance.clip_x_0(1.0))

  sampler = samplers.ddpm('learned' if learned else 'fixed_small')
  x_0 = samplers.sample_loop(denoise_fn, sampler, plan, x_T, key_b)

  x_t = to_torch(x_T)
  for i, step in enumerate(rows(plan)):
    t = int(timesteps[i])
    cond, uncond = network(x_t, t, 0.5, torch), network(x_t, t, -0.3, torch)
    cond[0] = uncond[0] + scale * (cond[0] - uncond[0])
    feed(to_torch(samplers.step_noise(key_b, step, SHAPE[1:])))
    before = int(timesteps[i + 1]) if i + 1 < n else None
    x_t = scheduler.step(torch.cat(cond, 1), t, x_t, before).prev_sample
  # 25 steps of a denoiser whose slope is 5 under guidance.
  np.testing.assert_allclose(x_0, to_numpy(x_t), atol=1e-4)
