"""Schedules, respacing and plans against float64 loops written from the papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import schedule as sch
from unclip_jax.types import Step, UnclipError


def cosine_betas(num_steps):
  def alpha_bar(t):
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

  return [
    min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999)
    for i in range(num_steps)
  ]


def linear_betas(num_steps):
  start, end = 0.1 / num_steps, 20 / num_steps
  return [start + (end - start) * i / (num_steps - 1) for i in range(num_steps)]


def space_timesteps(total, counts):
  """improved-diffusion's, as a loop."""
  kept, start = [], 0
  for section, count in enumerate(counts):
    size = total // len(counts) + (1 if section < total % len(counts) else 0)
    at = 0.0
    for _ in range(count):
      kept.append(start + round(at))
      at += (size - 1) / (count - 1)
    start += size
  return kept


@pytest.mark.parametrize('num_steps', [7, 50, 1000])
def test_cosine_is_equation_17(num_steps):
  betas = cosine_betas(num_steps)
  expected = [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(num_steps)]
  np.testing.assert_allclose(sch.cosine_schedule(num_steps).alpha_bar, expected, rtol=1e-10)


def test_the_last_cosine_beta_is_clipped():
  alpha_bar = sch.cosine_schedule().alpha_bar
  assert 1 - alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.999, abs=1e-12)
  assert 1 - alpha_bar[-2] / alpha_bar[-3] < 0.99


@pytest.mark.parametrize('num_steps', [50, 1000])
def test_linear_scales_its_betas(num_steps):
  betas = linear_betas(num_steps)
  expected = [math.prod(1 - beta for beta in betas[: i + 1]) for i in range(num_steps)]
  np.testing.assert_allclose(sch.linear_schedule(num_steps).alpha_bar, expected, rtol=1e-10)


def test_a_schedule_cannot_be_written_to():
  with pytest.raises(ValueError, match='read-only'):
    sch.cosine_schedule(10).alpha_bar[0] = 0.5


@pytest.mark.parametrize(
  'alpha_bar', [[], [0.5, 0.5], [0.4, 0.5], [1.0, 0.5], [0.5, 0.0], [[0.5, 0.4]], [0.5, np.nan]]
)
def test_a_schedule_falls_from_one_to_zero(alpha_bar):
  with pytest.raises(ValueError, match='falls strictly'):
    sch.Schedule(np.array(alpha_bar))


@pytest.mark.parametrize('n', [2, 15, 27, 64, 100, 250, 999, 1000])
def test_strided_is_space_timesteps(n):
  timesteps = sch.strided_timesteps(1000, n)
  assert timesteps.tolist() == space_timesteps(1000, [n])[::-1]


@pytest.mark.parametrize('total', [47, 50, 100, 1000, 4000])
def test_fast27_is_glides(total):
  expected = set(space_timesteps(total, [10, 10, 3, 2, 2])) - {total - 1} | {total - 3}
  timesteps = sch.fast27_timesteps(total)
  assert timesteps.tolist() == sorted(expected, reverse=True)
  assert len(timesteps) == 27


def test_karlos_rounding():
  # checkpoints of Karlo: 25 steps of the prior and the decoder, 7 of super-resolution.
  assert sch.karlo_timesteps(1000, 7).tolist() == [999, 832, 666, 500, 333, 166, 0]
  prior = sch.karlo_timesteps(1000, 25).tolist()
  assert (prior[:2], prior[-3:], len(prior)) == ([999, 957], [83, 42, 0], 25)


@pytest.mark.parametrize('timesteps', [sch.strided_timesteps, sch.karlo_timesteps])
def test_every_number_of_steps_keeps_distinct_timesteps_from_noise_to_zero(timesteps):
  for n in range(1, 201):
    t = timesteps(200, n)
    assert len(t) == n and t[0] == 199 and np.all(np.diff(t) < 0)
    assert n == 1 or t[-1] == 0


@pytest.mark.parametrize('timesteps', [sch.strided_timesteps, sch.karlo_timesteps])
@pytest.mark.parametrize(
  'n, words', [(0, 'too few'), (-3, 'too few'), (1001, '1000'), (2.5, '2.5')]
)
def test_impossible_numbers_of_steps(timesteps, n, words):
  with pytest.raises(UnclipError, match=words):
    timesteps(1000, n)


@pytest.mark.parametrize('timesteps', [sch.linspace_timesteps, sch.inner_timesteps])
def test_spacings_that_leave_one_out_take_one_step_less(timesteps):
  assert len(set(timesteps(1000, 999))) == 999
  with pytest.raises(UnclipError, match='1000 is too many, take at most 999'):
    timesteps(1000, 1000)


def test_impossible_schedules():
  with pytest.raises(UnclipError, match='num_steps'):
    sch.cosine_schedule(0)
  with pytest.raises(UnclipError, match='more steps'):
    sch.linear_schedule(20)
  with pytest.raises(UnclipError, match='fast27'):
    sch.fast27_timesteps(46)


