"""The 3x3 convolution of the U-Nets, by Winograd's minimal filtering where that is faster.

F(m x m, 3 x 3) of Lavin & Gray 2016 (arXiv 1509.09308, section 4.1) makes a tile of m x m outputs
from (m + 2)^2 products, where a direct convolution takes 9 m^2: 2.25 times as many for m = 2, 4
times for m = 4. On a CPU in float32 it is as much as twice as fast. Its root mean square error is
one to two times that of a direct convolution for m = 2, and about four times for m = 4, where the
points are chosen for it. GPUs and TPUs have convolutions of their own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.types import Array

# With fewer channels on either side, moving tiles costs more than the products that it saves; with
# fewer pixels in the batch, transforming the kernel does.
MIN_CHANNELS = 128
MIN_PIXELS = {4: 2048, 2: 256}  # of a tile's size
# A kernel's 3 and a tile's m outputs are polynomials; their product is known by its values at m + 1
# points and at infinity.
_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))}


class Conv3x3(nn.Module):
  """A 3x3 convolution with zeros around the image; its parameters are those of `nn.Conv`."""

  features: int
  kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, deterministic: bool = True) -> Array:
    """[b, h, w, c] -> [b, h, w, features]. Where not deterministic, as in training, direct."""
    *sizes, c = x.shape
    kernel = self.param('kernel', self.kernel_init, (3, 3, c, self.features))
    bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    tile = tile_size(math.prod(sizes), c, self.features)
    if deterministic and tile and jnp.dtype(self.dtype) == jnp.float32:
      tiled = functools.partial(_apart, functools.partial(winograd, tile=tile))
      x = jax.lax.platform_dependent(x, kernel, cpu=tiled, default=direct)
    else:
      x = direct(x, kernel)
    return x + bias[None, None, None]


def tile_size(pixels: int, channels: int, features: int) -> int:
  """The tiles that are fastest on a CPU, for a batch of so many pixels; 0: none, but `direct`."""
  if min(channels, features) >= MIN_CHANNELS:
    for tile, least in MIN_PIXELS.items():
      if pixels >= least:
        return tile
  return 0


def direct(x: Array, kernel: Array) -> Array:
  """The convolution [b, h, w, d] of x [b, h, w, c] with a kernel [3, 3, c, d]."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def winograd(x: Array, kernel: Array, tile: int) -> Array:
  """As `direct`, in tiles of 2 or 4 pixels a side (Lavin & Gray, eq. 8); any height and width."""
  transforms, side = _make_transforms(tile), tile + 2
  b, height, width, c = x.shape
  rows, columns = -(-height // tile), -(-width // tile)
  more = [(1, (n + 1) * tile - size - 1) for n, size in ((rows, height), (columns, width))]
  x = jnp.pad(x, ((0, 0), *more, (0, 0)))
  # Patches begin with each group of `tile` rows, and of columns, and reach two into the next.
  x = x.reshape(b, rows + 1, tile, (columns + 1) * tile, c)
  x = _combine(transforms.of_input, _patch(x, 1, tile), 0)
  x = _combine(transforms.of_input, _patch(x.reshape(side, b, rows, -1, tile, c), 3, tile), 0)
  kernel = _combine(transforms.of_kernel, list(kernel), 0).swapaxes(0, 1)
  kernel = _combine(transforms.of_kernel, list(kernel), 0)
  products = jax.lax.dot_general(
    x.reshape(side**2, b * rows * columns, c),
    kernel.reshape(side**2, c, -1),
    (((2,), (1,)), ((0,), (0,))),
  )
  products = products.reshape(side, side, b, rows, columns, -1)
  by_column = _combinations(transforms.of_output, list(products))
  out = [_combine(transforms.of_output, list(column), 2) for column in by_column]
  out = jnp.stack(out, axis=4)  # [b, rows, tile, columns, tile, d]
  return out.reshape(b, rows * tile, columns * tile, -1)[:, :height, :width]


def _apart(conv: Callable[[Array, Array], Array], x: Array, kernel: Array) -> Array:
  """A convolution as a branch of its own, which is taken unless the kernel begins with a NaN.

  So its kernel is transformed where it is used. Out of a loop of sampling steps, or all of them at
  the beginning of a step, as XLA orders work for the sake of concurrency, transformed kernels would
  take several times the memory of the network's parameters, and leave the caches before they are
  read. An optimisation barrier is gone before the order is settled.
  """
  nothing = lambda x, kernel: jnp.full((*x.shape[:3], kernel.shape[3]), jnp.nan, x.dtype)  # noqa: E731
  return jax.lax.cond(jnp.isnan(kernel[0, 0, 0, 0]), nothing, conv, x, kernel)


class _Transforms(NamedTuple):
  """B^T, G and A^T of Lavin & Gray, eq. 8, in float64."""

  of_input: np.ndarray
  of_kernel: np.ndarray
  of_output: np.ndarray


def _make_transforms(tile: int) -> _Transforms:
  points = np.array(_POINTS[tile])

  def values(degree: int) -> np.ndarray:
    """From coefficients to the values at the points, and at infinity."""
    at_points = np.vander(points, degree, increasing=True)
    return np.vstack([at_points, np.eye(1, degree, degree - 1)])

  of_input = np.linalg.inv(values(tile + 2)).T
  # The largest weight of an input is 1: what is multiplied is then of one size.
  scale = np.abs(of_input).max(axis=1, keepdims=True)
  return _Transforms(of_input / scale, values(3) * scale, values(tile).T)


def _patch(x: Array, axis: int, tile: int) -> list[Array]:
  """Rows 0 to tile + 1 of each patch; x has n + 1 groups at an axis, their rows at the next."""
  n = x.shape[axis] - 1
  rows = [jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(tile)]
  here = [jax.lax.slice_in_dim(row, 0, n, axis=axis) for row in rows]
  return here + [jax.lax.slice_in_dim(row, 1, n + 1, axis=axis) for row in rows[:2]]


def _combinations(matrix: np.ndarray, arrays: list[Array]) -> list[Array]:
  """The matrix times a column of arrays."""
  found = []
  for weights in matrix:
    terms = [
      x if weight == 1 else x * np.float32(weight)
      for weight, x in zip(weights, arrays, strict=True)
      if abs(weight) > 1e-9
    ]
    found.append(sum(terms[1:], start=terms[0]))
  return found


def _combine(matrix: np.ndarray, arrays: list[Array], axis: int) -> Array:
  return jnp.stack(_combinations(matrix, arrays), axis=axis)
