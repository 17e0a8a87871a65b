"""What the tests of the stages share: a config, its random weights, captions and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from random_params import randomised

from unclip_jax.config_json import override
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.presets import TINY
from unclip_jax.stages import diffusion_prior

# Networks that predict v keep what random weights draw in the middle of the range.
CONFIG = override(TINY, ['decoder.diffusion.prediction=v', 'upsamplers.0.diffusion.prediction=v'])
STATISTICS = diffusion_prior.paper_statistics(CONFIG.prior.embed_dim)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype('f'))


def make_text(batch, seed=0):
  draw = np.random.default_rng(seed)
  length, width = CONFIG.prior.context_length, CONFIG.prior.text_width
  ends = draw.integers(1, length + 1, (batch, 1))
  return TextFeatures(
    ids=jnp.asarray(draw.integers(0, 300, (batch, length))),
    mask=jnp.asarray(np.arange(length)[None] < ends),
    states=normal(batch, length, width, seed=seed),
    z_t=normal(batch, CONFIG.prior.embed_dim, seed=seed + 1),
  )


@functools.cache
def random_params(stage, config):
  return randomised(jax.eval_shape(lambda key: stage.init(config, key), jax.random.key(0)))


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)
