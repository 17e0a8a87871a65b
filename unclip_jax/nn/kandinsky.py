"""The network of Kandinsky's decoders (Razzhigaev et al. 2023): an ADM U-Net over latents.

As in the paper's decoder (section 2.1) z_i enters twice: projected and added to the timestep
embedding, and as extra tokens. In 2.1 the states of the decoder's own text encoder stand behind
those tokens; in 2.2 the caption is known from z_i alone.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import KandinskyDecoderConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import Conditioning
from unclip_jax.nn.layers import LayerNorm
from unclip_jax.nn.unet import UNet
from unclip_jax.types import Array


class KandinskyDecoderNetwork(nn.Module):
  """Projections of z_i, and in 2.1 of the caption; U-Net.

  Nothing learned stands for no z_i: what guidance leads away from is given CLIP's embedding of a
  picture of zeros.
  """

  config: KandinskyDecoderConfig
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    emb_dim, context_dim = config.unet.emb_dim, config.unet.context_dim
    dense = lambda width: nn.Dense(width, dtype=self.dtype)  # noqa: E731
    self.z_i_to_emb = dense(emb_dim)
    self.z_i_to_tokens = nn.DenseGeneral((config.num_image_tokens, context_dim), dtype=self.dtype)
    self.emb_norm = LayerNorm(dtype=self.dtype)
    if config.text_width is not None:
      self.text_to_emb = dense(emb_dim)
      self.text_to_context = dense(context_dim)
    else:
      self.context_norm = LayerNorm(dtype=self.dtype)
    self.unet = UNet(config.unet, self.dtype)

  def encode_conditioning(self, text: TextFeatures | None, z_i: Array) -> Conditioning:
    """Everything about a prompt that no denoising step changes.

    Args:
      text: features of the b captions by the decoder's own text encoder (2.1): states
        [b, t, text_width], of which every position counts, also padding; z_t [b, text_embed_dim].
        Not looked at in 2.2.
      z_i: [b, embed_dim] CLIP image embeddings, not of unit norm.

    Raises:
      ValueError: they are of other shapes.
    """
    _check(self.config, text, z_i)
    z_i = z_i.astype(self.dtype)
    context, emb = self.z_i_to_tokens(z_i), self.z_i_to_emb(z_i)
    if self.config.text_width is not None:
      states = self.text_to_context(text.states.astype(self.dtype))
      context = jnp.concatenate([context, states], axis=1)
      emb = emb + self.emb_norm(self.text_to_emb(text.z_t.astype(self.dtype)))
    else:
      context, emb = self.context_norm(context), self.emb_norm(emb)
    return Conditioning(emb, self.unet.encode_context(context), context_mask=None)

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps -> [n, emb_dim], for all steps of a plan before its loop."""
    return self.unet.encode_time(t)

  def __call__(
    self, x_t: Array, time_emb: Array, conditioning: Conditioning, deterministic: bool = True
  ) -> Array:
    """x_t [b, h, w, in_channels], time_emb [b, emb_dim] -> float32 [b, h, w, out_channels]."""
    emb = time_emb + conditioning.emb
    return self.unet(x_t, emb, conditioning.context, deterministic=deterministic)

  def predict(
    self, x_t: Array, t: Array, text: TextFeatures | None, z_i: Array, deterministic: bool
  ) -> Array:
    """Conditioning and one evaluation in one, as training needs."""
    conditioning = self.encode_conditioning(text, z_i)
    return self(x_t, self.encode_time(t), conditioning, deterministic)


def _check(config: KandinskyDecoderConfig, text: TextFeatures | None, z_i: Array) -> None:
  if z_i.ndim != 2 or z_i.shape[1] != config.embed_dim:
    raise ValueError(f'z_i of shape {z_i.shape}: it must be [b, {config.embed_dim}]')
  if config.text_width is None:
    return
  if text is None or text.states is None or text.z_t is None:
    raise ValueError("the captions' states and z_t are missing: this decoder reads them")
  b = z_i.shape[0]
  states, z_t = text.states.shape, text.z_t.shape
  fits = len(states) == 3 and (states[0], states[2]) == (b, config.text_width)
  if not fits or z_t != (b, config.text_embed_dim):
    raise ValueError(
      f'states of shape {states} and z_t of shape {z_t}: with {b} z_i they must be '
      f'[{b}, t, {config.text_width}] and [{b}, {config.text_embed_dim}]'
    )
