"""The stages: each binds one network to the maths (init, loss, sample), as pure functions."""

from unclip_jax.stages import (
  ar_prior,
  autoencoder,
  clip,
  common,
  decoder,
  diffusion_prior,
  upsampler,
)

__all__ = [
  'ar_prior',
  'autoencoder',
  'clip',
  'common',
  'decoder',
  'diffusion_prior',
  'upsampler',
]
