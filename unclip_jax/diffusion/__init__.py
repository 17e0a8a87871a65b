"""The maths of Gaussian diffusion. It knows nothing of networks, files or devices."""

from unclip_jax.diffusion import gaussian, guidance, losses, samplers, schedule, solvers

__all__ = ['gaussian', 'guidance', 'losses', 'samplers', 'schedule', 'solvers']
