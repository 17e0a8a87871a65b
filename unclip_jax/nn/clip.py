"""CLIP (Radford et al. 2021): a text and an image tower into one embedding space."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.configs import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from unclip_jax.nn.attention import causal_mask
from unclip_jax.nn.clip_resnet import ClipResNet
from unclip_jax.nn.layers import LayerNorm, l2_normalize
from unclip_jax.nn.resnet import ConvTower
from unclip_jax.nn.transformer import Transformer
from unclip_jax.nn.vit import VisionTransformer
from unclip_jax.types import Array


class TextFeatures(NamedTuple):
  """What later stages know of a caption.

  Attributes:
    ids: int32 [b, t] token ids.
    mask: bool [b, t], true from the start to the end-of-text token.
    states: [b, t, width], the text tower's states after its final norm; None where unused.
    z_t: [b, embed_dim], the caption's CLIP embedding; None where unused.
  """

  ids: Array
  mask: Array
  states: Array | None
  z_t: Array | None


class TextTower(nn.Module):
  """The causal text Transformer; its output is read at the end-of-text token."""

  config: TextConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformer

  @nn.compact
  def __call__(self, ids_bt: Array) -> Array:
    """int32 [b, t] -> states [b, t, width] after the final norm."""
    config = self.config
    x = nn.Embed(
      config.vocab_size,
      config.width,
      embedding_init=nn.initializers.normal(0.02),
      dtype=self.dtype,
      name='tokens',
    )(ids_bt)
    positions = self.param(
      'positions', nn.initializers.normal(0.01), (config.context_length, config.width)
    )
    t = ids_bt.shape[1]
    x = x + positions[:t].astype(self.dtype)[None]
    x, _ = Transformer(
      width=config.width,
      depth=config.depth,
      num_heads=config.num_heads,
      mlp_width=config.mlp_width,
      mlp_activation=config.mlp_activation,
      dtype=self.dtype,
      remat=self.remat,
      name='blocks',
    )(x, causal_mask(t, t))
    return LayerNorm(dtype=self.dtype, name='norm')(x)


class ClipNetwork(nn.Module):
  """Both towers, their projections and the learned temperature."""

  config: ClipConfig
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformers and of the ResNet

  def setup(self):
    config = self.config
    vision = config.vision
    if config.text is not None:
      self.text = TextTower(config.text, self.dtype, self.remat)
      self.text_projection = nn.Dense(config.embed_dim, use_bias=False, dtype=self.dtype)
    if isinstance(vision, ViTConfig):
      self.vision = VisionTransformer(
        patch_size=vision.patch_size,
        width=vision.width,
        depth=vision.depth,
        num_heads=vision.num_heads,
        mlp_width=vision.mlp_width,
        mlp_activation=vision.mlp_activation,
        dtype=self.dtype,
        remat=self.remat,
      )
    elif isinstance(vision, ResNetConfig):
      self.vision = ClipResNet(
        width=vision.width,
        depths=vision.depths,
        num_heads=vision.num_heads,
        out_width=config.embed_dim,
        dtype=self.dtype,
        remat=self.remat,
      )
    elif vision is not None:
      self.vision = ConvTower(vision.widths, vision.depth, dtype=self.dtype)
    if not isinstance(vision, ResNetConfig | None):  # a ResNet's attention projects by itself
      self.image_projection = nn.Dense(config.embed_dim, use_bias=False, dtype=self.dtype)
    # CLIP starts at a temperature of 0.07 (section 2.5).
    self.log_scale = self.param('log_scale', nn.initializers.constant(math.log(1 / 0.07)), ())

  def encode_image(self, image_bhwc: Array) -> Array:
    """[b, h, w, 3] in [-1, 1] -> z_i float32 [b, embed_dim]."""
    config = self.config
    mean, std = (jnp.asarray(v)[None, None, None] for v in (config.pixel_mean, config.pixel_std))
    x = self.vision((((image_bhwc + 1) / 2 - mean) / std).astype(self.dtype))
    if not isinstance(config.vision, ResNetConfig):
      x = self.image_projection(x)
    return self._finish(x)

  def encode_text(self, ids_bt: Array, mask_bt: Array) -> TextFeatures:
    """int32 [b, t] and bool [b, t] (true up to the end-of-text token) -> TextFeatures."""
    states = self.text(ids_bt)
    end = jnp.maximum(mask_bt.sum(axis=1) - 1, 0)
    pooled = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
    return TextFeatures(ids_bt, mask_bt, states, self._finish(self.text_projection(pooled)))

  def __call__(
    self, image_bhwc: Array, ids_bt: Array, mask_bt: Array
  ) -> tuple[Array, Array, Array]:
    """z_i [b, d], z_t [b, d] and the logarithm of the logits' scale."""
    return self.encode_image(image_bhwc), self.encode_text(ids_bt, mask_bt).z_t, self.log_scale

  def _finish(self, z: Array) -> Array:
    return l2_normalize(z) if self.config.unit_norm else z.astype(jnp.float32)
