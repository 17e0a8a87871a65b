"""The U-Net of Stable Diffusion (Rombach et al. 2022), as Stable unCLIP's decoder has it.

Between the residual blocks stand Transformers over pixels: self-attention, attention to the text,
and a gated perceptron. The text's keys and values do not change from one denoising step to the
next: they are encoded apart and passed in, as are the embeddings of the timesteps and of the image.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import LatentUNetConfig
from unclip_jax.nn.attention import attend
from unclip_jax.nn.convolution import Conv3x3
from unclip_jax.nn.layers import (
  GroupNorm,
  LayerNorm,
  TimestepMLP,
  activation,
  upsample_nearest,
  zeros,
)
from unclip_jax.nn.resnet import ResBlock
from unclip_jax.nn.transformer import KeyValues
from unclip_jax.types import Array

LayerContext = tuple[KeyValues, ...]  # of each Transformer block of an attention layer


class CrossAttentionBlock(nn.Module):
  """x + attention over x, then + attention to the context, then + GEGLU; each behind a norm."""

  width: int
  num_heads: int
  dtype: Any = jnp.float32

  def setup(self):
    head_dim, rest = divmod(self.width, self.num_heads)
    if rest:
      raise ValueError(f'{self.num_heads} heads do not divide {self.width} channels')

    def heads_in(n: int) -> nn.DenseGeneral:
      return nn.DenseGeneral((n, self.num_heads, head_dim), use_bias=False, dtype=self.dtype)

    def heads_out() -> nn.DenseGeneral:
      return nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype)

    self.self_norm = LayerNorm(dtype=self.dtype)
    self.self_qkv = heads_in(3)
    self.self_out = heads_out()
    self.context_norm = LayerNorm(dtype=self.dtype)
    self.context_q = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
    self.context_kv = heads_in(2)
    self.context_out = heads_out()
    self.mlp_norm = LayerNorm(dtype=self.dtype)
    self.mlp_in = nn.Dense(8 * self.width, dtype=self.dtype)  # 4 times the width, and its gate
    self.mlp_out = nn.Dense(self.width, dtype=self.dtype)

  def encode_context(self, context: Array) -> KeyValues:
    """[b, s, context_dim] -> keys and values [b, s, heads, head_dim]."""
    kv = self.context_kv(context)
    return kv[:, :, 0], kv[:, :, 1]

  def __call__(self, x: Array, context: KeyValues) -> Array:
    """[b, t, width] -> the same shape."""
    qkv = self.self_qkv(self.self_norm(x))
    x = x + self.self_out(attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
    q = self.context_q(self.context_norm(x))
    x = x + self.context_out(attend(q.reshape(*q.shape[:2], self.num_heads, -1), *context))
    h, gate = jnp.split(self.mlp_in(self.mlp_norm(x)), 2, axis=-1)
    return x + self.mlp_out(h * activation('gelu')(gate))


class SpatialTransformer(nn.Module):
  """Transformer blocks over the pixels of x, added to x."""

  channels: int
  num_heads: int
  depth: int
  num_groups: int
  dtype: Any = jnp.float32

  def setup(self):
    # Stable Diffusion's own number, unlike that of the residual blocks.
    self.norm = GroupNorm(self.num_groups, epsilon=1e-6, dtype=self.dtype)
    self.in_proj = nn.Dense(self.channels, dtype=self.dtype)
    self.blocks = [
      CrossAttentionBlock(self.channels, self.num_heads, self.dtype) for _ in range(self.depth)
    ]
    self.out_proj = nn.Dense(self.channels, kernel_init=zeros, dtype=self.dtype)

  def encode_context(self, context: Array) -> LayerContext:
    """[b, s, context_dim] -> each block's keys and values."""
    return tuple(block.encode_context(context) for block in self.blocks)

  def __call__(self, x: Array, context: LayerContext) -> Array:
    """[b, h, w, c] -> the same shape."""
    b, h, w, c = x.shape
    y = self.in_proj(self.norm(x).reshape(b, h * w, c))
    for block, keys_values in zip(self.blocks, context, strict=True):
      y = block(y, keys_values)
    return x + self.out_proj(y).reshape(b, h, w, c)


