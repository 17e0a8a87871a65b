"""The types that every part of the package shares. Imports nothing of ours."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Mapping[str, Any]


class UnclipError(ValueError):
  """A mistake of the caller's that one line explains: what is wrong, where, and the remedy.

  The command line prints it without a traceback and exits with status 1.
  """


class Step(NamedTuple):
  """One transition of a sampling plan, x_t -> x_s, or a stack of them, one a row.

  Downwards (alpha_bar_next > alpha_bar) it is the posterior q(x_s | x_t, x_0); upwards it is the
  forward process q(x_s | x_t). The coefficients come from float64: float32 differences of
  alpha_bar lose three digits where alpha_bar is close to 1.

  Attributes:
    index: int32, the transition's place in its plan. Keys are folded with it.
    t: int32, the timestep of the full schedule that the network is given.
    alpha_bar: float32, the signal power at x_t.
    alpha_bar_next: float32, the signal power at x_s, where the transition ends.
    noise_var: float32, the noise power at x_t, 1 - alpha_bar.
    noise_var_next: float32, the noise power at x_s; 0 exactly where x_s is x_0.
    mean_x_0: float32, the weight of x_0 in the mean of x_s.
    mean_x_t: float32, the weight of x_t in the mean of x_s.
    log_var_min: float32, log of the posterior variance, the lower bound of a learned range.
    log_var_max: float32, log of beta of this transition, its upper bound.
    sigma: float32, DDIM's noise at eta = 1; 0 where x_s is x_0 and on the way up.
    direction: float32, DDIM's weight of eps at eta = 1, sqrt(noise_var_next - sigma^2).
    eps_power: float32, the mean square of the noise that the network predicts at x_t, at most 1;
      1 where it was not measured.
  """

  index: Array
  t: Array
  alpha_bar: Array
  alpha_bar_next: Array
  noise_var: Array
  noise_var_next: Array
  mean_x_0: Array
  mean_x_t: Array
  log_var_min: Array
  log_var_max: Array
  sigma: Array
  direction: Array
  eps_power: Array


class Prediction(NamedTuple):
  """What a network says about x_t, in the forms that samplers need.

  Attributes:
    x_0: [b, ...] the un-noised signal.
    eps: [b, ...] the noise, consistent with x_0.
    log_var: [b, ...] log variance of x_s given x_t where it is learned, else None.
  """

  x_0: Array
  eps: Array
  log_var: Array | None = None


# (x_t [b, ...], step) -> Prediction. The step carries the schedule's row, so that nothing in
# the loop gathers from a table.
DenoiseFn = Callable[[Array, Step], Prediction]
