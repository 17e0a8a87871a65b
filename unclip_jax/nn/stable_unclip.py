"""Stable unCLIP's decoder: the U-Net of Stable Diffusion 2.1, given z_i as a class.

The class embedding is z_i, noised, beside an embedding of the level that it is noised to; it is
projected and added to the timestep embedding. The caption is what the U-Net attends to.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import StableUnclipDecoderConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.latent_unet import LatentUNet, LayerContext
from unclip_jax.types import Array


class StableUnclipConditioning(NamedTuple):
  """What the decoder's loop needs of a prompt, computed once.

  Attributes:
    emb: [b, emb_dim] of z_i, added to the timestep embedding.
    context: each attention layer's keys and values of the caption.
  """

  emb: Array
  context: tuple[LayerContext, ...]


class StableUnclipDecoderNetwork(nn.Module):
  """The U-Net, in the form that the stage runs decoders in."""

  config: StableUnclipDecoderConfig
  dtype: Any = jnp.float32

  def setup(self):
    self.unet = LatentUNet(self.config.unet, self.dtype)

  def encode_conditioning(self, text: TextFeatures, z_i: Array) -> StableUnclipConditioning:
    """Everything about a prompt that no denoising step changes.

    Args:
      text: features of b captions, of the decoder's own text encoder; their states are the context.
      z_i: [b, 2 * embed_dim], as `stages.stable_unclip.augment` makes it; zeros stand for none.
    """
    return StableUnclipConditioning(
      self.unet.encode_class(z_i), self.unet.encode_context(text.states)
    )

  def encode_time(self, t: Array) -> Array:
    """int [n] timesteps -> [n, emb_dim], for all steps of a plan before its loop."""
    return self.unet.encode_time(t)

  def __call__(
    self,
    x_t: Array,
    time_emb: Array,
    conditioning: StableUnclipConditioning,
    deterministic: bool = True,
  ) -> Array:
    """x_t [b, h, w, c], time_emb [b, emb_dim] -> float32 [b, h, w, out_channels]."""
    return self.unet(x_t, time_emb + conditioning.emb, conditioning.context, deterministic)

  def predict(
    self, x_t: Array, t: Array, text: TextFeatures, z_i: Array, deterministic: bool
  ) -> Array:
    """Conditioning and one evaluation in one, as `init` needs it."""
    conditioning = self.encode_conditioning(text, z_i)
    return self(x_t, self.encode_time(t), conditioning, deterministic)
