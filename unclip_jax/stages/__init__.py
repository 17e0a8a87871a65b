"""The stages: each binds one network to the maths (init, loss, sample), as pure functions."""

from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler

__all__ = ['clip', 'common', 'decoder', 'diffusion_prior', 'upsampler']
