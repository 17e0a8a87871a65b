"""A linear classifier on frozen features (Radford et al. 2021, section 3.2 and appendix A.3).

Logistic regression with an l2 penalty, on all features at once, by L-BFGS with a line search: a
convex problem, whose minimum is the same wherever it is found.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unclip_jax.types import Array, UnclipError

L2S = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # what `choose` tries
MAX_STEPS = 1000  # appendix A.3
TOLERANCE = 1e-6  # of the gradient's largest entry; the loss is in nats


class LinearProbe(NamedTuple):
  """A classifier: the class of the largest of features @ weights + bias.

  Attributes:
    weights: [d, num_classes].
    bias: [num_classes].
    steps: of L-BFGS.
    slope: the largest entry of the gradient where it stopped.
  """

  weights: np.ndarray
  bias: np.ndarray
  steps: int
  slope: float

  def accuracy(self, features: Array, labels: Array) -> float:
    """The share of features [n, d] whose label (int [n]) comes first; a tie is a miss.

    Raises:
      UnclipError: there are none, or a label is of no class.
    """
    rows, labels = _checked(features, labels, len(self.bias))
    scores = rows @ self.weights + self.bias
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    return float(((scores >= own).sum(axis=1) == 1).mean())


def fit(
  features: Array,
  labels: Array,
  num_classes: int,
  l2: float,
  max_steps: int = MAX_STEPS,
  tolerance: float = TOLERANCE,
  dtype: str = 'float64',
) -> LinearProbe:
  """Minimises the mean cross entropy plus l2 / 2 times the square of the weights.

  scikit-learn's C is 1 / (n l2).

  Args:
    features: [n, d].
    labels: int [n].
    num_classes: how many there are.
    l2: the penalty, which the bias is free of.
    max_steps: of L-BFGS.
    tolerance: the largest entry of the gradient at which it stops.
    dtype: 'float64', or 'float32', which takes half of the memory and stops short of a tolerance
      below 1e-5 or so.

  Raises:
    UnclipError: fewer than two classes, a class without features, a label of no class, an l2 that
      is not positive, or features that are not finite.
  """
  rows, labels = _checked(features, labels, num_classes)
  if num_classes < 2:
    raise UnclipError(f'{num_classes} classes: a classifier needs at least 2')
  if missing := sorted(set(range(num_classes)) - set(labels.tolist())):
    raise UnclipError(f'class {missing[0]} has no features to learn from: give at least one')
  if not l2 > 0:
    raise UnclipError(f'l2 {l2}: take more than 0, as without it there may be no minimum')
  with jax.enable_x64(dtype == 'float64'), jax.default_matmul_precision('highest'):
    numbers = (jnp.asarray(number, dtype) for number in (l2, tolerance))
    (weights, bias), steps, slope = _minimise(
      jnp.asarray(rows, dtype),
      jnp.asarray(labels, jnp.int32),
      *numbers,
      jnp.asarray(max_steps, jnp.int32),
      num_classes=num_classes,
    )
    return LinearProbe(np.asarray(weights), np.asarray(bias), int(steps), float(slope))


def choose(
  features: Array,
  labels: Array,
  held_out_features: Array,
  held_out_labels: Array,
  num_classes: int,
  l2s: Sequence[float] = L2S,
) -> tuple[float, dict[float, float]]:
  """The l2 whose classifier is right most often on held-out features, the largest of equal ones.

  Fit anew on all features with it, as the paper does, and measure on features of neither set.

  Args:
    features: [n, d], to fit.
    labels: int [n].
    held_out_features: [m, d], to choose by.
    held_out_labels: int [m].
    num_classes: how many there are.
    l2s: to try.

  Returns:
    The l2, and the accuracy of each.

  Raises:
    UnclipError: as `fit`, or there is no l2.
  """
  if not l2s:
    raise UnclipError('there is no l2 to choose from: give at least one')
  found = {
    l2: fit(features, labels, num_classes, l2).accuracy(held_out_features, held_out_labels)
    for l2 in l2s
  }
  return max(found, key=lambda l2: (found[l2], l2)), found


def _checked(features: Array, labels: Array, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
  rows, labels = np.asarray(features, np.float64), np.asarray(labels)
  if rows.ndim != 2 or labels.shape != rows.shape[:1] or not len(rows):
    raise UnclipError(
      f'features {list(rows.shape)} and labels {list(labels.shape)}: wanted are [n, d] and [n]'
    )
  wrong = labels[(labels < 0) | (labels >= num_classes)]
  if wrong.size:
    raise UnclipError(f'a label is {wrong[0]}, and there are {num_classes} classes')
  if not np.isfinite(rows).all():
    raise UnclipError('the features hold a NaN or an infinity: see to the pictures and the network')
  return rows, labels.astype(np.int64)


@functools.partial(jax.jit, static_argnames=('num_classes',))
def _minimise(
  rows: Array, labels: Array, l2: Array, tolerance: Array, most: Array, *, num_classes: int
) -> tuple[tuple[Array, Array], Array, Array]:
  """Weights and bias, the steps taken, and the largest entry of the gradient there."""

  def objective(params: tuple[Array, Array]) -> Array:
    weights, bias = params
    logits = rows @ weights + bias[None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss + l2 / 2 * (weights**2).sum()

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def is_going_on(carry: tuple) -> Array:
    *_, steps, slope = carry
    return (steps < most) & (slope > tolerance)

  def step(carry: tuple) -> tuple:
    params, state, steps, _ = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
    grad = optax.tree.get(state, 'grad')  # where the line search ended
    slope = jnp.stack([jnp.abs(leaf).max() for leaf in grad]).max()
    return optax.apply_updates(params, updates), state, steps + 1, slope

  zeros = (
    jnp.zeros((rows.shape[1], num_classes), rows.dtype),
    jnp.zeros((num_classes,), rows.dtype),
  )
  start = (zeros, solver.init(zeros), jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, rows.dtype))
  params, _, steps, slope = jax.lax.while_loop(is_going_on, step, start)
  return params, steps, slope
