"""Samplers on data whose best denoiser is known in closed form: one Gaussian, or one point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, guidance, samplers
from unclip_jax.diffusion.schedule import cosine_schedule, linear_schedule, make_plan
from unclip_jax.diffusion.schedule import strided_timesteps as strided
from unclip_jax.types import Prediction, UnclipError

MEAN, STD = 0.4, 0.7
SCHEDULE = cosine_schedule()
sample_loop = jax.jit(
  samplers.sample_loop, static_argnames=('denoise_fn', 'sampler', 'with_trajectory')
)


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def part(plan, rows):
  return jax.tree.map(lambda values: jnp.asarray(values[rows]), plan)


def gaussian_denoiser(x_t, step):
  """The exact E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2), and the exact variance of x_s given x_t."""
  signal, noise = gaussian.signal_and_noise(step, x_t)
  total = signal**2 * STD**2 + noise**2
  x_0 = MEAN + STD**2 * signal / total * (x_t - signal * MEAN)
  # The posterior's variance, plus what is unknown of x_0, through its weight in the mean.
  x_0_var = STD**2 * noise**2 / total
  log_var = jnp.log(step.sigma**2 + step.mean_x_0**2 * x_0_var)
  return Prediction(
    x_0, gaussian.eps_from_x_0(x_t, x_0, step), jnp.broadcast_to(log_var, x_t.shape)
  )


def point_denoiser(x_t, step):
  """Data that is one image."""
  x_0 = jnp.broadcast_to(jnp.linspace(-1, 1, x_t.shape[1]), x_t.shape)
  return Prediction(x_0, gaussian.eps_from_x_0(x_t, x_0, step))


def flow(x_0, t):
  """Where the probability flow of N(MEAN, STD^2) data takes x_0 at timestep t; float64."""
  alpha_bar = SCHEDULE.alpha_bar[t]
  total = np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
  return np.sqrt(alpha_bar) * MEAN + total * (x_0 - MEAN) / STD


def check_moments(x, std=STD):
  # Four standard errors of a Gaussian's estimated mean and deviation.
  x = np.asarray(x, np.float64)
  assert x.mean() == pytest.approx(MEAN, abs=4 * std / np.sqrt(x.size))
  assert x.std() == pytest.approx(std, abs=4 * std / np.sqrt(2 * x.size))


@pytest.mark.parametrize('num_steps', [5, 40])
def test_ddpm_with_the_exact_variance_samples_the_data_in_any_number_of_steps(num_steps):
  key_b = keys(8)
  plan = make_plan(SCHEDULE, strided(1000, num_steps))
  x_T = samplers.start_noise(key_b, (20_000,))
  check_moments(sample_loop(gaussian_denoiser, samplers.ddpm('learned'), plan, x_T, key_b))


@pytest.mark.parametrize(
  'sampler',
  [
    samplers.ddpm('fixed_small'),
    samplers.ddpm('fixed_large'),
    samplers.ddim(0.0),
    samplers.ddim(0.6),
    samplers.ddim(1.0),
  ],
  ids=['fixed_small', 'fixed_large', 'ddim_0', 'ddim_0.6', 'ddim_1'],
)
@pytest.mark.parametrize('schedule', [SCHEDULE, linear_schedule()], ids=['cosine', 'linear'])
def test_every_sampler_samples_the_data_in_all_the_steps(sampler, schedule):
  key_b = keys(4)
  plan = make_plan(schedule, strided(1000, 1000))
  x_T = samplers.start_noise(key_b, (2_000,))
  x_0 = np.asarray(sample_loop(gaussian_denoiser, sampler, plan, x_T, key_b), np.float64)
  # 8,000 numbers: four standard errors are 0.031 and 0.022, discretisation takes the rest.
  assert x_0.mean() == pytest.approx(MEAN, abs=0.035)
  assert x_0.std() == pytest.approx(STD, abs=0.03)


def test_ddim_converges_to_the_flow_with_order_one():
  x_0 = np.linspace(-1.5, 2.0, 9)
  errors = []
  for stride in (40, 20, 10):
    plan = make_plan(SCHEDULE, np.arange(40, 801, stride)[::-1], to_x_0=False)
    x_t = flow(x_0, 800)[None].astype('f')
    x_s = sample_loop(gaussian_denoiser, samplers.ddim(), plan, x_t, keys(1))
    errors.append(np.abs(x_s[0] - flow(x_0, 40)).max())
  ratios = np.array(errors[:-1]) / errors[1:]
  assert errors[0] > 1e-3, 'coarse steps must err, or the ratios say nothing'
  np.testing.assert_allclose(ratios, 2, atol=0.15)


def test_inversion_converges_to_the_flow_with_order_one():
  x_0 = np.linspace(-1.5, 2.0, 9)
  errors = []
  for stride in (40, 20, 10):
    plan = make_plan(SCHEDULE, np.arange(40, 801, stride), to_x_0=False)
    x_s = sample_loop(
      gaussian_denoiser, samplers.ddim(0.9), plan, flow(x_0, 40)[None].astype('f'), keys(1)
    )
    errors.append(np.abs(x_s[0] - flow(x_0, 800)).max())
  np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 2, atol=0.15)


def round_trip(denoise_fn, image, num_steps):
  timesteps = strided(1000, num_steps)
  timesteps = timesteps[timesteps <= 960]
  up = make_plan(SCHEDULE, timesteps[::-1], from_x_0=True, to_x_0=False)
  down = make_plan(SCHEDULE, timesteps)
  key_b = keys(len(image))
  x_T = sample_loop(denoise_fn, samplers.ddim(), up, image, key_b)
  return x_T, sample_loop(denoise_fn, samplers.ddim(), down, x_T, key_b)


def test_inversion_of_a_constant_eps_round_trips_exactly():
  # eps is the same at both ends of each step, so that DDIM down undoes DDIM up to the rounding.
  eps = jax.random.normal(jax.random.key(3), (2, 6))

  def denoise_fn(x_t, step):
    return Prediction(gaussian.x_0_from_eps(x_t, eps, step), eps)

  image = jax.random.uniform(jax.random.key(4), (2, 6), minval=-1)
  x_T, back = round_trip(denoise_fn, image, 20)
  assert np.abs(x_T - image).max() > 0.5
  np.testing.assert_allclose(back, image, atol=2e-5)


def test_inversion_of_gaussian_data_round_trips_as_the_steps_become_small():
  image = np.linspace(-1, 1, 6, dtype='f').reshape(2, 3)

  def denoise_fn(x_t, step):
    # At x_0 itself eps is what it is just above: the network is given that timestep too.
    step = step._replace(
      alpha_bar=jnp.minimum(step.alpha_bar, SCHEDULE.alpha_bar[0]),
      noise_var=jnp.maximum(step.noise_var, 1 - SCHEDULE.alpha_bar[0]),
    )
    return gaussian_denoiser(x_t, step)

  coarse, fine = (np.abs(round_trip(denoise_fn, image, n)[1] - image).max() for n in (50, 500))
  assert fine < 0.2 * coarse
  assert fine < 0.01


@pytest.mark.parametrize('limit_x_0', [None, guidance.clip_x_0(0.5)])
def test_ddim_with_eta_1_is_ddpm_with_fixed_small_variance(limit_x_0):
  def denoise_fn(x_t, step):
    output = 0.5 * jnp.sin(x_t + step.t.astype(jnp.float32))
    return gaussian.predict(output, x_t, step, 'v', False, limit_x_0)

  key_b = keys(3)
  x_T = samplers.start_noise(key_b, (4, 4, 3))
  plan = make_plan(SCHEDULE, strided(1000, 9))
  _, a = sample_loop(denoise_fn, samplers.ddim(1.0), plan, x_T, key_b, True)
  _, b = sample_loop(denoise_fn, samplers.ddpm('fixed_small'), plan, x_T, key_b, True)
  # Nine steps of a few roundings of numbers up to 4.
  np.testing.assert_allclose(a.x_s, b.x_s, atol=1e-5)


def test_ddpm_variances_differ():
  key_b = keys(2)
  plan = make_plan(SCHEDULE, [600, 300], to_x_0=False)
  x_t = jnp.zeros((2, 30_000))
  deviations = {
    name: float(sample_loop(point_denoiser, samplers.ddpm(name), plan, x_t, key_b).std())
    for name in ('fixed_small', 'fixed_large')
  }
  x_s = np.sqrt(SCHEDULE.alpha_bar[300]) * np.linspace(-1, 1, 30_000)
  x_s = x_s * (1 - SCHEDULE.alpha_bar[600] / SCHEDULE.alpha_bar[300])
  x_s = x_s / (1 - SCHEDULE.alpha_bar[600])
  beta = 1 - SCHEDULE.alpha_bar[600] / SCHEDULE.alpha_bar[300]
  small = beta * (1 - SCHEDULE.alpha_bar[300]) / (1 - SCHEDULE.alpha_bar[600])
  assert deviations['fixed_small'] == pytest.approx(np.sqrt(x_s.var() + small), rel=0.01)
  assert deviations['fixed_large'] == pytest.approx(np.sqrt(x_s.var() + beta), rel=0.01)


@pytest.mark.parametrize(
  'sampler', [samplers.ddpm('fixed_small'), samplers.ddpm('fixed_large'), samplers.ddim(1.0)]
)
def test_the_last_transition_ends_at_x_0_without_noise(sampler):
  plan = make_plan(SCHEDULE, [400])
  x_t = samplers.start_noise(keys(2), (5,))
  x_0 = sample_loop(point_denoiser, sampler, plan, x_t, keys(2, seed=1))
  np.testing.assert_allclose(x_0, np.tile(np.linspace(-1, 1, 5), (2, 1)), atol=1e-6)


def test_ddpm_going_up_draws_from_the_forward_process():
  plan = make_plan(SCHEDULE, [200, 600], to_x_0=False)
  x_t = jnp.full((2, 50_000), 0.8)
  ratio = SCHEDULE.alpha_bar[600] / SCHEDULE.alpha_bar[200]
  for variance in ('fixed_small', 'fixed_large'):
    x_s = np.asarray(sample_loop(point_denoiser, samplers.ddpm(variance), plan, x_t, keys(2)))
    assert x_s.mean() == pytest.approx(0.8 * np.sqrt(ratio), abs=0.01)
    assert x_s.var() == pytest.approx(1 - ratio, rel=0.02)


def test_resampling_keeps_the_distribution():
  plan = make_plan(SCHEDULE, [999, 900, 600, 300, 100, 600, 300, 100, 600, 100, 0])
  key_b = keys(8)
  x_T = samplers.start_noise(key_b, (10_000,))

  def denoise_fn(x_t, step):
    prediction = gaussian_denoiser(x_t, step)
    up = step.alpha_bar_next < step.alpha_bar
    return prediction._replace(log_var=jnp.where(up, step.log_var_min, prediction.log_var))

  check_moments(sample_loop(denoise_fn, samplers.ddpm('learned'), plan, x_T, key_b))


@pytest.mark.parametrize('sampler', [samplers.ddpm('fixed_small'), samplers.ddim(0.5)])
def test_image_i_is_the_same_alone_and_in_any_batch(sampler):
  key_b = keys(5)
  plan = make_plan(SCHEDULE, strided(1000, 6))

  def draw(key_b):
    x_T = samplers.start_noise(key_b, (4, 4, 3))
    return np.asarray(sample_loop(gaussian_denoiser, sampler, plan, x_T, key_b))

  batch = draw(key_b)
  assert len(np.unique(batch[:, 0, 0, 0])) == 5
  for i in range(5):
    np.testing.assert_allclose(draw(key_b[i : i + 1])[0], batch[i], atol=1e-6)
  np.testing.assert_allclose(draw(key_b[::-1]), batch[::-1], atol=1e-6)


def test_noise_differs_between_start_steps_and_samples():
  key_b = keys(2)
  plan = make_plan(SCHEDULE, strided(1000, 3))
  draws = [samplers.start_noise(key_b, (4,))]
  for i in range(3):
    draws.append(samplers.step_noise(key_b, part(plan, i), (4,)))
  assert len(np.unique(np.stack(draws))) == 4 * 2 * 4


def test_a_plan_in_two_parts_gives_the_same_sample():
  key_b = keys(2)
  plan = make_plan(SCHEDULE, strided(1000, 7))
  x_T = samplers.start_noise(key_b, (3,))
  sampler = samplers.ddim(0.5)
  first, last = part(plan, slice(0, 6)), part(plan, slice(6, 7))
  x_s = sample_loop(gaussian_denoiser, sampler, first, x_T, key_b)
  halves = sample_loop(gaussian_denoiser, sampler, last, x_s, key_b)
  whole = sample_loop(gaussian_denoiser, sampler, plan, x_T, key_b)
  np.testing.assert_allclose(halves, whole, atol=1e-6)


def test_the_trajectory_is_what_the_loop_went_through():
  key_b = keys(2)
  plan = make_plan(SCHEDULE, strided(1000, 7))
  x_T = samplers.start_noise(key_b, (3, 5))
  sampler = samplers.ddpm()
  x_0, trajectory = sample_loop(gaussian_denoiser, sampler, plan, x_T, key_b, True)
  assert trajectory.x_s.shape == trajectory.x_0.shape == (7, 2, 3, 5)
  assert np.array_equal(trajectory.x_s[-1], x_0)
  x_t = x_T
  for i in range(7):
    step = part(plan, i)
    prediction = gaussian_denoiser(x_t, step)
    np.testing.assert_allclose(trajectory.x_0[i], prediction.x_0, atol=1e-6)
    x_t, _ = sampler.step(key_b, x_t, prediction, step, ())
    np.testing.assert_allclose(trajectory.x_s[i], x_t, atol=1e-5)


def test_a_sampler_may_carry_a_state():
  ddim = samplers.ddim()

  def step_fn(key_b, x_t, prediction, step, state):
    x_s, _ = ddim.step(key_b, x_t, prediction, step, ())
    return x_s + state['last'], {'last': 0.1 * prediction.x_0}

  sampler = samplers.Sampler(lambda x_start: {'last': jnp.zeros_like(x_start)}, step_fn)
  plan = make_plan(SCHEDULE, [800, 400], to_x_0=True)
  x_T = samplers.start_noise(keys(1), (4,))
  with_state = sample_loop(point_denoiser, sampler, plan, x_T, keys(1))
  without = sample_loop(point_denoiser, ddim, plan, x_T, keys(1))
  np.testing.assert_allclose(with_state - without, 0.1 * np.linspace(-1, 1, 4)[None], atol=1e-6)


def test_eta_guidance_plan_and_keys_compile_nothing_new():
  traces = []

  @jax.jit
  def sample(plan, key_b, eta, scale):
    traces.append(1)

    def denoise_fn(x_t, step):
      both = guidance.interleave(x_t, x_t)
      output = jnp.sin(both) * jnp.tile(jnp.array([1.0, 0.5]), len(x_t))[:, None]
      return gaussian.predict(guidance.guide(output, scale), x_t, step, 'eps')

    x_T = samplers.start_noise(key_b, (4,))
    return samplers.sample_loop(denoise_fn, samplers.ddim(eta), plan, x_T, key_b)

  plan = make_plan(SCHEDULE, strided(900, 5))
  base = sample(plan, keys(2), 0.0, 1.0)
  others = [
    sample(plan, keys(2), 0.5, 1.0),
    sample(plan, keys(2), 0.0, 3.0),
    sample(plan, keys(2, seed=9), 0.0, 1.0),
    sample(make_plan(SCHEDULE, [700, 300, 700, 200, 0]), keys(2), 0.0, 1.0),
  ]
  assert not any(np.allclose(base, other) for other in others)
  assert len(traces) == 1 and sample._cache_size() == 1


def test_eta_may_be_each_samples_own():
  key_b = keys(2)
  plan = make_plan(SCHEDULE, strided(1000, 5))
  x_T = samplers.start_noise(key_b, (4,))
  both = sample_loop(gaussian_denoiser, samplers.ddim(jnp.array([0.0, 1.0])), plan, x_T, key_b)
  for i, eta in enumerate((0.0, 1.0)):
    one = sample_loop(gaussian_denoiser, samplers.ddim(eta), plan, x_T, key_b)
    np.testing.assert_allclose(both[i], one[i], atol=1e-6)


@pytest.mark.parametrize('sampler', [samplers.ddpm('learned'), samplers.ddim(0.5)])
def test_a_step_gathers_nothing_and_branches_on_nothing(sampler):
  plan = make_plan(SCHEDULE, strided(1000, 5))

  def loop(plan, key_b):
    return samplers.sample_loop(gaussian_denoiser, sampler, plan, jnp.zeros((2, 4)), key_b)

  jaxpr = str(jax.make_jaxpr(loop)(plan, keys(2)))
  assert 'scan[' in jaxpr
  assert not any(word in jaxpr for word in ('gather', 'dynamic_slice', 'cond[', 'while['))


def test_a_bfloat16_start_is_carried_in_float32():
  plan = make_plan(SCHEDULE, [500, 20])
  x_0 = sample_loop(point_denoiser, samplers.ddpm(), plan, jnp.zeros((1, 3), jnp.bfloat16), keys(1))
  assert x_0.dtype == jnp.float32


def test_impossible_samplers():
  with pytest.raises(UnclipError, match='medium'):
    samplers.ddpm('medium')
  with pytest.raises(UnclipError, match=r'1\.5'):
    samplers.ddim(1.5)
  with pytest.raises(ValueError, match='predicts its variance'):
    sample_loop(
      point_denoiser, samplers.ddpm('learned'), make_plan(SCHEDULE, [5]), jnp.zeros((1, 3)), keys(1)
    )
