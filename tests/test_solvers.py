"""Solvers on a mixture of Gaussians, whose best denoiser and probability flow are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, samplers, schedule, solvers
from unclip_jax.stages.common import make_sampler
from unclip_jax.types import Prediction, UnclipError

WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-0.8, 0.6]), np.array([0.25, 0.4])
MEAN = WEIGHTS @ MEANS
STD = np.sqrt(WEIGHTS @ (STDS**2 + MEANS**2) - MEAN**2)
SCHEDULE = schedule.cosine_schedule()
sample_loop = jax.jit(samplers.sample_loop, static_argnames=('denoise_fn', 'sampler'))


def denoise(x_t, alpha_bar, xp=np):
  """E[x_0 | x_t] of the mixture, by Bayes' rule over its components."""
  signal, noise_var = xp.sqrt(alpha_bar), 1 - alpha_bar
  x = x_t[..., None]
  shape = (1,) * x_t.ndim + (2,)
  means, variances, weights = (a.reshape(shape) for a in (MEANS, STDS**2, WEIGHTS))
  total = signal**2 * variances + noise_var
  likelihood = weights / xp.sqrt(total) * xp.exp(-((x - signal * means) ** 2) / (2 * total))
  share = likelihood / likelihood.sum(axis=-1, keepdims=True)
  x_0 = means + variances * signal / total * (x - signal * means)
  return (share * x_0).sum(axis=-1)


def mixture_denoiser(x_t, step):
  x_0 = denoise(x_t, step.alpha_bar, jnp)
  return Prediction(x_0, gaussian.eps_from_x_0(x_t, x_0, step))


def as_network_of(kind):
  """The same denoiser through what a network of a kind would have said."""

  def denoise_fn(x_t, step):
    exact = mixture_denoiser(x_t, step)
    output = gaussian.training_target(exact.x_0, exact.eps, step, kind)
    return gaussian.predict(output, x_t, step, kind)

  return denoise_fn


def flow(x_t, t, s, num_steps=2000):
  """The probability flow from t to s by Runge-Kutta of order 4 in lambda, float64."""

  def half_log_snr(t):
    return 0.5 * np.log(SCHEDULE.alpha_bar[t] / (1 - SCHEDULE.alpha_bar[t]))

  def slope(y, log_snr):
    # y = x_t / sqrt(1 - alpha_bar): dy / dlambda = e^lambda x_0.
    alpha_bar = 1 / (1 + np.exp(-2 * log_snr))
    return np.exp(log_snr) * denoise(y * np.sqrt(1 - alpha_bar), alpha_bar)

  points = np.linspace(half_log_snr(t), half_log_snr(s), num_steps + 1)
  y = x_t / np.sqrt(1 - SCHEDULE.alpha_bar[t])
  for low, high in itertools.pairwise(points):
    h, middle = high - low, (low + high) / 2
    k_1 = slope(y, low)
    k_2 = slope(y + h / 2 * k_1, middle)
    k_3 = slope(y + h / 2 * k_2, middle)
    y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + slope(y + h * k_3, high))
  return y * np.sqrt(1 - SCHEDULE.alpha_bar[s])


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def errors(sampler, strides, stays=False):
  """The largest error of a path from timestep 800 to 80 in steps of each stride."""
  x_t = np.linspace(-2, 2, 9)
  expected = flow(x_t, 800, 80)
  found = []
  for stride in strides:
    timesteps = np.arange(80, 801, stride)[::-1]
    if stays:
      timesteps = schedule.plms_timesteps(timesteps)
    plan = schedule.make_plan(SCHEDULE, timesteps, to_x_0=False, may_stay=stays)
    x_s = sample_loop(mixture_denoiser, sampler, plan, x_t[None].astype('f'), keys(1))
    found.append(np.abs(np.asarray(x_s[0], np.float64) - expected).max())
  return np.array(found)


@pytest.mark.parametrize(
  ('sampler', 'stays', 'order'),
  [
    (samplers.ddim(), False, 1),
    (solvers.dpm_solver_pp(), False, 2),
    (solvers.unipc(), False, 3),
    (solvers.plms(), True, 2),
  ],
  ids=['ddim', 'dpmpp_2m', 'unipc', 'plms'],
)
def test_solvers_converge_to_the_flow_with_their_order(sampler, stays, order):
  # Short steps, where the order shows, yet above what float32 leaves (1e-6).
  found = errors(sampler, (24, 12, 6) if order > 1 else (12, 6, 3), stays)
  assert found[-1] > 3e-6, 'below the rounding ratios say nothing'
  observed = np.log2(found[:-1] / found[1:])
  assert observed.min() > order - 0.35, (found, observed)


