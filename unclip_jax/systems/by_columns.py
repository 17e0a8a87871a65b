"""The prior's kernels by columns on a CPU (`nn.columns`), without a second copy of them.

To everybody else the parameters are what they are everywhere: arrays of the same shapes, of which
only the order in memory is another. The programs of the prior are given views of that memory.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from unclip_jax.nn.columns import ByColumns
from unclip_jax.types import Array, Params

# Numbers of a kernel that is laid out so; a smaller one stays in the caches.
MIN_SIZE = 2**20
_ALIGNMENT = 64  # in bytes, of memory that JAX takes over and does not copy
# Kernels of a Transformer's blocks, and how many of their axes are inputs.
_KERNELS = ((r'(qkv|mlp_in|mlp_out)/kernel', 1), (r'attention_out/kernel', 2))


def lay_out(params: Params) -> Params:
  """Lets the large kernels of a Transformer lie by columns, where that is of use.

  Args:
    params: of a stage on the default device, or described by shapes; where the device is no CPU,
      or they are not float32, they stay as they are. What is not held elsewhere is freed array by
      array.
  """
  if jax.default_backend() != 'cpu':
    return params
  named, structure = jax.tree_util.tree_flatten_with_path(params)
  del params
  leaves = [leaf for _, leaf in named]
  paths = [path for path, _ in named]
  del named
  for i, path in enumerate(paths):
    leaf = leaves[i]
    order = _order(path, leaf)
    if order is None:
      continue
    if isinstance(leaf, jax.ShapeDtypeStruct):
      place = Format(Layout(order), jnp.zeros(()).sharding)
      leaves[i] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    else:
      leaves[i] = _laid_out(leaf, order)
  return jax.tree.unflatten(structure, leaves)


def view(params: Params) -> Params:
  """Parameters with `ByColumns` in the place of the kernels that `lay_out` has laid out so."""

  def see(path: Any, leaf: Any) -> Any:
    if isinstance(leaf, ByColumns | jax.core.Tracer):
      return leaf
    order = _order(path, leaf)
    if order is None or _order_in_memory(leaf) != order:
      return leaf
    outputs = leaf.ndim - _num_inputs(path)
    columns = tuple(leaf.shape[axis] for axis in order)
    shape = (int(np.prod(columns[:outputs])), int(np.prod(columns[outputs:])))
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return ByColumns(jax.ShapeDtypeStruct(shape, leaf.dtype), leaf.shape)
    return ByColumns(jax.device_put(np.asarray(_Memory(leaf, shape))), leaf.shape)

  is_leaf = lambda leaf: isinstance(leaf, ByColumns)  # noqa: E731
  return jax.tree_util.tree_map_with_path(see, params, is_leaf=is_leaf)


class Program:
  """A jitted function whose first argument, parameters, is given as `view` sees it."""

  def __init__(self, jitted: Any) -> None:
    self._jitted = jitted
    functools.update_wrapper(self, jitted)

  def __call__(self, params: Params, *args: Any, **static: Any) -> Any:
    """Runs it."""
    return self._jitted(view(params), *args, **static)

  def trace(self, params: Params, *args: Any, **static: Any) -> Any:
    """As that of a jitted function."""
    return self._jitted.trace(view(params), *args, **static)

  def lower(self, params: Params, *args: Any, **static: Any) -> jax.stages.Lowered:
    """As that of a jitted function."""
    return self._jitted.lower(view(params), *args, **static)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._jitted, name)


class _Memory:
  """The memory of an array that lies by columns, for numpy, which keeps it as long as it looks."""

  def __init__(self, array: Array, shape: tuple[int, int]) -> None:
    self._array = array
    # JAX copies memory that must not be written to. Nobody writes to it.
    self.__array_interface__ = {
      'version': 3,
      'shape': shape,
      'typestr': array.dtype.str,
      'data': (array.unsafe_buffer_pointer(), False),
    }


def _laid_out(kernel: Array, order: tuple[int, ...]) -> Array:
  """The same in memory of another order, by numpy: a program for each shape would be compiled."""
  source = np.asarray(kernel).transpose(order)
  memory = np.empty(source.nbytes + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  target = memory[start : start + source.nbytes].view(source.dtype).reshape(source.shape)
  target[...] = source
  return jax.dlpack.from_dlpack(target.transpose(np.argsort(order)))


def _num_inputs(path: Any) -> int | None:
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  return next((n for end, n in _KERNELS if re.search(f'(^|/){end}$', name)), None)


def _order(path: Any, leaf: Any) -> tuple[int, ...] | None:
  """The axes of a kernel as they should lie, outputs first; None for what stays as it is."""
  inputs = _num_inputs(path)
  if inputs is None or leaf.dtype != jnp.float32 or leaf.size < MIN_SIZE:
    return None
  return (*range(inputs, leaf.ndim), *range(inputs))


def _order_in_memory(leaf: Any) -> tuple[int, ...] | None:
  form = getattr(leaf, 'format', None)
  layout = getattr(form, 'layout', None)
  return None if layout is None else tuple(layout.major_to_minor)
