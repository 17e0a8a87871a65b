"""The pre-norm Transformer that CLIP, the prior and the decoder's text encoder share.

A layer returns the keys and values of the positions it was given, and can be given those of
positions before them: a prefix is then computed once and reused (paper section 2.2: nothing
before the prior's timestep token depends on the timestep). A cache may also have room for positions
to come, so that all steps of a loop have arrays of one shape.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.nn.attention import attend
from unclip_jax.nn.layers import LayerNorm, activation
from unclip_jax.types import Array

KeyValues = tuple[Array, Array]  # ([b, s, heads, head_dim], the same)


class TransformerBlock(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  width: int
  num_heads: int
  head_dim: int
  mlp_width: int
  mlp_activation: str = 'gelu'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None,
    cache: KeyValues | None = None,
    index: Array | None = None,
    num_last: int | None = None,
  ) -> tuple[Array, KeyValues]:
    """As `Transformer`, of one block."""
    h = LayerNorm(dtype=self.dtype, name='attention_norm')(x)
    qkv = nn.DenseGeneral((3, self.num_heads, self.head_dim), dtype=self.dtype, name='qkv')(h)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if cache is not None and index is not None:
      k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=1)
    elif cache is not None:
      k = jnp.concatenate([cache[0], k], axis=1)
      v = jnp.concatenate([cache[1], v], axis=1)
    if num_last is not None:
      x, q = x[:, -num_last:], q[:, -num_last:]
      mask = mask if mask is None else mask[:, :, -num_last:]
    h = attend(q, k, v, mask)
    x = x + nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype, name='attention_out')(h)
    h = LayerNorm(dtype=self.dtype, name='mlp_norm')(x)
    h = nn.Dense(self.mlp_width, dtype=self.dtype, name='mlp_in')(h)
    h = activation(self.mlp_activation)(h)
    return x + nn.Dense(self.width, dtype=self.dtype, name='mlp_out')(h), (k, v)


class Transformer(nn.Module):
  """A stack of blocks. No final norm: its place differs from model to model."""

  width: int
  depth: int
  num_heads: int
  head_dim: int | None = None
  mlp_width: int | None = None  # 4 * width
  mlp_activation: str = 'gelu'
  dtype: Any = jnp.float32
  remat: bool = False  # training keeps what goes into a block, and computes the rest again

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    caches: tuple[KeyValues, ...] | None = None,
    index: Array | None = None,
    num_last: int | None = None,
  ) -> tuple[Array, tuple[KeyValues, ...]]:
    """Runs the blocks.

    Args:
      x: [b, t, width].
      mask: bool [b or 1, 1, t, s + t], true where a query may look; None looks everywhere.
      caches: keys and values of s earlier positions, a pair for each block.
      index: int32 scalar; with it the caches have room for all positions, s of them, x is written
        into them from `index` on, and the mask, bool [b or 1, 1, t, s], hides those to come.
      num_last: how many positions are wanted, at the end; None for all. The last block gives the
        others no more than keys and values.

    Returns:
      [b, t or num_last, width], and for each block the keys and values of all s + t positions, or
      of s.

    Raises:
      ValueError: no head_dim is given, and the heads do not divide the width.
    """
    # How many are wanted is no array: the fifth argument, self counted.
    make = nn.remat(TransformerBlock, static_argnums=(5,)) if self.remat else TransformerBlock
    keys_values = []
    for i in range(self.depth):
      block = self.block(make, name=f'block_{i}')
      cache, is_last = None if caches is None else caches[i], i == self.depth - 1
      x, kv = block(x, mask, cache, index, num_last if is_last else None)
      keys_values.append(kv)
    return x, tuple(keys_values)

  def block(self, make: Callable[..., TransformerBlock] = TransformerBlock, **more: Any) -> Any:
    """One of the blocks, which differ in their parameters alone.

    Args:
      make: the class.
      **more: a module's name or parent.
    """
    head_dim = self.head_dim
    if head_dim is None:
      head_dim, rest = divmod(self.width, self.num_heads)
      if rest:
        raise ValueError(f'{self.num_heads} heads do not divide a width of {self.width}')
    return make(
      width=self.width,
      num_heads=self.num_heads,
      head_dim=head_dim,
      mlp_width=4 * self.width if self.mlp_width is None else self.mlp_width,
      mlp_activation=self.mlp_activation,
      dtype=self.dtype,
      **more,
    )
