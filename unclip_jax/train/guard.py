"""What a bad loss is, and updates that leave it out: parameters and average stay as they were.

A step is bad where its loss or its gradient is not finite or, if asked for, where its loss is a
spike: above `spike_factor` times the median of the last `RECENT` good ones, once there are
`FEWEST`. Losses are positive. What is compared with is part of the state, so that a run continued
from a checkpoint decides as one that was never stopped.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.train.state import Batch, Metrics, TrainState, TrainStep
from unclip_jax.types import Array

FEWEST = 16  # losses that a median is worth anything of
BAD, LIMIT = 'bad', 'loss_limit'  # metrics of a guarded step


def spike_threshold(recent_losses: Array, spike_factor: float) -> Array:
  """Returns the loss above which one is a spike, infinity while there are too few to say so.

  Args:
    recent_losses: float32 [RECENT], NaN where there is none yet.
    spike_factor: above 1.
  """
  enough = jnp.isfinite(recent_losses).sum() >= FEWEST
  return jnp.where(enough, spike_factor * jnp.nanmedian(recent_losses), jnp.inf)


def guarded(train_step: TrainStep, stops: bool, spike_factor: float | None = None) -> TrainStep:
  """Returns a training step that does not apply a bad update.

  The choice is part of the program, which stays one: the state is bit for bit what it was before a
  bad step, of several devices on each.

  Args:
    train_step: of `make_train_step`, (state, batch, key) -> (state, metrics).
    stops: whether the number of the step stays as well, so that the same step comes again, with the
      same batch and key, until the caller has seen it: a program of many steps gives back the state
      before the first bad one. Else that step is skipped, and the next one is another.
    spike_factor: see the module; None takes any finite loss for good.

  Returns:
    A step like the given one. Its metrics have also `bad`, 0 or 1, and with a `spike_factor`
    `loss_limit`, what the loss was compared with.
  """

  def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
    after, metrics = train_step(state, batch, key)
    loss, recent = metrics['loss'], state.recent_losses
    more = {BAD: ~(jnp.isfinite(loss) & jnp.isfinite(metrics['grad_norm']))}
    if spike_factor is not None:
      more[LIMIT] = spike_threshold(recent, spike_factor)
      more[BAD] |= loss > more[LIMIT]
    if clash := more.keys() & metrics.keys():
      raise ValueError(f'loss_fn returns metrics of reserved names: {sorted(clash)}')
    after = after._replace(recent_losses=jnp.concatenate([loss[None], recent[:-1]]))
    kept = jax.tree.map(lambda new, old: jnp.where(more[BAD], old, new), after, state)
    if not stops:
      kept = kept._replace(step=after.step)
    return kept, metrics | jax.tree.map(lambda m: m.astype(jnp.float32), more)

  return step


def why_bad(metrics: Mapping[str, Any]) -> str:
  """Says in words what is wrong with the metrics (scalars) of a step that was bad."""
  for name in ('loss', 'grad_norm'):
    if not math.isfinite(value := float(metrics[name])):
      return f'{name} is {value}'
  loss, limit = float(metrics['loss']), float(metrics[LIMIT])
  return f'loss is {loss:.6g}, a spike above the limit of {limit:.6g}'
