"""The U-Net of ADM (Dhariwal & Nichol 2021), as decoder and as upsampler.

What does not change from one denoising step to the next is encoded apart and passed in: the
timestep embeddings of a whole plan, each layer's keys and values of the context, and a
given image's share of the first convolution (a convolution of [x_t, low] is one of x_t plus one
of low).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import UNetConfig
from unclip_jax.nn.attention import attend
from unclip_jax.nn.layers import GroupNorm, TimestepMLP, depth_to_space, space_to_depth, zeros
from unclip_jax.nn.resnet import ResBlock
from unclip_jax.nn.transformer import KeyValues
from unclip_jax.types import Array


class SpatialAttention(nn.Module):
  """Self-attention over pixels whose keys and values begin with those of the context (GLIDE)."""

  channels: int
  head_dim: int
  num_groups: int
  has_context: bool
  dtype: Any = jnp.float32

  def setup(self):
    heads, rest = divmod(self.channels, self.head_dim)
    if rest:
      raise ValueError(f'a head_dim of {self.head_dim} does not divide {self.channels} channels')
    self.norm = GroupNorm(self.num_groups, dtype=self.dtype)
    self.qkv = nn.DenseGeneral((3, heads, self.head_dim), dtype=self.dtype)
    if self.has_context:
      self.context_kv = nn.DenseGeneral((2, heads, self.head_dim), dtype=self.dtype)
    self.out_proj = nn.DenseGeneral(
      self.channels, axis=(-2, -1), kernel_init=zeros, dtype=self.dtype
    )

  def encode_context(self, context: Array) -> KeyValues:
    """[b, s, context_dim] -> keys and values [b, s, heads, head_dim]."""
    kv = self.context_kv(context)
    return kv[:, :, 0], kv[:, :, 1]

  def __call__(self, x: Array, context: KeyValues | None, mask: Array | None) -> Array:
    """Args: x [b, h, w, c]; mask bool [b, 1, 1, s + h * w] over context, then pixels."""
    b, h, w, c = x.shape
    qkv = self.qkv(self.norm(x).reshape(b, h * w, c))
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if context is not None:
      k = jnp.concatenate([context[0], k], axis=1)
      v = jnp.concatenate([context[1], v], axis=1)
    return x + self.out_proj(attend(q, k, v, mask)).reshape(b, h, w, c)


class UNet(nn.Module):
  """Encoder, middle and decoder of residual blocks with skip connections.

  `plan` in `setup` lists the blocks in the order in which they run.
  """

  config: UNetConfig
  dtype: Any = jnp.float32
  remat: bool = False  # training keeps what goes into a block, and computes the rest again

  def setup(self):
    config = self.config
    self.time_mlp = TimestepMLP(config.channels, config.emb_dim, config.emb_dim, self.dtype)
    self.conv_in = nn.Conv(config.channels, (3, 3), dtype=self.dtype)
    if config.condition_channels:
      # Zero at first: a U-Net that was trained without a condition may be given one.
      self.conv_condition = nn.Conv(
        config.channels, (3, 3), use_bias=False, kernel_init=zeros, dtype=self.dtype
      )
    widths = [config.channels * m for m in config.multipliers]

    make_attention = nn.remat(SpatialAttention) if self.remat else SpatialAttention

    def attention(width: int) -> SpatialAttention:
      return make_attention(
        width, config.head_dim, config.num_groups, config.context_dim is not None, self.dtype
      )

    def level_blocks(level: int, count: int) -> list[ResBlock]:
      return [self._res_block(widths[level]) for _ in range(count)]

    def level_attention(level: int, count: int) -> list[SpatialAttention | None]:
      has_attention = level in config.attention_levels
      return [attention(widths[level]) if has_attention else None for _ in range(count)]

    n = config.num_res_blocks
    levels = range(len(widths))
    self.down_blocks = [level_blocks(i, n) for i in levels]
    self.down_attention = [level_attention(i, n) for i in levels]
    self.downsamplers = [self._res_block(widths[i], 'down') for i in levels[:-1]]
    self.middle_blocks = [self._res_block(widths[-1]) for _ in range(2)]
    self.middle_attention = attention(widths[-1]) if config.attention_levels else None
    # Indexed by level, 0 the highest resolution; they run from the last to the first.
    self.up_blocks = [level_blocks(i, n + 1) for i in levels]
    self.up_attention = [level_attention(i, n + 1) for i in levels]
    self.upsamplers = [self._res_block(widths[i], 'up') for i in levels[1:]]
    self.norm_out = GroupNorm(config.num_groups, dtype=self.dtype)
    out_channels = config.out_channels * config.patch_size**2
    self.conv_out = nn.Conv(out_channels, (3, 3), kernel_init=zeros, dtype=jnp.float32)

  def _res_block(self, channels: int, resample: str = 'none') -> ResBlock:
    config = self.config
    # Whether it drops out is no array: the third argument, self counted.
    make_block = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
    return make_block(
      channels, config.scale_shift, resample, config.dropout, config.num_groups, self.dtype
    )

  def _attention_layers(self) -> list[SpatialAttention]:
    """Every attention layer, in the order in which they run."""
    down = [a for level in self.down_attention for a in level]
    up = [a for level in reversed(self.up_attention) for a in level]
    return [a for a in [*down, self.middle_attention, *up] if a is not None]

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps of the full schedule -> [n, emb_dim]."""
    return self.time_mlp(t)

  def encode_context(self, context: Array) -> tuple[KeyValues, ...]:
    """[b, s, context_dim] -> each attention layer's keys and values of the context."""
    return tuple(a.encode_context(context.astype(self.dtype)) for a in self._attention_layers())

  def encode_condition(self, image_bhwc: Array) -> Array:
    """An image given at full size, enlarged or a draft -> its share of the first convolution."""
    return self.conv_condition(
      space_to_depth(image_bhwc, self.config.patch_size).astype(self.dtype)
    )

  def __call__(
    self,
    x: Array,
    emb: Array,
    context: tuple[KeyValues, ...] | None = None,
    context_mask: Array | None = None,
    condition: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """One evaluation.

    Args:
      x: [b, h, w, in_channels]; h and w divide by patch_size * 2 ** (levels - 1).
      emb: [b, emb_dim], the timestep embedding plus what conditions it.
      context: from `encode_context`.
      context_mask: bool [b, s], false at padding; pixels are always seen.
      condition: from `encode_condition`.
      deterministic: false to apply dropout (needs the rng 'dropout').

    Returns:
      float32 [b, h, w, out_channels]
    """
    config = self.config
    emb = nn.silu(emb.astype(self.dtype))
    h = self.conv_in(space_to_depth(x, config.patch_size).astype(self.dtype))
    if condition is not None:
      h = h + condition
    layer_context = iter(context or ())

    def attend_to(layer: SpatialAttention | None, h: Array) -> Array:
      if layer is None:
        return h
      mask = None
      if context_mask is not None:
        pixels = h.shape[1] * h.shape[2]
        mask = jnp.pad(context_mask, ((0, 0), (0, pixels)), constant_values=True)[:, None, None]
      return layer(h, next(layer_context, None), mask)

    skips = [h]
    for i, (blocks, layers) in enumerate(zip(self.down_blocks, self.down_attention, strict=True)):
      for block, layer in zip(blocks, layers, strict=True):
        h = attend_to(layer, block(h, emb, deterministic))
        skips.append(h)
      if i < len(self.downsamplers):
        h = self.downsamplers[i](h, emb, deterministic)
        skips.append(h)
    h = self.middle_blocks[0](h, emb, deterministic)
    h = attend_to(self.middle_attention, h)
    h = self.middle_blocks[1](h, emb, deterministic)
    for i in reversed(range(len(self.up_blocks))):
      for block, layer in zip(self.up_blocks[i], self.up_attention[i], strict=True):
        h = attend_to(layer, block(jnp.concatenate([h, skips.pop()], axis=-1), emb, deterministic))
      if i:
        h = self.upsamplers[i - 1](h, emb, deterministic)
    h = nn.silu(self.norm_out(h))
    return depth_to_space(self.conv_out(h.astype(jnp.float32)), config.patch_size)
