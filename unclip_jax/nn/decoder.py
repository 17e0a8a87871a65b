"""The decoder's network (section 2.1): a U-Net conditioned on z_i and on the caption.

z_i enters twice: projected and added to the timestep embedding, and as extra tokens in front of
the caption's. Two ways to read the caption: the paper's own text Transformer, and Karlo's
projections of CLIP's text states.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.configs import DecoderConfig, TextConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import LayerNorm, space_to_depth, zeros
from unclip_jax.nn.transformer import KeyValues, Transformer
from unclip_jax.nn.unet import UNet
from unclip_jax.types import Array


class Conditioning(NamedTuple):
  """What the decoder's loop needs of a prompt, computed once.

  Attributes:
    emb: [b, emb_dim], added to the timestep embedding.
    context: each attention layer's keys and values of z_i's tokens and the caption's.
    context_mask: bool [b, s], or None where every position counts.
    draft: float32 [b, draft_size, draft_size, 3], or None where the config has no draft.
    condition: the draft's share of the first convolution, and a known picture's.
  """

  emb: Array
  context: tuple[KeyValues, ...]
  context_mask: Array | None
  draft: Array | None = None
  condition: Array | None = None


class TextEncoder(nn.Module):
  """GLIDE's text Transformer: not causal, padding replaced by learned vectors."""

  config: TextConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformer

  @nn.compact
  def __call__(self, ids_bt: Array, mask_bt: Array) -> Array:
    """int32 [b, t], bool [b, t] -> [b, t, width] after the final norm."""
    config = self.config
    init = nn.initializers.normal(0.02)
    x = nn.Embed(
      config.vocab_size, config.width, embedding_init=init, dtype=self.dtype, name='tokens'
    )(ids_bt)
    shape = (config.context_length, config.width)
    t = ids_bt.shape[1]
    positions = self.param('positions', init, shape)[:t].astype(self.dtype)[None]
    padding = self.param('padding', init, shape)[:t].astype(self.dtype)[None]
    x = jnp.where(mask_bt[:, :, None], x + positions, padding)
    x, _ = Transformer(
      width=config.width,
      depth=config.depth,
      num_heads=config.num_heads,
      mlp_width=config.mlp_width,
      mlp_activation=config.mlp_activation,
      dtype=self.dtype,
      remat=self.remat,
      name='blocks',
    )(x)
    return LayerNorm(dtype=self.dtype, name='norm')(x)


