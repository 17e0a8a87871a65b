"""DDIM backwards, and inpainting by resampling, on data whose best denoiser is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.diffusion.inversion import ddim_inversion, inversion_plan
from unclip_jax.diffusion.resampling import jumping_timesteps, keep_known
from unclip_jax.diffusion.schedule import cosine_schedule, make_plan, take_part
from unclip_jax.diffusion.schedule import strided_timesteps as strided
from unclip_jax.types import Prediction, UnclipError

SCHEDULE = cosine_schedule()
PLAN = make_plan(SCHEDULE, strided(1000, 20))
COVARIANCE = np.array([[1.0, 0.9], [0.9, 1.0]], 'f')


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def pair_denoiser(x_t, step):
  """The exact E[x_0 | x_t] for pairs x_0 ~ N(0, COVARIANCE)."""
  signal, noise = gaussian.signal_and_noise(step, x_t)
  total = signal.reshape(()) ** 2 * COVARIANCE + noise.reshape(()) ** 2 * jnp.eye(2)
  gain = signal.reshape(()) * COVARIANCE @ jnp.linalg.inv(total)
  x_0 = x_t @ gain.T
  return Prediction(x_0, gaussian.eps_from_x_0(x_t, x_0, step))


@functools.partial(jax.jit, static_argnames='iterations')
def invert(x_0, iterations):
  plan = inversion_plan(PLAN, iterations)
  return samplers.sample_loop(pair_denoiser, ddim_inversion(), plan, x_0, keys(len(x_0)))


@jax.jit
def ddim(x_T):
  return samplers.sample_loop(pair_denoiser, samplers.ddim(0.0), PLAN, x_T, keys(len(x_T)))


def test_ddim_gives_back_what_was_inverted_the_better_the_more_iterations():
  x_0 = jnp.linspace(-1.1, 1.1, 8).reshape(4, 2)
  error = {n: np.abs(ddim(invert(x_0, n)) - x_0).max() for n in (1, 2, 8)}
  assert error[1] > 3 * error[2] > 9 * error[8]
  assert error[8] < 1e-4 < error[1]


def test_what_ddim_makes_of_noise_is_inverted_to_that_noise():
  x_T = samplers.start_noise(keys(4), (2,))
  np.testing.assert_allclose(invert(ddim(x_T), 8), x_T, atol=1e-3)


def test_a_plan_is_inverted_row_by_row():
  plan = make_plan(SCHEDULE, [900, 500, 100])
  inverted = inversion_plan(plan, 2)
  assert inverted.t.tolist() == [100, 100, 500, 500, 900, 900]
  assert inverted.index.tolist() == [0, 1, 2, 3, 4, 5]
  np.testing.assert_array_equal(inverted.alpha_bar[::2], plan.alpha_bar[::-1])
  assert inverted.alpha_bar_next[0] == 1
  with pytest.raises(UnclipError, match='goes down'):
    inversion_plan(inverted._replace(alpha_bar_next=plan.alpha_bar.repeat(2)), 1)
  with pytest.raises(UnclipError, match='0 iterations'):
    inversion_plan(plan, 0)
  part = take_part(plan, np.array([2]))
  assert (part.t.tolist(), part.index.tolist()) == ([100], [0])


def test_jumps_go_back_a_stretch_and_end_where_they_would():
  t = np.array([9, 7, 5, 3, 0])
  assert jumping_timesteps(t, 2, 2).tolist() == [9, 7, 5, 9, 7, 5, 3, 0, 5, 3, 0]
  assert jumping_timesteps(t, 3, 1).tolist() == t.tolist()
  assert jumping_timesteps(t[:1], 2, 3).tolist() == [9]
  for jump, times in ((0, 1), (1, 0)):
    with pytest.raises(UnclipError, match='take 1 or more'):
      jumping_timesteps(t, jump, times)


@functools.partial(jax.jit, static_argnames='times')
def complete(known, mask, times):
  key_b = keys(known.shape[0])
  plan = make_plan(SCHEDULE, jumping_timesteps(strided(1000, 40), 5, times))
  sampler = keep_known(samplers.ddpm(), known, mask)
  x_T = samplers.start_noise(key_b, known.shape[1:])
  return samplers.sample_loop(pair_denoiser, sampler, plan, x_T, key_b)


def test_what_is_known_stays_and_the_rest_comes_to_agree_with_it():
  known = jnp.broadcast_to(jnp.array([1.2, -7.0]), (3000, 2))
  mask = jnp.broadcast_to(jnp.array([1.0, 0.0]), known.shape)
  off = {}
  for times in (1, 8):
    x_0 = np.asarray(complete(known, mask, times))
    np.testing.assert_array_equal(x_0[:, 0], np.float32(1.2))
    # Of such pairs the second is N(0.9 * 1.2, 1 - 0.9^2).
    off[times] = abs(x_0[:, 1].mean() - 0.9 * 1.2)
  assert off[8] < 0.06
  assert off[1] > 2 * off[8]
