"""The networks. They know nothing of noise schedules, files or devices."""

from unclip_jax.nn import attention, clip, decoder, layers, prior, resnet, transformer, unet, vit

__all__ = [
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
