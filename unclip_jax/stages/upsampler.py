"""A diffusion upsampler as a stage (section 2.1): from a small image to one four times as wide.

Unconditional but for the small image, and convolutional, so that it trains on random crops and
samples at full size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.configs import UpsamplerConfig
from unclip_jax.diffusion import losses, samplers
from unclip_jax.nn.unet import UNet
from unclip_jax.stages.common import draw_training_step, make_denoise_fn
from unclip_jax.types import Array, Params, Step


def init(config: UpsamplerConfig, key: Array) -> Params:
  """Fresh parameters: {'unet'}, and {'final_unet'} where the last step has its own network."""

  def run(network: UNet, image: Array) -> Array:
    emb = network.encode_time(jnp.zeros(1, jnp.int32))
    return network(image, emb, condition=network.encode_condition(image))

  unit = config.unet.patch_size * 2 ** (len(config.unet.multipliers) - 1)
  image = jnp.zeros((1, unit, unit, config.unet.in_channels))
  names = ['unet', 'final_unet'] if config.final_unet else ['unet']
  keys = jax.random.split(key, len(names))
  network = UNet(config.unet)
  return {
    name: network.init(k, image, method=run)['params'] for name, k in zip(names, keys, strict=True)
  }


def upscale(image_bhwc: Array, size: int) -> Array:
  """The condition: the small image within [-1, 1], bicubic to [b, size, size, 3]."""
  b, _, _, c = image_bhwc.shape
  image = jnp.clip(image_bhwc.astype(jnp.float32), -1, 1)
  return jax.image.resize(image, (b, size, size, c), 'cubic', antialias=True)


def back_project(image_bhwc: Array, low_bhwc: Array, block: int) -> Array:
  """The image with its colours brought to the small image's: `image + enlarge(low - shrink)`.

  A step of iterative back-projection (Irani and Peleg 1991) on means of blocks: it takes back
  shifts of colour, such as a background's, and leaves to the upsampler what is finer.

  Args:
    image_bhwc: [b, n * h, n * w, c].
    low_bhwc: [b, h, w, c] in [-1, 1].
    block: small pixels a side of a block; divides h and w.
  """
  b, _, _, c = image_bhwc.shape
  rows, columns = low_bhwc.shape[1] // block, low_bhwc.shape[2] // block

  def means(x: Array) -> Array:
    tall, wide = x.shape[1] // rows, x.shape[2] // columns
    return x.reshape(b, rows, tall, columns, wide, c).mean(axis=(2, 4))

  missing = means(jnp.clip(low_bhwc, -1, 1)) - means(image_bhwc)
  return image_bhwc + jax.image.resize(missing, image_bhwc.shape, 'linear', antialias=True)


def loss(
  config: UpsamplerConfig,
  params: Params,
  image_bhwc: Array,
  low_bhwc: Array,
  key: Array,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
  """The diffusion loss on crops; both networks, where there are two, see the same batch.

  Args:
    config: the upsampler's.
    params: of `init`.
    image_bhwc: [b, h, w, 3] crops at the target's resolution, in [-1, 1].
    low_bhwc: [b, h / 4, w / 4, 3] the same crops, small and degraded.
    key: of this step.
    dtype: the network's.
    remat: whether blocks of the network run again for their gradients, which keeps less in memory.
  """
  key_step, key_dropout = jax.random.split(key)
  diffusion = config.diffusion
  x_t, eps, step = draw_training_step(diffusion, key_step, image_bhwc)
  low = upscale(low_bhwc, image_bhwc.shape[1])
  network = UNet(config.unet, dtype, remat)
  total, metrics = 0.0, {}
  for name in params:
    variables = {'params': params[name]}
    output = network.apply(
      variables,
      x_t,
      network.apply(variables, step.t, method='encode_time'),
      condition=network.apply(variables, low, method='encode_condition'),
      deterministic=False,
      rngs={'dropout': key_dropout},
    )
    output = output + low if config.residual else output
    loss_b, metrics = losses.diffusion_loss(
      output,
      image_bhwc,
      eps,
      x_t,
      step,
      diffusion.prediction,
      diffusion.learned_variance,
      diffusion.min_snr_gamma,
      vlb_weight=0.001 * diffusion.num_steps,
      noise_power=diffusion.noise_power,
    )
    total = total + loss_b.mean()
  return total, jax.tree.map(jnp.mean, metrics)


def sample(
  config: UpsamplerConfig,
  params: Params,
  low_bhwc: Array,
  key_b: Array,
  plan: Step,
  sampler: samplers.Sampler,
  x_start: Array | None = None,
  with_trajectory: bool = False,
  dtype: Any = jnp.float32,
) -> tuple[Array, samplers.Trajectory | None]:
  """Draws images, float32 [b, image_size, image_size, 3] around [-1, 1].

  Args:
    config: the upsampler's.
    params: of `init`.
    low_bhwc: [b, low_size, low_size, 3] in [-1, 1].
    key_b: typed keys [b].
    plan: of `common.make_plan`.
    sampler: of `common.make_sampler`.
    x_start: [b, image_size, image_size, 3] the noise to start from; drawn from the keys if None.
    with_trajectory: whether to return what lay between.
    dtype: the network's.
  """
  size = config.image_size
  if x_start is None:
    x_start = samplers.start_noise(key_b, (size, size, config.unet.in_channels))
  low = upscale(low_bhwc, size)
  network = UNet(config.unet, dtype)

  def run(name: str, rows: Step, x: Array) -> tuple[Array, samplers.Trajectory | None]:
    variables = {'params': params[name]}
    condition = network.apply(variables, low, method='encode_condition')
    time_embs = network.apply(variables, plan.t, method='encode_time')

    def predict(x_t: Array, emb: Array, given: Array) -> Array:
      output = network.apply(variables, x_t, emb, condition=given)
      return output + low if config.residual else output

    denoise_fn = make_denoise_fn(
      predict,
      condition,
      time_embs,
      config.diffusion,
      None,
    )
    result = samplers.sample_loop(denoise_fn, sampler, rows, x, key_b, with_trajectory)
    return result if with_trajectory else (result, None)

  if config.final_unet:
    x, trajectory = run('unet', jax.tree.map(lambda row: row[:-1], plan), x_start)
    x, last = run('final_unet', jax.tree.map(lambda row: row[-1:], plan), x)
    if with_trajectory:
      trajectory = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), trajectory, last)
  else:
    x, trajectory = run('unet', plan, x_start)
  return (back_project(x, low_bhwc, config.keep_low) if config.keep_low else x), trajectory
