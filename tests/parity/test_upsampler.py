"""The upsampler's U-Net and condition against diffusers and torch, as Karlo has them."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
import twins

from unclip_jax.configs import DiffusionConfig, SamplingConfig, UNetConfig, UpsamplerConfig
from unclip_jax.nn.unet import UNet
from unclip_jax.stages import upsampler
from unclip_jax.weights import diffusers_unet

TOLERANCE = 1e-5


def make_config(**unet):
  unet = {'in_channels': 3, 'out_channels': 3, 'condition_channels': 3, **unet}
  return UpsamplerConfig(
    image_size=24,
    low_size=6,
    unet=UNetConfig(**unet),
    diffusion=DiffusionConfig(clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=7, spacing='karlo'),
  )


def make_twin(config, seed):
  unet = config.unet
  levels = len(unet.multipliers)
  twin = diffusers.UNet2DModel(
    in_channels=unet.in_channels + unet.condition_channels,
    out_channels=unet.out_channels,
    block_out_channels=tuple(unet.channels * m for m in unet.multipliers),
    layers_per_block=unet.num_res_blocks,
    down_block_types=('ResnetDownsampleBlock2D',) * levels,
    up_block_types=('ResnetUpsampleBlock2D',) * levels,
    add_attention=False,
    norm_num_groups=unet.num_groups,
    norm_eps=1e-5,
    resnet_time_scale_shift='scale_shift' if unet.scale_shift else 'default',
    freq_shift=0,
    flip_sin_to_cos=True,
  )
  return twins.randomise(twin, seed)


def make_inputs(batch, size, seed=0):
  rng = np.random.default_rng(seed)
  x_t, low = rng.normal(size=(2, batch, *size, 3)).astype('f')
  return x_t, low, np.array([999, 0, 417, 38, 666][:batch])


def run_twin(twin, x_t, low, t):
  x = np.moveaxis(np.concatenate([x_t, low], axis=-1), -1, 1)
  return [twin(torch.from_numpy(x), torch.from_numpy(t)).sample.movedim(1, -1)]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, x_t, low, t):
  network, variables = UNet(config.unet), {'params': params}
  emb = network.apply(variables, t, method='encode_time')
  condition = network.apply(variables, low, method='encode_condition')
  return [network.apply(variables, x_t, emb, condition=condition)]


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: upsampler.init(config, key), jax.random.key(0))['unet']


def convert(tensors, config):
  return twins.convert(tensors, diffusers_unet.rules(config.unet, ''), expected_shapes(config))


CONFIGS = {
  # Karlo's: additive time.
  'karlo': make_config(
    channels=6, multipliers=(1, 2, 3, 4), num_res_blocks=3, scale_shift=False, num_groups=3
  ),
  # The paper's (ADM): scale-shift. Two levels of one width have no skip convolution between.
  'paper': make_config(channels=10, multipliers=(1, 1, 3), num_res_blocks=2, num_groups=5),
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize(('batch', 'size'), [(3, (24, 8)), (1, (8, 40))])
def test_unet_agrees_with_diffusers(name, batch, size):
  config = CONFIGS[name]
  twin = make_twin(config, seed=batch)
  params = convert(twins.tensors_of(twin), config)
  inputs = make_inputs(batch, size)
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twin(twin, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', CONFIGS)
def test_unet_uses_every_tensor_of_diffusers(name):
  config = CONFIGS[name]
  twin = make_twin(config, seed=0)
  inputs = make_inputs(3, (8, 8))
  rules = diffusers_unet.rules(config.unet, '')

  def run(tensors):
    return run_ours(config, twins.lay_out(tensors, rules, expected_shapes(config)), *inputs)

  expected = run_twin(twin, *inputs)
  twins.check_each_tensor_matters(twins.tensors_of(twin), run, expected, TOLERANCE)


@pytest.mark.parametrize(('low_size', 'size'), [(16, 64), (7, 28), (9, 23)])
def test_condition_agrees_with_torch_antialiased_bicubic(low_size, size):
  low = np.random.default_rng(0).normal(size=(3, low_size, low_size, 3)).astype('f')
  expected = torch.nn.functional.interpolate(
    torch.from_numpy(low).movedim(-1, 1).clamp(-1, 1),
    size=(size, size),
    mode='bicubic',
    antialias=True,
    align_corners=False,
  ).movedim(1, -1)
  worst = twins.deviation(upsampler.upscale(low, size), expected)
  print(f'{low_size}->{size} {worst:.1e}')
  assert worst < TOLERANCE
