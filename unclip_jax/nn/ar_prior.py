"""The network of the autoregressive prior (section 2.2): a causal Transformer over buckets of z_i.

The sequence is: the caption's encoded tokens, z_t, a token of the dot product z_i . z_t, and the
principal components of z_i by decreasing eigenvalue, each as the bucket that it lies in. From the
dot product on, the output at a position is the logits of the component that comes next.

All components share one table of buckets: a bucket is the same part of each one's range, and which
component it is of is said by its position. A table for each would be 544 million weights at the
paper's sizes, most of them seen once in thousands of examples.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.configs import ArPriorConfig
from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import TextEncoder
from unclip_jax.nn.layers import LayerNorm
from unclip_jax.nn.prior import Prefix
from unclip_jax.nn.transformer import KeyValues, Transformer
from unclip_jax.types import Array


class ArPriorNetwork(nn.Module):
  """Predicts the bucket of each component from the caption and the components before it.

  The token of an unknown dot product is `num_buckets`.
  """

  config: ArPriorConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of both Transformers

  def setup(self):
    config = self.config
    dense = lambda width: nn.Dense(width, dtype=self.dtype)  # noqa: E731
    embed = lambda n: nn.Embed(  # noqa: E731
      n, config.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype
    )
    if config.text is not None:
      self.text_encoder = TextEncoder(config.text, self.dtype, self.remat)
    self.text_proj, self.z_t_proj = dense(config.width), dense(config.width)
    self.dot_tokens, self.bucket_tokens = embed(config.num_buckets + 1), embed(config.num_buckets)
    # The last component is predicted, and never read.
    length = config.context_length + 1 + config.num_components
    self.positions = self.param('positions', nn.initializers.normal(0.01), (length, config.width))
    self.blocks = Transformer(
      width=config.width,
      depth=config.depth,
      num_heads=config.num_heads,
      dtype=self.dtype,
      remat=self.remat,
    )
    self.norm = LayerNorm(dtype=self.dtype)
    self.out_proj = dense(config.num_buckets)

  def encode_prefix(self, text: TextFeatures) -> Prefix:
    """Keys and values of the caption's tokens and of z_t, which all that is drawn for it shares."""
    x, mask = self._prefix(text)
    length = x.shape[1]
    _, caches = self.blocks(x, causal_mask(length, length) & mask[:, None, None, :])
    return Prefix(caches, mask)

  def embed_dot(self, dot_b: Array) -> Array:
    """int [b] tokens of z_i . z_t -> [b, width], what the first step is given."""
    return self.dot_tokens(dot_b)

  def embed_bucket(self, token_b: Array) -> Array:
    """int [b] buckets -> [b, width], what each step after the first is given."""
    return self.bucket_tokens(token_b)

  def step(self, x_b: Array, index: Array, room: Prefix) -> tuple[Array, tuple[KeyValues, ...]]:
    """One position.

    Args:
      x_b: [b, width] of `embed_dot`, or of the component before as `embed_bucket` gives it.
      index: int32 scalar, which component is predicted.
      room: of `make_room`, with the keys and values of all positions before.

    Returns:
      The logits, float32 [b, num_buckets], and the caches with this position in them.
    """
    place = room.mask.shape[1] - self.config.num_components + index
    positions = self.positions[-self.config.num_components :]
    x = x_b + jax.lax.dynamic_index_in_dim(positions, index).astype(self.dtype)
    seen = room.mask & (jnp.arange(room.mask.shape[1])[None] <= place)
    x, caches = self.blocks(x[:, None], seen[:, None, None, :], room.caches, place)
    return self._logits(x[:, 0]), caches

  def __call__(self, tokens_bk: Array, dot_b: Array, text: TextFeatures) -> Array:
    """All positions at once, as training needs.

    Args:
      tokens_bk: int [b, num_components] buckets.
      dot_b: int [b] tokens of z_i . z_t.
      text: features of b captions; states are not looked at where the config has a `text`.

    Returns:
      float32 [b, num_components, num_buckets]: the logits of each component, given those before it.
    """
    k, (prefix, mask) = self.config.num_components, self._prefix(text)
    x = jnp.concatenate(
      [self.embed_dot(dot_b)[:, None], self.embed_bucket(tokens_bk[:, :-1])], axis=1
    )
    x = jnp.concatenate([prefix, x + self.positions[-k:].astype(self.dtype)[None]], axis=1)
    mask = jnp.pad(mask, ((0, 0), (0, k)), constant_values=True)
    length = x.shape[1]
    mask = causal_mask(length, length) & mask[:, None, None, :]
    x, _ = self.blocks(x, mask, num_last=k)
    return self._logits(x)

  def _prefix(self, text: TextFeatures) -> tuple[Array, Array]:
    """The caption's tokens and z_t, [b, s, width], and which of them are there."""
    states, mask = text.states, text.mask
    if self.config.text is not None:
      states = self.text_encoder(text.ids, text.mask)
      mask = jnp.ones_like(mask)  # its padding is of learned vectors, which count
    x = jnp.concatenate(
      [
        self.text_proj(states.astype(self.dtype)),
        self.z_t_proj(text.z_t.astype(self.dtype))[:, None],
      ],
      axis=1,
    )
    x = x + self.positions[: x.shape[1]].astype(self.dtype)[None]
    return x, jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)

  def _logits(self, x: Array) -> Array:
    return self.out_proj(self.norm(x)).astype(jnp.float32)


def make_room(prefix: Prefix, num_positions: int) -> Prefix:
  """A prefix with room for positions to come, so that a loop over them has caches of one shape."""

  def grow(x: Array, value: Any) -> Array:
    widths = [(0, 0), (0, num_positions), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=value)

  return Prefix(jax.tree.map(lambda x: grow(x, 0), prefix.caches), grow(prefix.mask, True))
