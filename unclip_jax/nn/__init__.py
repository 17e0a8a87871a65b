"""The networks. They know nothing of noise schedules, files or devices."""

from unclip_jax.nn import (
  ar_prior,
  attention,
  clip,
  decoder,
  layers,
  prior,
  resnet,
  transformer,
  unet,
  vit,
)

__all__ = [
  'ar_prior',
  'attention',
  'clip',
  'decoder',
  'layers',
  'prior',
  'resnet',
  'transformer',
  'unet',
  'vit',
]
