"""GLIDE's networks (Nichol et al. 2022): an ADM U-Net that is conditioned on the caption alone.

Its own Transformer reads the caption. The states go to the attention layers, and the last of them,
projected, is added to the timestep embedding. The decoder of unCLIP is this network, given z_i as
well (section 2.1). The upsampler reads the caption too, and sees the small picture; where a network
inpaints, it sees what is known of the picture and where.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import GlideDecoderConfig, GlideUpsamplerConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import Conditioning, TextEncoder
from unclip_jax.nn.unet import UNet
from unclip_jax.types import Array


class GlideNetwork(nn.Module):
  """Text encoder and U-Net: the base, or the upsampler."""

  config: GlideDecoderConfig | GlideUpsamplerConfig
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    self.text_encoder = TextEncoder(config.text, self.dtype)
    self.text_to_emb = nn.Dense(config.unet.emb_dim, dtype=self.dtype)
    self.unet = UNet(config.unet, self.dtype)

  def encode_conditioning(self, text: TextFeatures, condition: Array | None) -> Conditioning:
    """Everything about a prompt that no denoising step changes.

    Args:
      text: ids and mask of b captions, of empty ones where guidance leads away from them.
      condition: [b, h, w, condition_channels], the channels that the first convolution is given
        beside x_t, in GLIDE's order: known picture * mask, mask, small picture enlarged. None
        where the config has none.
    """
    states = self.text_encoder(text.ids, text.mask)
    # Padding is seen like words: it has learned vectors.
    context = self.unet.encode_context(states)
    share = None if condition is None else self.unet.encode_condition(condition)
    return Conditioning(self.text_to_emb(states[:, -1]), context, None, condition=share)

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps -> [n, emb_dim], for all steps of a plan before its loop."""
    return self.unet.encode_time(t)

  def __call__(
    self, x_t: Array, time_emb: Array, conditioning: Conditioning, deterministic: bool = True
  ) -> Array:
    """x_t [b, h, w, 3], time_emb [b, emb_dim] -> float32 [b, h, w, out_channels]."""
    emb, context, context_mask, _, condition = conditioning
    return self.unet(x_t, time_emb + emb, context, context_mask, condition, deterministic)

  def predict(
    self, x_t: Array, t: Array, text: TextFeatures, condition: Array | None, deterministic: bool
  ) -> Array:
    """Conditioning and one evaluation in one: [b, h, w, 3], int [b] -> [b, h, w, out_channels]."""
    conditioning = self.encode_conditioning(text, condition)
    return self(x_t, self.encode_time(t), conditioning, deterministic)
