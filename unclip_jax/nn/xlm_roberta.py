"""XLM-RoBERTa (Conneau et al. 2020) taught to speak CLIP (Carlsson et al. 2022, M-CLIP).

Kandinsky 2.1 reads captions of a hundred languages with it: its decoder sees the states of every
position and, as the caption's CLIP embedding, a projection of their mean. A Transformer as in
RoBERTa: not causal, each norm after its residual.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import XlmRobertaConfig
from unclip_jax.nn.attention import attend
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import LayerNorm, activation
from unclip_jax.types import Array


class PostNormBlock(nn.Module):
  """norm(x + attention(x)), then norm(x + mlp(x))."""

  width: int
  num_heads: int
  mlp_width: int
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    """Args: x [b, t, width]; mask bool [b or 1, 1, t or 1, t], true where a query may look."""
    head_dim = self.width // self.num_heads
    qkv = nn.DenseGeneral((3, self.num_heads, head_dim), dtype=self.dtype, name='qkv')(x)
    h = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask)
    h = nn.DenseGeneral(self.width, axis=(-2, -1), dtype=self.dtype, name='attention_out')(h)
    x = LayerNorm(self.epsilon, self.dtype, name='attention_norm')(x + h)
    h = activation('gelu')(nn.Dense(self.mlp_width, dtype=self.dtype, name='mlp_in')(x))
    h = nn.Dense(self.width, dtype=self.dtype, name='mlp_out')(h)
    return LayerNorm(self.epsilon, self.dtype, name='mlp_norm')(x + h)


class XlmRoberta(nn.Module):
  """The text encoder of Kandinsky 2.1's decoder."""

  config: XlmRobertaConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids_bt: Array, mask_bt: Array) -> TextFeatures:
    """Reads captions.

    Args:
      ids_bt: int32 [b, t]; t is at most the context length.
      mask_bt: bool [b, t], true where there is text, somewhere in each caption.

    Returns:
      The states [b, t, width], also of the padding, which looks at the text (Kandinsky's decoder
      sees them too); and z_t, float32 [b, embed_dim], not of unit norm.

    Raises:
      ValueError: the shapes differ, a caption is too long, the positions do not reach to the
        context length, or the heads do not divide the width.
    """
    config = self.config
    _check(config, ids_bt.shape, mask_bt.shape)
    init = nn.initializers.normal(0.02)
    x = nn.Embed(
      config.vocab_size, config.width, embedding_init=init, dtype=self.dtype, name='tokens'
    )(ids_bt)
    positions = self.param('positions', init, (config.num_positions, config.width))
    token_types = self.param('token_types', init, (config.num_token_types, config.width))
    # The first token is at pad_id + 1, padding at pad_id (fairseq). What is padding is told by the
    # id here, by the mask below: transformers has it so.
    is_token = (ids_bt != config.pad_id).astype(jnp.int32)
    index_bt = jnp.cumsum(is_token, axis=1) * is_token + config.pad_id
    x = x + token_types[:1].astype(self.dtype)[None] + positions[index_bt].astype(self.dtype)
    x = LayerNorm(config.epsilon, self.dtype, name='norm')(x)
    for i in range(config.depth):
      block = PostNormBlock(
        width=config.width,
        num_heads=config.num_heads,
        mlp_width=config.mlp_width,
        epsilon=config.epsilon,
        dtype=self.dtype,
        name=f'block_{i}',
      )
      x = block(x, mask_bt[:, None, None])
    # Public files bring BERT's pooler, which nothing reads: called for its parameters alone (1 of
    # 560 million), so that what is written back is what was read.
    nn.Dense(config.width, dtype=self.dtype, name='pooler')(x[:, 0])
    weights = mask_bt.astype(jnp.float32)[:, :, None]
    mean = (x.astype(jnp.float32) * weights).sum(axis=1) / weights.sum(axis=1)
    z_t = nn.Dense(config.embed_dim, dtype=self.dtype, name='projection')(mean.astype(self.dtype))
    return TextFeatures(ids_bt, mask_bt, x, z_t.astype(jnp.float32))


def _check(config: XlmRobertaConfig, ids: tuple[int, ...], mask: tuple[int, ...]) -> None:
  if len(ids) != 2 or ids != mask:
    raise ValueError(f'ids of shape {ids} and a mask of shape {mask}: both must be [b, t]')
  if ids[1] > config.context_length:
    raise ValueError(f'{ids[1]} tokens do not fit into a context of {config.context_length}')
  if config.pad_id + 1 + config.context_length > config.num_positions:
    raise ValueError(
      f'{config.num_positions} positions, the first {config.pad_id + 1} without a token, are too '
      f'few for a context of {config.context_length}'
    )
  if config.width % config.num_heads:
    raise ValueError(f'{config.num_heads} heads do not divide a width of {config.width}')
