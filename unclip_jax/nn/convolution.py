"""The 3x3 convolution of the U-Nets, by Winograd's minimal filtering where that is faster.

F(2x2, 3x3) of Lavin & Gray 2016 (arXiv 1509.09308, section 4.1) makes tiles of 2 x 2 outputs from 16
products where a direct convolution takes 36. In float32 its error is that of a direct convolution,
within a factor of 1.5: what it adds and subtracts before the products, and halves, is of one size.
GPUs and TPUs have convolutions of their own, and keep them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.types import Array

# Below so many channels on either side, what tiling moves costs more than the products it saves.
MIN_CHANNELS = 128


class Conv3x3(nn.Module):
  """A 3x3 convolution with zeros around the image; its parameters are those of `nn.Conv`.

  A loop of sampling steps transforms the kernels once, before it begins: compilers take what does
  not change out of loops. It holds 16/9 of their size more meanwhile.
  """

  features: int
  kernel_init: Callable[..., Array] = nn.linear.default_kernel_init
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, deterministic: bool = True) -> Array:
    """[b, h, w, c] -> [b, h, w, features]. Where not deterministic, as in training, direct."""
    c = x.shape[-1]
    kernel = self.param('kernel', self.kernel_init, (3, 3, c, self.features))
    bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    is_wide = min(c, self.features) >= MIN_CHANNELS
    if deterministic and is_wide and jnp.dtype(self.dtype) == jnp.float32:
      x = jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)
    else:
      x = direct(x, kernel)
    return x + bias[None, None, None]


def direct(x: Array, kernel: Array) -> Array:
  """The convolution [b, h, w, d] of x [b, h, w, c] with a kernel [3, 3, c, d]."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def winograd(x: Array, kernel: Array) -> Array:
  """As `direct`, in tiles of 2 x 2 pixels (Lavin & Gray, eq. 8); any height and width."""
  b, height, width, c = x.shape
  rows, columns = -(-height // 2), -(-width // 2)
  x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
  # tile[i][j]: pixel (i, j) of every tile of 4 x 4, which overlap by 2.
  tile = [[x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]
  tiles = _stack(_both_ways(_transform_input, tile)).reshape(16, b * rows * columns, c)
  filters = _stack(_both_ways(_transform_kernel, [list(row) for row in kernel]))
  products = jax.lax.dot_general(tiles, filters, (((2,), (1,)), ((0,), (0,))))
  products = products.reshape(4, 4, b, rows, columns, kernel.shape[-1])
  out = _both_ways(_transform_output, [list(row) for row in products])
  out = jnp.stack([jnp.stack(row, axis=3) for row in out], axis=2)
  return out.reshape(b, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _transform_input(d: Sequence[Array]) -> list[Array]:
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _transform_kernel(g: Sequence[Array]) -> list[Array]:
  ends = g[0] + g[2]
  return [g[0], (ends + g[1]) * 0.5, (ends - g[1]) * 0.5, g[2]]


def _transform_output(m: Sequence[Array]) -> list[Array]:
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _both_ways(transform: Callable, square: Sequence[Sequence[Array]]) -> list[list[Array]]:
  """A transform of the columns of a square of arrays, then of its rows."""
  columns = [transform(column) for column in zip(*square, strict=True)]
  return [transform(row) for row in zip(*columns, strict=True)]


def _stack(square: Sequence[Sequence[Array]]) -> Array:
  return jnp.stack([a for row in square for a in row])
