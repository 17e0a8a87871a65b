"""Inpainting by any network: the known part is replaced at each step (RePaint).

Lugmayr et al. 2022 (arXiv 2201.09865), algorithm 1. What is painted cannot know at once how it
meets what is known: the way goes back up and down again, a stretch at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.gaussian import per_sample
from unclip_jax.diffusion.samplers import Sampler, step_noise
from unclip_jax.types import Array, UnclipError

_KNOWN = 1 << 18  # beyond what a sampling loop folds into its key


def keep_known(sampler: Sampler, known: Array, mask: Array) -> Sampler:
  """A sampler whose x_s is drawn from q(x_s | x_0) where x_0 is known (eq. 8).

  Args:
    sampler: of the rest; `ddpm`, which draws from the forward process where a plan goes up.
    known: [b, ...] x_0; what it holds where the mask is 0 has no effect.
    mask: 1 where it is known, else 0, of the rank of `known`.
  """

  def step_fn(key_b, x_t, prediction, step, state):
    x_s, state = sampler.step(key_b, x_t, prediction, step, state)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _KNOWN))(key_b)
    noise = step_noise(keys, step, known.shape[1:])
    signal = jnp.sqrt(per_sample(step.alpha_bar_next, x_s))
    known_s = signal * known + jnp.sqrt(per_sample(step.noise_var_next, x_s)) * noise
    return jnp.where(mask > 0, known_s, x_s), state

  return Sampler(sampler.init, step_fn)


def jumping_timesteps(timesteps: np.ndarray, jump: int, times: int) -> np.ndarray:
  """Timesteps that fall, each stretch of `jump` transitions gone through `times` times.

  As going up is one draw of q(x_s | x_t) however far, it is one transition.

  Args:
    timesteps: int [n], falling.
    jump: transitions of a stretch; the one to x_0 belongs to none.
    times: 1 never goes up.

  Raises:
    UnclipError: jump or times is below 1.
  """
  if jump < 1 or times < 1:
    raise UnclipError(f'jumps of {jump} steps, {times} times: take 1 or more of both')
  parts = []
  for start in range(0, len(timesteps) - 1, jump):
    stretch = timesteps[start : start + jump + 1]
    # Where the last round ends the next stretch begins.
    parts += [stretch] * (times - 1) + [stretch[:-1]]
  return np.concatenate([*parts, timesteps[-1:]])