def guided_diffusion_rows(alpha_bar, kept):
  """The tables of a respaced guided-diffusion, float64, one row a kept timestep, ascending."""
  betas, last = [], 1.0
  for t in sorted(kept):
    betas.append(1 - alpha_bar[t] / last)
    last = alpha_bar[t]
  betas = np.array(betas)
  alphas = 1 - betas
  cumprod = np.cumprod(alphas)
  prev = np.append(1.0, cumprod[:-1])
  variance = betas * (1 - prev) / (1 - cumprod)
  return {
    'alpha_bar': cumprod,
    'alpha_bar_next': prev,
    'noise_var': 1 - cumprod,
    'noise_var_next': 1 - prev,
    'mean_x_0': betas * np.sqrt(prev) / (1 - cumprod),
    'mean_x_t': (1 - prev) * np.sqrt(alphas) / (1 - cumprod),
    'log_var_min': np.log(np.append(variance[1], variance[1:])),
    'log_var_max': np.log(betas),
    'sigma': np.sqrt(variance),
    'direction': np.sqrt(1 - prev - variance),
  }


@pytest.mark.parametrize('n', [2, 15, 250, 1000])
@pytest.mark.parametrize('schedule', [sch.cosine_schedule(), sch.linear_schedule()])
def test_a_plan_holds_the_respaced_tables(schedule, n):
  timesteps = sch.strided_timesteps(1000, n)
  plan = sch.make_plan(schedule, timesteps)
  assert plan.t.tolist() == timesteps.tolist()
  assert plan.index.tolist() == list(range(n))
  for name, expected in guided_diffusion_rows(schedule.alpha_bar, timesteps).items():
    # 1e-7: one rounding to float32, also of the differences 1 - alpha_bar. The reference for
    # `direction` is a difference that cancels, even in float64.
    actual, atol = getattr(plan, name)[::-1], 1e-12 if name == 'direction' else 1e-15
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=atol, err_msg=name)


def test_the_training_table_is_the_full_chain_by_timestep():
  schedule = sch.cosine_schedule(100)
  table = sch.training_table(schedule)
  assert table.t.tolist() == list(range(100))
  for name, expected in guided_diffusion_rows(schedule.alpha_bar, range(100)).items():
    np.testing.assert_allclose(getattr(table, name), expected, rtol=1e-7, atol=1e-15)
  rows = sch.take_rows(table, jnp.array([99, 0, 7]))
  assert rows.t.tolist() == [99, 0, 7]
  assert rows.noise_var_next[1] == 0
  assert np.array_equal(rows.log_var_max, table.log_var_max[[99, 0, 7]])


def test_a_plan_may_start_anywhere():
  schedule = sch.cosine_schedule()
  timesteps = sch.strided_timesteps(1000, 25)
  whole = sch.make_plan(schedule, timesteps)
  late = sch.make_plan(schedule, timesteps[timesteps <= 500])
  for name in Step._fields:
    if name != 'index':
      assert np.array_equal(getattr(whole, name)[-len(late.t) :], getattr(late, name)), name


def test_going_up_is_the_forward_process():
  schedule = sch.cosine_schedule()
  plan = sch.make_plan(schedule, [10, 400, 990], from_x_0=True, to_x_0=False)
  nodes = np.array([1.0, *schedule.alpha_bar[[10, 400, 990]]])
  assert plan.t.tolist() == [10, 10, 400]
  np.testing.assert_allclose(plan.alpha_bar, nodes[:-1], rtol=1e-7)
  np.testing.assert_allclose(plan.alpha_bar_next, nodes[1:], rtol=1e-7)
  np.testing.assert_allclose(plan.mean_x_t, np.sqrt(nodes[1:] / nodes[:-1]), rtol=1e-7)
  for bound in (plan.log_var_min, plan.log_var_max):
    np.testing.assert_allclose(np.exp(bound), 1 - nodes[1:] / nodes[:-1], rtol=1e-6)
  assert not plan.mean_x_0.any() and not plan.sigma.any()
  assert plan.noise_var[0] == 0


def test_a_plan_may_jump_back():
  schedule = sch.cosine_schedule()
  plan = sch.make_plan(schedule, [300, 200, 100, 300, 200, 100])
  up = plan.alpha_bar_next < plan.alpha_bar
  assert up.tolist() == [False, False, True, False, False, False]
  assert np.array_equal(plan.alpha_bar[1:], plan.alpha_bar_next[:-1])
  assert plan.alpha_bar_next[-1] == 1
  assert plan.index.tolist() == list(range(6))


def test_every_row_of_every_plan_is_finite():
  schedule = sch.cosine_schedule()
  for plan in (
    sch.make_plan(schedule, [0]),
    sch.make_plan(schedule, [999]),
    sch.make_plan(schedule, [999, 0, 999, 0]),
    sch.make_plan(schedule, [0], from_x_0=True),
    sch.make_plan(schedule, range(1000), from_x_0=True, to_x_0=False),
  ):
    assert all(np.isfinite(column).all() for column in plan)


@pytest.mark.parametrize(
  'timesteps, options, words',
  [
    ([], {}, 'one or more'),
    ([1.5], {}, 'integers'),
    ([[1, 2]], {}, 'list'),
    ([1000, 5], {}, '1000'),
    ([5, -1], {}, '-1'),
    ([7, 5, 5], {}, '5 stands twice'),
    ([5], {'to_x_0': False}, 'no transition'),
  ],
)
def test_impossible_plans(timesteps, options, words):
  with pytest.raises(UnclipError, match=words):
    sch.make_plan(sch.cosine_schedule(), timesteps, **options)