def test_solvers_of_higher_order_need_fewer_steps():
  ddim, dpm, unipc = (
    errors(sampler, (72,))[0]
    for sampler in (samplers.ddim(), solvers.dpm_solver_pp(), solvers.unipc())
  )
  # 0.089, 0.016 and 0.017: the corrector pays from smaller steps on.
  assert max(unipc, dpm) < ddim / 3


@pytest.mark.parametrize('kind', ['eps', 'x_0', 'v'])
@pytest.mark.parametrize('name', ['dpmpp_2m', 'dpmpp_2m_sde', 'unipc', 'plms', 'analytic'])
def test_every_solver_samples_the_mixture_from_every_prediction(name, kind):
  timesteps = schedule.strided_timesteps(1000, 100)
  if name == 'plms':
    timesteps = schedule.plms_timesteps(timesteps)
  plan = schedule.make_plan(SCHEDULE, timesteps, may_stay=name == 'plms')
  if name == 'analytic':
    plan = schedule.with_eps_power(plan, eps_power())
  sampler = make_sampler(name, 'fixed_small', 1.0, kind)
  x_T = samplers.start_noise(keys(4), (5_000,))
  x_0 = np.asarray(sample_loop(as_network_of(kind), sampler, plan, x_T, keys(4)), np.float64)
  # 20,000 numbers: four standard errors are 0.022 of the mean and 0.013 of the deviation.
  assert x_0.mean() == pytest.approx(MEAN, abs=0.03)
  assert x_0.std() == pytest.approx(STD, abs=0.02)
  assert (x_0 < 0).mean() == pytest.approx(0.3 * 0.9993 + 0.7 * 0.0668, abs=0.02)


def eps_power(n=20_000):
  """E[eps_pred^2] at each timestep, over draws of the mixture."""
  rng = np.random.default_rng(0)
  component = rng.choice(2, size=n, p=WEIGHTS)
  x_0 = MEANS[component] + STDS[component] * rng.normal(size=n)
  eps = rng.normal(size=n)
  powers = []
  for alpha_bar in SCHEDULE.alpha_bar[::10]:
    x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
    predicted = (x_t - np.sqrt(alpha_bar) * denoise(x_t, alpha_bar)) / np.sqrt(1 - alpha_bar)
    powers.append((predicted**2).mean())
  return np.clip(np.interp(np.arange(1000), np.arange(0, 1000, 10), powers), 0, 1)


def test_the_analytic_variance_keeps_the_deviation_where_others_lose_it():
  timesteps = schedule.strided_timesteps(1000, 5)
  plain = schedule.make_plan(SCHEDULE, timesteps)
  x_T = samplers.start_noise(keys(4), (10_000,))

  def error(sampler, plan):
    x_0 = np.asarray(sample_loop(mixture_denoiser, sampler, plan, x_T, keys(4)), np.float64)
    return abs(x_0.std() / STD - 1)

  measured = schedule.with_eps_power(plain, eps_power())
  analytic = error(samplers.analytic(), measured)
  assert analytic < 0.5 * error(samplers.ddpm('fixed_small'), plain)
  assert error(samplers.analytic(0.0), measured) < error(samplers.ddim(0.0), plain)


@pytest.mark.parametrize('eta', [0.0, 0.4, 1.0])
def test_analytic_without_statistics_is_ddim(eta):
  plan = schedule.make_plan(SCHEDULE, schedule.strided_timesteps(1000, 6))
  x_T = samplers.start_noise(keys(2), (50,))
  a = sample_loop(mixture_denoiser, samplers.analytic(eta), plan, x_T, keys(2))
  b = sample_loop(mixture_denoiser, samplers.ddim(eta), plan, x_T, keys(2))
  np.testing.assert_allclose(a, b, atol=2e-6)


