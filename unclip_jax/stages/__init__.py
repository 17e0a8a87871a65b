"""The stages: each binds one network to the maths (init, loss, sample), as pure functions."""

from unclip_jax.stages import (
  autoencoder,
  clip,
  common,
  decoder,
  diffusion_prior,
  upsampler,
)

__all__ = ['autoencoder', 'clip', 'common', 'decoder', 'diffusion_prior', 'upsampler']
