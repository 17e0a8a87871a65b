"""The Inception v3 that FID is defined by (Szegedy et al. 2016, section 6; Heusel et al. 2017).

Its weights are those of TensorFlow's archive of 2015-12-05. It differs from the Inception v3 of
model collections in what is pooled beside the convolutions of a block: means over 3x3 pixels count
only those within the image, and the last block takes the largest in place of the mean.

Modules and branches are called as in the published file.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.nn.clip_resnet import FrozenBatchNorm
from unclip_jax.types import Array

_EPSILON = 1e-3  # of the batch norms


class Layer(NamedTuple):
  """A convolution: without padding where it halves the resolution, else of the same size."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1


# Layers one after the other; where a place has several, they are given the same and give what they
# make side by side.
Chain = tuple[tuple[Layer, ...], ...]


class Block(NamedTuple):
  """Chains side by side, and what is pooled.

  Attributes:
    chains: see `Chain`.
    pool: of 3x3 pixels. A block that halves the resolution gives the largest as they are.
    pool_features: of a 1x1 convolution of what was pooled; None for a block that halves.
  """

  chains: tuple[Chain, ...]
  pool: Literal['mean', 'max']
  pool_features: int | None


def _chain(*layers: Layer) -> Chain:
  return tuple((layer,) for layer in layers)


def _block_35(pool_features: int) -> Block:
  """Figure 5: at 35x35."""
  return Block(
    (
      _chain(Layer('branch1x1', 64)),
      _chain(Layer('branch5x5_1', 48), Layer('branch5x5_2', 64, (5, 5))),
      _chain(
        Layer('branch3x3dbl_1', 64),
        Layer('branch3x3dbl_2', 96, (3, 3)),
        Layer('branch3x3dbl_3', 96, (3, 3)),
      ),
    ),
    'mean',
    pool_features,
  )


def _block_17(width: int) -> Block:
  """Figure 6: at 17x17, with kernels of one row or one column."""
  row, column = (1, 7), (7, 1)
  return Block(
    (
      _chain(Layer('branch1x1', 192)),
      _chain(
        Layer('branch7x7_1', width),
        Layer('branch7x7_2', width, row),
        Layer('branch7x7_3', 192, column),
      ),
      _chain(
        Layer('branch7x7dbl_1', width),
        Layer('branch7x7dbl_2', width, column),
        Layer('branch7x7dbl_3', width, row),
        Layer('branch7x7dbl_4', width, column),
        Layer('branch7x7dbl_5', 192, row),
      ),
    ),
    'mean',
    192,
  )


def _block_8(pool: Literal['mean', 'max']) -> Block:
  """Figure 7: at 8x8, where chains end in a row and a column side by side."""
  row, column = (1, 3), (3, 1)
  return Block(
    (
      _chain(Layer('branch1x1', 320)),
      (
        (Layer('branch3x3_1', 384),),
        (Layer('branch3x3_2a', 384, row), Layer('branch3x3_2b', 384, column)),
      ),
      (
        (Layer('branch3x3dbl_1', 448),),
        (Layer('branch3x3dbl_2', 384, (3, 3)),),
        (Layer('branch3x3dbl_3a', 384, row), Layer('branch3x3dbl_3b', 384, column)),
      ),
    ),
    pool,
    192,
  )


_BLOCKS = {
  'Mixed_5b': _block_35(32),
  'Mixed_5c': _block_35(64),
  'Mixed_5d': _block_35(64),
  'Mixed_6a': Block(
    (
      _chain(Layer('branch3x3', 384, (3, 3), 2)),
      _chain(
        Layer('branch3x3dbl_1', 64),
        Layer('branch3x3dbl_2', 96, (3, 3)),
        Layer('branch3x3dbl_3', 96, (3, 3), 2),
      ),
    ),
    'max',
    None,
  ),
  'Mixed_6b': _block_17(128),
  'Mixed_6c': _block_17(160),
  'Mixed_6d': _block_17(160),
  'Mixed_6e': _block_17(192),
  'Mixed_7a': Block(
    (
      _chain(Layer('branch3x3_1', 192), Layer('branch3x3_2', 320, (3, 3), 2)),
      _chain(
        Layer('branch7x7x3_1', 192),
        Layer('branch7x7x3_2', 192, (1, 7)),
        Layer('branch7x7x3_3', 192, (7, 1)),
        Layer('branch7x7x3_4', 192, (3, 3), 2),
      ),
    ),
    'max',
    None,
  ),
  'Mixed_7b': _block_8('mean'),
  'Mixed_7c': _block_8('max'),
}


class ConvNorm(nn.Module):
  """A convolution without bias, a frozen batch norm, and ReLU."""

  features: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = 'SAME'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> [b, h', w', features]."""
    strides = (self.stride, self.stride)
    x = nn.Conv(
      self.features, self.kernel, strides, padding=self.padding, use_bias=False, name='conv'
    )(x)
    return nn.relu(FrozenBatchNorm(_EPSILON, name='bn')(x))


class Mixed(nn.Module):
  """A block; its channels are those of its chains and of what is pooled, side by side."""

  block: Block
  shrink: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, h, w, c] -> [b, h', w', c']."""

    def layer(spec: Layer) -> ConvNorm:
      padding = 'SAME' if spec.stride == 1 else 'VALID'
      features = spec.features // self.shrink
      return ConvNorm(features, spec.kernel, spec.stride, padding, name=spec.name)

    outputs = []
    for chain in self.block.chains:
      y = x
      for specs in chain:
        y = jnp.concatenate([layer(spec)(y) for spec in specs], axis=-1)
      outputs.append(y)
    features, window = self.block.pool_features, (3, 3)
    if features is None:
      pooled = nn.max_pool(x, window, (2, 2))
    elif self.block.pool == 'max':
      pooled = nn.max_pool(x, window, padding='SAME')
    else:
      pooled = nn.avg_pool(x, window, padding='SAME', count_include_pad=False)
    if features is not None:
      pooled = layer(Layer('branch_pool', features))(pooled)
    return jnp.concatenate([*outputs, pooled], axis=-1)


class Inception(nn.Module):
  """From images to the means of the last grid, without the classifier.

  Attributes:
    shrink: divides all channels; a divisor of 16. 1 is the network that FID is defined by.
  """

  shrink: int = 1

  @nn.compact
  def __call__(self, image_bhwc: Array) -> Array:
    """[b, h, w, 3] in [-1, 1], of 75 pixels a side or more, 299 for FID -> [b, 2048 / shrink]."""

    def conv(
      name: str, features: int, size: int, stride: int = 1, padding: str = 'VALID'
    ) -> ConvNorm:
      return ConvNorm(features // self.shrink, (size, size), stride, padding, name=name)

    x = conv('Conv2d_1a_3x3', 32, 3, 2)(image_bhwc)
    x = conv('Conv2d_2a_3x3', 32, 3)(x)
    x = conv('Conv2d_2b_3x3', 64, 3, padding='SAME')(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = conv('Conv2d_3b_1x1', 80, 1)(x)
    x = conv('Conv2d_4a_3x3', 192, 3)(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    for name, block in _BLOCKS.items():
      x = Mixed(block, self.shrink, name=name)(x)
    return x.mean(axis=(1, 2))
