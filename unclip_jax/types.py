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
  """One transition of a sampling plan, or a stack of them: alpha_bar -> alpha_bar_next.

  Attributes:
    index: int32, the transition's place in its plan. Keys are folded with it.
    t: int32, the timestep of the full schedule that the network is given.
    alpha_bar: float32, the signal power at x_t.
    alpha_bar_next: float32, the signal power at x_s, where the transition ends.
    log_var_min: float32, log of the posterior variance, the lower bound of a learned range.
    log_var_max: float32, log of beta of this transition, its upper bound.
  """

  index: Array
  t: Array
  alpha_bar: Array
  alpha_bar_next: Array
  log_var_min: Array
  log_var_max: Array


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