class Draft(nn.Module):
  """Guesses the picture at once: trained on its squared error, it gives E[x_0 | z_i, caption].

  Not in the paper. A weight of a convolution works once a pixel, one of this perceptron once a
  picture: a small network learns in minutes of a CPU where things are, and the U-Net refines it.
  """

  width: int
  shape: tuple[int, int, int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[b, n] -> float32 [b, *shape]."""
    for i in range(2):
      x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f'dense_{i}')(x))
      x = LayerNorm(dtype=self.dtype, name=f'norm_{i}')(x)
    x = nn.Dense(math.prod(self.shape), dtype=jnp.float32, name='out_proj')(x.astype(jnp.float32))
    return x.reshape(-1, *self.shape)


class DecoderNetwork(nn.Module):
  """Text encoder or projections, image projections, U-Net; a draft and masks if asked for."""

  config: DecoderConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformer and of the U-Net

  def setup(self):
    config = self.config
    emb_dim, context_dim = config.unet.emb_dim, config.unet.context_dim
    dense = lambda width: nn.Dense(width, dtype=self.dtype)  # noqa: E731
    self.null_z_i = self.param('null_z_i', zeros, (config.embed_dim,))
    self.z_i_to_emb = dense(emb_dim)
    self.z_i_to_tokens = nn.DenseGeneral((config.num_image_tokens, context_dim), dtype=self.dtype)
    self.text_to_emb = dense(emb_dim)
    if config.text is not None:
      self.text_encoder = TextEncoder(config.text, self.dtype, self.remat)
      # The layers of the U-Net project the context to keys and values; widths need only meet here.
      self.text_to_context = dense(context_dim) if config.text.width != context_dim else None
    else:
      self.text_to_context = dense(context_dim)
      self.context_norm = LayerNorm(dtype=self.dtype)
    if config.draft_size:
      shape = (config.draft_size, config.draft_size, config.unet.in_channels)
      self.draft = Draft(config.draft_width, shape, self.dtype)
    if config.inpaints:
      # Zero at first and without a bias: a decoder that was trained without masks may learn them,
      # and a picture of which nothing is known changes nothing.
      self.conv_known = nn.Conv(
        config.unet.channels, (3, 3), use_bias=False, kernel_init=zeros, dtype=self.dtype
      )
    self.unet = UNet(config.unet, self.dtype, self.remat)

  def encode_conditioning(
    self, text: TextFeatures, z_i: Array, has_z_i: Array, known: Array | None = None
  ) -> Conditioning:
    """Everything about a prompt that no denoising step changes.

    Args:
      text: features of the b captions (of an empty one where the caption is dropped).
      z_i: [b, embed_dim] CLIP image embeddings.
      has_z_i: bool [b]; where false the learned null embedding stands in for z_i.
      known: [b, h, w, 4], a picture, zero where it is to be painted, and 1 where it is known, else
        0 (GLIDE, section 4); None to paint all.
    """
    config = self.config
    z_i = z_i.astype(jnp.float32) * config.embed_scale
    z_i = jnp.where(has_z_i[:, None], z_i, self.null_z_i[None]).astype(self.dtype)
    tokens = self.z_i_to_tokens(z_i)
    if config.text is not None:
      states = self.text_encoder(text.ids, text.mask)
      pooled = states[:, -1]
      if self.text_to_context is not None:
        states = self.text_to_context(states)
      mask = None
    else:
      states = self.context_norm(self.text_to_context(text.states.astype(self.dtype)))
      pooled = text.z_t.astype(self.dtype)
      mask = jnp.pad(text.mask, ((0, 0), (config.num_image_tokens, 0)), constant_values=True)
    context = jnp.concatenate([tokens, states], axis=1)
    emb = self.text_to_emb(pooled) + self.z_i_to_emb(z_i)
    draft = condition = None
    if config.draft_size:
      # No gradient passes between the draft and the rest: to it the caption's features are given,
      # and to the U-Net it is an image given, as the small one is to an upsampler.
      draft = self.draft(jax.lax.stop_gradient(jnp.concatenate([z_i, pooled], axis=-1)))
      scale = config.image_size // config.draft_size
      enlarged = jax.lax.stop_gradient(draft).repeat(scale, axis=1).repeat(scale, axis=2)
      condition = self.unet.encode_condition(enlarged)
    if known is not None:
      share = self.conv_known(space_to_depth(known, config.unet.patch_size).astype(self.dtype))
      condition = share if condition is None else condition + share
    return Conditioning(emb, self.unet.encode_context(context), mask, draft, condition)

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps -> [n, emb_dim], for all steps of a plan before its loop."""
    return self.unet.encode_time(t)

  def __call__(
    self, x_t: Array, time_emb: Array, conditioning: Conditioning, deterministic: bool = True
  ) -> Array:
    """x_t [b, h, w, 3], time_emb [b, emb_dim] -> float32 [b, h, w, out_channels]."""
    emb = time_emb + conditioning.emb
    _, context, context_mask, _, condition = conditioning
    return self.unet(x_t, emb, context, context_mask, condition, deterministic)

  def predict(
    self,
    x_t: Array,
    t: Array,
    text: TextFeatures,
    z_i: Array,
    has_z_i: Array,
    deterministic: bool,
    known: Array | None = None,
  ) -> tuple[Array, Array | None]:
    """Conditioning and one evaluation in one, as training needs: the output, and the draft."""
    conditioning = self.encode_conditioning(text, z_i, has_z_i, known)
    output = self(x_t, self.encode_time(t), conditioning, deterministic)
    return output, conditioning.draft
