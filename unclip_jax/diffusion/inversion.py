"""DDIM run backwards: from x_0 to the x_T that its sampling begins from to end there.

With v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 a step down is a rotation by the angle d
between the two levels of noise, x_s = cos(d) x_t - sin(d) v(x_t) (Salimans & Ho 2022, appendix D).
It is solved for x_t by x_t <- (x_s + sin(d) v(x_t)) / cos(d), from x_s on. One iteration is the
usual inversion (Song et al. 2021, section 4.3), which takes v(x_s) for v(x_t); each further one
makes the error smaller by a factor of the order of d. Pan et al. 2023 (arXiv 2309.04907) iterate
eps, which converges slowly where there is hardly any signal.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion import gaussian
from unclip_jax.diffusion.gaussian import per_sample, signal_and_noise
from unclip_jax.diffusion.samplers import Sampler
from unclip_jax.diffusion.schedule import take_part
from unclip_jax.types import Array, Step, UnclipError


class _Begin(NamedTuple):
  """Where a transition begins: x_s, and the signal power at the x_t that is sought."""

  x_s: Array
  alpha_bar: Array


def inversion_plan(plan: Step, iterations: int = 1) -> Step:
  """The rows of a plan that goes down from its end to its beginning, for `ddim_inversion`.

  Args:
    plan: what is sampled by, Step of numpy arrays [n].
    iterations: how often each transition is gone through.

  Returns:
    Step of numpy arrays [n * iterations].

  Raises:
    UnclipError: the plan goes up, or iterations is below 1.
  """
  if iterations < 1:
    raise UnclipError(f'{iterations} iterations of an inversion: take 1 or more')
  if not np.all(plan.alpha_bar_next > plan.alpha_bar):
    raise UnclipError('only a plan that goes down all the way can be inverted')
  return take_part(plan, np.repeat(np.arange(len(plan.t))[::-1], iterations))


def ddim_inversion() -> Sampler:
  """Steps of `ddim(0.0)` solved for x_t, over a plan of `inversion_plan`.

  The prediction is that at the x_t found so far. Nothing may limit x_0: what is clipped cannot be
  undone.
  """

  def step_fn(key_b, x_t, prediction, step, begin):
    # The first row of a transition: what the one before came to is x_s from here on.
    is_first = step.alpha_bar != begin.alpha_bar
    x_s = jnp.where(is_first, x_t, begin.x_s)
    signal, noise = signal_and_noise(step, x_t)
    signal_s = jnp.sqrt(per_sample(step.alpha_bar_next, x_t))
    noise_s = jnp.sqrt(per_sample(step.noise_var_next, x_t))
    sine, cosine = signal_s * noise - noise_s * signal, signal_s * signal + noise_s * noise
    v = gaussian.v_from_x_0(prediction.x_0, prediction.eps, step)
    return (x_s + sine * v) / cosine, _Begin(x_s, step.alpha_bar)

  return Sampler(lambda x_start: _Begin(x_start, jnp.ones(())), step_fn)
