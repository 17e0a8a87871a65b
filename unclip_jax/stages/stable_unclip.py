"""What Stable unCLIP's decoder is given of z_i: noise, and how much of it there is."""

import jax.numpy as jnp

from unclip_jax.configs import StableUnclipDecoderConfig
from unclip_jax.diffusion import gaussian, schedule
from unclip_jax.nn.layers import timestep_embedding
from unclip_jax.stages.common import make_schedule
from unclip_jax.stages.diffusion_prior import Statistics
from unclip_jax.types import Array


def augment(
  config: StableUnclipDecoderConfig,
  normalizer: Statistics,
  z_i: Array,
  level: Array,
  noise: Array,
) -> Array:
  """The class embeddings float32 [b, 2 * embed_dim] of embeddings: noised, then their level's.

  As in the pipelines of diffusers: noise is added to standardised embeddings, which are scaled back
  thereafter. Also at level 0 there is some. The unconditional half of guidance is given zeros.

  Args:
    config: of the decoder.
    normalizer: what embeddings are standardised by.
    z_i: [b, embed_dim] CLIP image embeddings.
    level: int32 scalar, the timestep of `config.z_i_diffusion` that they are noised to.
    noise: [b, embed_dim], unit noise.
  """
  mean, std = (jnp.asarray(x, jnp.float32)[None] for x in normalizer)
  level_b = jnp.full(z_i.shape[0], level)
  step_b = schedule.take_rows(schedule.training_table(make_schedule(config.z_i_diffusion)), level_b)
  z_i = gaussian.q_sample((z_i - mean) / std, noise, step_b) * std + mean
  return jnp.concatenate([z_i, timestep_embedding(level_b, config.embed_dim)], axis=1)
