"""Pictures enlarged by an upsampler of a model, and how near they come to the true ones."""

import jax
import numpy as np

from experiments.emoji import common
from unclip_jax import Unclip
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import upsampler


def upscale(model: Unclip, low: np.ndarray, stage: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Small pictures (float in [-1, 1]) by an upsampler and bicubic, uint8.

  Args:
    model: with that upsampler.
    low: [n, low_size, low_size, 3].
    stage: which of the upsamplers.
  """
  config = model.config.upsamplers[stage]
  plan = stage_common.make_plan(config.diffusion, config.sampling)
  sampling = config.sampling
  sampler = stage_common.make_sampler(sampling.sampler, sampling.variance, sampling.eta)

  @jax.jit
  def enlarge(params, low, key_b):
    return upsampler.sample(config, params, low, key_b, plan, sampler)[0]

  keys = jax.random.split(jax.random.key(0), len(low))
  params = model.params[f'upsampler_{stage}']
  # One at a time: several of 1024 px take much memory.
  rows = [low[i : i + 1] for i in range(len(low))]
  ours = [common.to_uint8(enlarge(params, row, keys[i : i + 1])) for i, row in enumerate(rows)]
  bicubic = [common.to_uint8(upsampler.upscale(row, config.image_size)) for row in rows]
  return np.concatenate(ours), np.concatenate(bicubic)


def psnr(images: np.ndarray, real: np.ndarray) -> float:
  """Peak signal-to-noise ratio of uint8 pictures in dB, over all of them."""
  error = np.mean((images.astype(np.float64) - real) ** 2)
  return float(10 * np.log10(255**2 / max(error, 1e-12)))
