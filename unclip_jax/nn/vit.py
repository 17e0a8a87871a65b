"""The Vision Transformer of CLIP (Radford et al. 2021, section 2.4)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unclip_jax.nn.layers import LayerNorm
from unclip_jax.nn.transformer import Transformer
from unclip_jax.types import Array


class VisionTransformer(nn.Module):
  """Patches, a class token, a norm before the blocks and one after, the class token out."""

  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int | None = None  # 4 * width
  mlp_activation: str = 'gelu'
  dtype: Any = jnp.float32
  remat: bool = False  # of the Transformer

  @nn.compact
  def __call__(self, image_bhwc: Array) -> Array:
    """[b, h, w, 3] -> [b, width]."""
    x = nn.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      (self.patch_size, self.patch_size),
      padding='VALID',
      use_bias=False,
      dtype=self.dtype,
      name='patch_embedding',
    )(image_bhwc)
    b, h, w, _ = x.shape
    x = x.reshape(b, h * w, self.width)
    init = nn.initializers.normal(self.width**-0.5)
    class_token = self.param('class_token', init, (self.width,))
    class_token = jnp.broadcast_to(class_token.astype(self.dtype), (b, 1, self.width))
    x = jnp.concatenate([class_token, x], axis=1)
    positions = self.param('positions', init, (h * w + 1, self.width))
    x = x + positions.astype(self.dtype)[None]
    x = LayerNorm(dtype=self.dtype, name='norm_in')(x)
    x, _ = Transformer(
      width=self.width,
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_width=self.mlp_width,
      mlp_activation=self.mlp_activation,
      dtype=self.dtype,
      remat=self.remat,
      name='blocks',
    )(x)
    return LayerNorm(dtype=self.dtype, name='norm_out')(x[:, 0])
