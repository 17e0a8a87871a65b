"""The network of the diffusion prior (section 2.2): a causal Transformer that predicts z_i.

The sequence is: the caption's encoded tokens, z_t, the timestep, the noised z_i, and a learned
token whose output is the prediction. Nothing before the timestep depends on it, so `encode_prefix`
computes those keys and values once a prompt and `__call__` runs the remaining three positions.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import PriorConfig
from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import LayerNorm, TimestepMLP
from unclip_jax.nn.transformer import KeyValues, Transformer
from unclip_jax.types import Array

NUM_SUFFIX = 3  # timestep, noised z_i, query


class Prefix(NamedTuple):
  """The part of the sequence that no denoising step changes.

  Attributes:
    caches: for each block the keys and values [b, context_length + 1, heads, head_dim].
    mask: bool [b, context_length + 1], false at padding.
  """

  caches: tuple[KeyValues, ...]
  mask: Array


class PriorNetwork(nn.Module):
  """Predicts the un-noised z_i, in the space that the prior diffuses in."""

  config: PriorConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformer

  def setup(self):
    config = self.config
    dense = lambda: nn.Dense(config.width, dtype=self.dtype)  # noqa: E731
    self.text_proj, self.z_t_proj, self.z_i_proj = dense(), dense(), dense()
    self.time_mlp = TimestepMLP(config.width, config.width, config.width, self.dtype)
    init = nn.initializers.normal(0.01)
    length = config.context_length + 1 + NUM_SUFFIX
    self.positions = self.param('positions', init, (length, config.width))
    self.query = self.param('query', init, (config.width,))
    self.blocks = Transformer(
      width=config.width,
      depth=config.depth,
      num_heads=config.num_heads,
      dtype=self.dtype,
      remat=self.remat,
    )
    self.norm = LayerNorm(dtype=self.dtype)
    self.out_proj = nn.Dense(config.embed_dim, dtype=self.dtype)

  def encode_prefix(self, text: TextFeatures) -> Prefix:
    """Keys and values of the caption's tokens and of z_t, for `__call__`."""
    x, mask = self._prefix(text)
    length = x.shape[1]
    _, caches = self.blocks(x, causal_mask(length, length) & mask[:, None, None, :])
    return Prefix(caches, mask)

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps -> [n, width], for all steps of a plan before its loop."""
    return self.time_mlp(t)

  def __call__(self, z_i_t: Array, time_emb: Array, prefix: Prefix) -> Array:
    """One denoising step.

    Args:
      z_i_t: [b, embed_dim] noised image embedding.
      time_emb: [b, width] from `encode_time`.
      prefix: of the b captions.

    Returns:
      float32 [b, embed_dim]: the predicted un-noised embedding.
    """
    x = self._suffix(z_i_t, time_emb)
    mask = jnp.pad(prefix.mask, ((0, 0), (0, NUM_SUFFIX)), constant_values=True)
    mask = causal_mask(NUM_SUFFIX, mask.shape[1]) & mask[:, None, None, :]
    x, _ = self.blocks(x, mask, prefix.caches)
    return self._predicted(x)

  def predict(self, z_i_t: Array, t: Array, text: TextFeatures) -> Array:
    """Prefix and step in one pass, as training needs. z_i_t [b, d], t int [b] -> [b, d]."""
    x, mask = self._prefix(text)
    x = jnp.concatenate([x, self._suffix(z_i_t, self.encode_time(t))], axis=1)
    mask = jnp.pad(mask, ((0, 0), (0, NUM_SUFFIX)), constant_values=True)
    length = x.shape[1]
    mask = causal_mask(length, length) & mask[:, None, None, :]
    x, _ = self.blocks(x, mask, num_last=1)
    return self._predicted(x)

  def _prefix(self, text: TextFeatures) -> tuple[Array, Array]:
    """The caption's tokens and z_t, [b, s, width], and which of them are there."""
    x = jnp.concatenate(
      [
        self.text_proj(text.states.astype(self.dtype)),
        self.z_t_proj(text.z_t.astype(self.dtype))[:, None],
      ],
      axis=1,
    )
    x = x + self.positions[: x.shape[1]].astype(self.dtype)[None]
    return x, jnp.pad(text.mask, ((0, 0), (0, 1)), constant_values=True)

  def _suffix(self, z_i_t: Array, time_emb: Array) -> Array:
    """The timestep, the noised embedding and the query, [b, 3, width]."""
    b = z_i_t.shape[0]
    query = jnp.broadcast_to(self.query.astype(self.dtype), (b, 1, self.config.width))
    z_i = self.z_i_proj(z_i_t.astype(self.dtype))[:, None]
    x = jnp.concatenate([time_emb.astype(self.dtype)[:, None], z_i, query], axis=1)
    return x + self.positions[-NUM_SUFFIX:].astype(self.dtype)[None]

  def _predicted(self, x: Array) -> Array:
    return self.out_proj(self.norm(x[:, -1])).astype(jnp.float32)