class LatentUNet(nn.Module):
  """Encoder, middle and decoder of residual blocks and Transformers, with skip connections."""

  config: LatentUNetConfig
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    widths = [config.channels * m for m in config.multipliers]
    levels, n = range(len(widths)), config.num_res_blocks

    def conv(width: int, stride: int = 1) -> nn.Conv:
      # Symmetric, where 'SAME' would pad an even size at its end alone.
      return nn.Conv(width, (3, 3), (stride, stride), padding=1, dtype=self.dtype)

    def block(level: int) -> ResBlock:
      return ResBlock(
        widths[level],
        scale_shift=False,
        dropout=config.dropout,
        num_groups=config.num_groups,
        dtype=self.dtype,
      )

    def attention(level: int) -> SpatialTransformer:
      heads, depth = config.num_heads[level], config.depths[level]
      return SpatialTransformer(widths[level], heads, depth, config.num_groups, self.dtype)

    def level_attention(level: int, count: int) -> list[SpatialTransformer | None]:
      has_attention = level in config.attention_levels
      return [attention(level) if has_attention else None for _ in range(count)]

    self.time_mlp = TimestepMLP(config.channels, config.emb_dim, config.emb_dim, self.dtype)
    if config.class_dim:
      self.class_in_proj = nn.Dense(config.emb_dim, dtype=self.dtype)
      self.class_out_proj = nn.Dense(config.emb_dim, dtype=self.dtype)
    self.conv_in = conv(config.channels)
    self.down_blocks = [[block(i) for _ in range(n)] for i in levels]
    self.down_attention = [level_attention(i, n) for i in levels]
    self.downsamplers = [conv(widths[i], stride=2) for i in levels[:-1]]
    self.middle_blocks = [block(-1) for _ in range(2)]
    self.middle_attention = attention(-1)
    # Indexed by level, 0 the highest resolution; they run from the last to the first.
    self.up_blocks = [[block(i) for _ in range(n + 1)] for i in levels]
    self.up_attention = [level_attention(i, n + 1) for i in levels]
    self.upsamplers = [Conv3x3(widths[i], dtype=self.dtype) for i in levels[1:]]
    self.norm_out = GroupNorm(config.num_groups, dtype=self.dtype)
    self.conv_out = nn.Conv(config.out_channels, (3, 3), kernel_init=zeros, dtype=jnp.float32)

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps of the full schedule -> [n, emb_dim]."""
    return self.time_mlp(t)

  def encode_class(self, class_embedding: Array) -> Array:
    """[b, class_dim] -> [b, emb_dim], to be added to the timestep embedding."""
    h = self.class_in_proj(class_embedding.astype(self.dtype))
    return self.class_out_proj(nn.silu(h))

  def encode_context(self, context: Array) -> tuple[LayerContext, ...]:
    """[b, s, context_dim] -> each attention layer's keys and values, in the order they run in."""
    down = [a for level in self.down_attention for a in level]
    up = [a for level in reversed(self.up_attention) for a in level]
    layers = [a for a in [*down, self.middle_attention, *up] if a is not None]
    return tuple(a.encode_context(context.astype(self.dtype)) for a in layers)

  def __call__(
    self, x: Array, emb: Array, context: tuple[LayerContext, ...], deterministic: bool = True
  ) -> Array:
    """One evaluation.

    Args:
      x: [b, h, w, in_channels], of any height and width.
      emb: [b, emb_dim], the timestep embedding plus that of the class.
      context: from `encode_context`.
      deterministic: false to apply dropout (needs the rng 'dropout').

    Returns:
      float32 [b, h, w, out_channels]
    """
    emb = nn.silu(emb.astype(self.dtype))
    layer_context = iter(context)

    def run(block: ResBlock, layer: SpatialTransformer | None, h: Array) -> Array:
      h = block(h, emb, deterministic)
      return h if layer is None else layer(h, next(layer_context))

    h = self.conv_in(x.astype(self.dtype))
    skips = [h]
    for i, (blocks, layers) in enumerate(zip(self.down_blocks, self.down_attention, strict=True)):
      for block, layer in zip(blocks, layers, strict=True):
        h = run(block, layer, h)
        skips.append(h)
      if i < len(self.downsamplers):
        h = self.downsamplers[i](h)
        skips.append(h)
    h = run(self.middle_blocks[0], self.middle_attention, h)
    h = run(self.middle_blocks[1], None, h)
    for i in reversed(range(len(self.up_blocks))):
      for block, layer in zip(self.up_blocks[i], self.up_attention[i], strict=True):
        h = run(block, layer, jnp.concatenate([h, skips.pop()], axis=-1))
      if i:
        # What was of an odd size is halved upwards: the last row or column is not doubled.
        rows, columns = skips[-1].shape[1:3]
        h = self.upsamplers[i - 1](upsample_nearest(h)[:, :rows, :columns], deterministic)
    return self.conv_out(nn.silu(self.norm_out(h)).astype(jnp.float32))

  def predict(
    self,
    x: Array,
    t: Array,
    context: Array,
    class_embedding: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Everything in one, as `init` and training need it.

    Args:
      x: [b, h, w, in_channels].
      t: int [b] timesteps of the full schedule.
      context: [b, s, context_dim] states of the text.
      class_embedding: [b, class_dim], where the config has a class_dim.
      deterministic: false to apply dropout.

    Returns:
      float32 [b, h, w, out_channels]

    Raises:
      ValueError: there is a class_embedding and no class_dim, or the other way round.
    """
    if (class_embedding is None) != (self.config.class_dim == 0):
      given = 'no' if class_embedding is None else 'a'
      raise ValueError(f'{given} class_embedding, but a class_dim of {self.config.class_dim}')
    emb = self.encode_time(t)
    if class_embedding is not None:
      emb = emb + self.encode_class(class_embedding)
    return self(x, emb, self.encode_context(context), deterministic)