def test_one_step_and_paths_that_turn_are_of_order_one():
  x_T = samplers.start_noise(keys(2), (7,))
  for sampler in (solvers.dpm_solver_pp(), solvers.unipc(), solvers.plms()):
    for timesteps in ([700], [700, 300]):
      plan = schedule.make_plan(SCHEDULE, timesteps[:1])
      one = sample_loop(mixture_denoiser, sampler, plan, x_T, keys(2))
      ddim = sample_loop(mixture_denoiser, samplers.ddim(), plan, x_T, keys(2))
      np.testing.assert_allclose(one, ddim, atol=2e-6)
  turning = schedule.make_plan(SCHEDULE, [300, 700, 300], to_x_0=False)
  for sampler in (solvers.dpm_solver_pp(), solvers.dpm_solver_pp(1.0)):
    x_s = sample_loop(mixture_denoiser, sampler, turning, x_T, keys(2))
    assert np.isfinite(x_s).all()
  a = sample_loop(mixture_denoiser, solvers.dpm_solver_pp(), turning, x_T, keys(2))
  b = sample_loop(mixture_denoiser, samplers.ddim(), turning, x_T, keys(2))
  np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_loop_of_plms_that_begins_where_it_stays_changes_nothing():
  """As the last step of Karlo's upsampler may, which another network takes."""
  plan = schedule.make_plan(SCHEDULE, [300, 300], to_x_0=False, may_stay=True)
  x = samplers.start_noise(keys(2), (7,))
  after = sample_loop(mixture_denoiser, solvers.plms(), plan, x, keys(2))
  np.testing.assert_allclose(after, x, atol=1e-5)


@pytest.mark.parametrize('sampler', [solvers.dpm_solver_pp(), solvers.unipc()])
def test_solvers_move_by_x_0_alone(sampler):
  """What bounds x_0 may leave eps as it was (`keep_eps`): they are the same then."""
  plan = schedule.make_plan(SCHEDULE, schedule.strided_timesteps(1000, 6))
  x_T = samplers.start_noise(keys(2), (7,))

  def other_eps(x_t, step):
    return mixture_denoiser(x_t, step)._replace(eps=jnp.full_like(x_t, 7.0))

  one, other = (
    sample_loop(denoise_fn, sampler, plan, x_T, keys(2))
    for denoise_fn in (mixture_denoiser, other_eps)
  )
  np.testing.assert_allclose(one, other, atol=2e-6)
  ddim = sample_loop(other_eps, samplers.ddim(), plan, x_T, keys(2))
  assert np.abs(ddim - one).max() > 1


def test_solvers_invert_from_x_0():
  x_0 = np.linspace(-1, 1, 6, dtype='f')[None]
  up = schedule.make_plan(SCHEDULE, np.arange(20, 801, 20), from_x_0=True, to_x_0=False)

  def denoise_fn(x_t, step):
    # At x_0 itself nothing says what the noise will be; the flow has the limit of what is above.
    alpha_bar = jnp.minimum(step.alpha_bar, SCHEDULE.alpha_bar[0])
    x_0 = denoise(x_t, alpha_bar, jnp)
    step = step._replace(alpha_bar=alpha_bar, noise_var=1 - alpha_bar)
    return Prediction(x_0, gaussian.eps_from_x_0(x_t, x_0, step))

  expected = flow(x_0[0], 0, 800)
  ddim, dpm = (
    np.abs(np.asarray(sample_loop(denoise_fn, sampler, up, x_0, keys(1)))[0] - expected).max()
    for sampler in (samplers.ddim(), solvers.dpm_solver_pp())
  )
  assert dpm < ddim
  assert dpm < 0.05


@pytest.mark.parametrize('n', [1, 2, 10, 50, 400, 1000])
def test_log_snr_timesteps(n):
  timesteps = schedule.log_snr_timesteps(SCHEDULE, n)
  assert len(timesteps) == n and timesteps[0] == 999
  assert np.all(np.diff(timesteps) < 0)
  if n > 1:
    assert timesteps[-1] == 0
  if n == 10:
    log_snr = np.log(SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar))[timesteps]
    # At the noisy end of a cosine schedule whole timesteps are far apart; from there on, evenly.
    np.testing.assert_allclose(np.diff(log_snr)[3:], np.diff(log_snr)[-1], rtol=0.06)


def test_bad_arguments():
  with pytest.raises(UnclipError, match=r'1\.5'):
    solvers.dpm_solver_pp(1.5)
  with pytest.raises(UnclipError, match='-1'):
    samplers.analytic(-1)
  plan = schedule.make_plan(SCHEDULE, [999, 500])
  with pytest.raises(UnclipError, match='999'):
    schedule.with_eps_power(plan, np.ones(500))
  with pytest.raises(UnclipError, match=r'0\.\.1'):
    schedule.with_eps_power(plan, np.full(1000, 1.2))
  with pytest.raises(UnclipError, match='take at most 1000'):
    schedule.log_snr_timesteps(SCHEDULE, 1001)
