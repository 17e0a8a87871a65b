"""Arrays of other implementations into the shapes of ours, and back.

The functions are at home in numpy and in JAX. A layout is the same object whenever it is asked for,
so that it can be a static argument of jit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Arrays = tuple[Any, ...]


class Layout(NamedTuple):
  """How arrays of theirs lie in ours.

  Attributes:
    read: arrays of theirs -> arrays of ours; ValueError or TypeError where they do not fit.
    write: the inverse.
  """

  read: Callable[[Arrays], Arrays]
  write: Callable[[Arrays], Arrays]


SAME = Layout(lambda theirs: theirs, lambda ours: ours)


@functools.cache
def transpose(*axes: int) -> Layout:
  """Axis i of ours is axis axes[i] of theirs."""
  back = tuple(int(i) for i in np.argsort(axes))
  return Layout(
    lambda theirs: tuple(x.transpose(axes) for x in theirs),
    lambda ours: tuple(x.transpose(back) for x in ours),
  )


@functools.cache
def first_row(num_axes: int = 1) -> Layout:
  """Ours without the leading axes of theirs, which are of size 1."""

  def read(theirs: Arrays) -> Arrays:
    if any(x.shape[:num_axes] != (1,) * num_axes for x in theirs):
      raise ValueError('the leading axes are not of size 1')
    return tuple(x.reshape(x.shape[num_axes:]) for x in theirs)

  return Layout(read, lambda ours: tuple(x.reshape((1,) * num_axes + x.shape) for x in ours))


@functools.cache
def heads_in(head_dim: int) -> Layout:
  """n projections [heads * head_dim, in] as one kernel [in, n, heads, head_dim]; so for biases."""

  def read(theirs: Arrays) -> Arrays:
    rows = [x.reshape(-1, head_dim, *x.shape[1:]) for x in theirs]
    stacked = _namespace(rows).stack(rows)  # [n, heads, head_dim], with [in] behind it for kernels
    return (stacked if stacked.ndim == 3 else stacked.transpose(3, 0, 1, 2),)

  def write(ours: Arrays) -> Arrays:
    (x,) = ours
    rows = x if x.ndim == 3 else x.transpose(1, 2, 3, 0)
    return tuple(row.reshape(-1, *row.shape[2:]) for row in rows)

  return Layout(read, write)


@functools.cache
def heads_out(head_dim: int) -> Layout:
  """A projection [out, heads * head_dim] as a kernel [heads, head_dim, out]."""
  return Layout(
    lambda theirs: tuple(x.T.reshape(-1, head_dim, x.shape[0]) for x in theirs),
    lambda ours: tuple(x.reshape(-1, x.shape[-1]).T for x in ours),
  )


@functools.cache
def tokens_out(num_tokens: int, token_major: bool) -> Layout:
  """A projection to n tokens of c channels: [n * c, in] -> [in, n, c]; so for biases.

  Args:
    num_tokens: n.
    token_major: false where the token is the faster axis of theirs: [c * n, in].
  """

  def read(theirs: Arrays) -> Arrays:
    (x,) = theirs
    shape = (num_tokens, -1) if token_major else (-1, num_tokens)
    x = x.reshape(*shape, *x.shape[1:])
    x = x if token_major else x.swapaxes(0, 1)
    return (x if x.ndim == 2 else x.transpose(2, 0, 1),)

  def write(ours: Arrays) -> Arrays:
    (x,) = ours
    x = x if x.ndim == 2 else x.transpose(1, 2, 0)
    x = x if token_major else x.swapaxes(0, 1)
    return (x.reshape(-1, *x.shape[2:]),)

  return Layout(read, write)


@functools.cache
def split_inputs(first: int) -> Layout:
  """A convolution of channels side by side as two: [out, a + b, h, w] -> [h, w, a or b, out]."""

  def read(theirs: Arrays) -> Arrays:
    (x,) = theirs
    x = x.transpose(2, 3, 1, 0)
    return x[:, :, :first], x[:, :, first:]

  def write(ours: Arrays) -> Arrays:
    return (_namespace(ours).concatenate(ours, axis=2).transpose(3, 2, 0, 1),)

  return Layout(read, write)


@functools.cache
def constant(value: float) -> Layout:
  """A number of ours that they do not have."""
  return Layout(lambda theirs: (np.float32(value),), lambda ours: ())


@functools.cache
def interleaved_heads(num: int, head_dim: int) -> Layout:
  """n projections in one, head by head: [heads * n * head_dim, in] -> [in, n, heads, head_dim].

  So for biases. ADM and GLIDE have [q | k | v] in each head, and [k | v] for a context.
  """

  def read(theirs: Arrays) -> Arrays:
    (x,) = theirs
    x = x.reshape(-1, num, head_dim, *x.shape[1:]).swapaxes(0, 1)
    return (x if x.ndim == 3 else x.transpose(3, 0, 1, 2),)

  def write(ours: Arrays) -> Arrays:
    (x,) = ours
    x = x if x.ndim == 3 else x.transpose(1, 2, 3, 0)
    return (x.swapaxes(0, 1).reshape(-1, *x.shape[3:]),)

  return Layout(read, write)


@functools.cache
def pointwise(layout: Layout) -> Layout:
  """The layout of a matrix that they have as a 1x1 convolution of sequences, [out, in, 1]."""

  def read(theirs: Arrays) -> Arrays:
    if any(x.ndim != 3 or x.shape[-1] != 1 for x in theirs):
      raise ValueError('not [out, in, 1]')
    return layout.read(tuple(x.reshape(x.shape[:-1]) for x in theirs))

  return Layout(read, lambda ours: tuple(x[..., None] for x in layout.write(ours)))


def _namespace(arrays: Any) -> Any:
  return np if isinstance(arrays[0], np.ndarray) else jnp
