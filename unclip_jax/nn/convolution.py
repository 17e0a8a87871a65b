"""The 3x3 convolution of the U-Nets, by Winograd's minimal filtering where that is faster.

F(2x2, 3x3) of Lavin & Gray 2016 (arXiv 1509.09308, section 4.1) makes tiles of 2 x 2 outputs from
16 products where a direct convolution takes 36. In float32 its error is that of a direct one,
within a factor of 1.5: what it adds and subtracts before the products is of one size.
GPUs and TPUs have convolutions of their own, and keep them.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.types import Array

# With fewer channels on either side, moving tiles costs more than the products that it saves; with
# fewer pixels in the batch, transforming the kernel does.
MIN_CHANNELS, MIN_PIXELS = 128, 256


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
    is_large = pays(math.prod(sizes), c, self.features)
    if deterministic and is_large and jnp.dtype(self.dtype) == jnp.float32:
      x = jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)
    else:
      x = direct(x, kernel)
    return x + bias[None, None, None]


def pays(pixels: int, channels: int, features: int) -> bool:
  """Whether tiles save time on a CPU, for a batch of so many pixels."""
  return min(channels, features) >= MIN_CHANNELS and pixels >= MIN_PIXELS


def direct(x: Array, kernel: Array) -> Array:
  """The convolution [b, h, w, d] of x [b, h, w, c] with a kernel [3, 3, c, d]."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def winograd(x: Array, kernel: Array) -> Array:
  """As `direct`, in tiles of 2 x 2 pixels (Lavin & Gray, eq. 8); any height and width."""
  # Kernels are transformed where they are used: what compilers would take out of a loop of sampling
  # steps costs little time, and all of them together 16/9 of the network's memory.
  x, kernel = jax.lax.optimization_barrier((x, kernel))
  b, height, width, c = x.shape
  rows, columns = -(-height // 2), -(-width // 2)
  x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
  # Tiles of 4 x 4 pixels, which overlap by 2, begin with each pair of rows, and of columns.
  tiles = jnp.stack(_transform_input(x.reshape(b, rows + 1, 2, 2 * columns + 2, c), 1))
  tiles = jnp.stack(_transform_input(tiles.reshape(4, b, rows, columns + 1, 2, c), 3))
  filters = jnp.stack(_transform_kernel(kernel))
  filters = jnp.stack(_transform_kernel(filters.swapaxes(0, 1)))
  products = jax.lax.dot_general(
    tiles.reshape(16, b * rows * columns, c),
    filters.reshape(16, c, -1),
    (((2,), (1,)), ((0,), (0,))),
  )
  by_column = _transform_output(products.reshape(4, 4, b, rows, columns, -1))
  out = [jnp.stack(_transform_output(part), axis=2) for part in by_column]
  out = jnp.stack(out, axis=4)  # [b, rows, 2, columns, 2, d]
  return out.reshape(b, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _transform_input(x: Array, axis: int) -> tuple[Array, ...]:
  """The four rows of each tile, transformed; x has n + 1 pairs of rows at two axes."""
  even, odd = (jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in (0, 1))
  n = x.shape[axis] - 1
  d_0, d_2 = (jax.lax.slice_in_dim(even, i, i + n, axis=axis) for i in (0, 1))
  d_1, d_3 = (jax.lax.slice_in_dim(odd, i, i + n, axis=axis) for i in (0, 1))
  return d_0 - d_2, d_1 + d_2, d_2 - d_1, d_1 - d_3


def _transform_kernel(g: Array) -> tuple[Array, ...]:
  ends = g[0] + g[2]
  return g[0], (ends + g[1]) * 0.5, (ends - g[1]) * 0.5, g[2]


def _transform_output(m: Array) -> tuple[Array, ...]:
  return m[0] + m[1] + m[2], m[1] - m[2] - m[3]
