"""Karlo's decoder against diffusers: the text projection module and the U-Net behind it."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
import twins
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from unclip_jax.configs import DecoderConfig, DiffusionConfig, SamplingConfig, UNetConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import DecoderNetwork
from unclip_jax.stages import decoder
from unclip_jax.weights import karlo

TOLERANCE = 1e-5


def make_config(embed_dim, num_image_tokens=4, **unet):
  return DecoderConfig(
    image_size=8,
    embed_dim=embed_dim,
    unet=UNetConfig(in_channels=3, out_channels=6, **unet),
    diffusion=DiffusionConfig(learned_variance=True, clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=25, spacing='karlo', variance='learned', guidance_scale=8.0),
    clip_text_width=embed_dim,
    num_image_tokens=num_image_tokens,
  )


def make_twins(config, seed):
  """The text projection and the U-Net, with attention in all but the first level."""
  unet = config.unet
  levels = len(unet.multipliers)
  text_proj = UnCLIPTextProjModel(
    clip_extra_context_tokens=config.num_image_tokens,
    clip_embeddings_dim=config.embed_dim,
    time_embed_dim=unet.emb_dim,
    cross_attention_dim=unet.context_dim,
  )
  model = diffusers.UNet2DConditionModel(
    in_channels=unet.in_channels,
    out_channels=unet.out_channels,
    block_out_channels=tuple(unet.channels * m for m in unet.multipliers),
    layers_per_block=unet.num_res_blocks,
    down_block_types=('ResnetDownsampleBlock2D', *['SimpleCrossAttnDownBlock2D'] * (levels - 1)),
    mid_block_type='UNetMidBlock2DSimpleCrossAttn',
    up_block_types=(*['SimpleCrossAttnUpBlock2D'] * (levels - 1), 'ResnetUpsampleBlock2D'),
    attention_head_dim=unet.head_dim,
    cross_attention_dim=unet.context_dim,
    class_embed_type='identity',
    resnet_time_scale_shift='scale_shift' if unet.scale_shift else 'default',
    norm_num_groups=unet.num_groups,
    norm_eps=1e-5,
  )
  return twins.randomise(text_proj, seed), twins.randomise(model, seed + 1)


def make_inputs(config, batch, size):
  """Captions of odd lengths, and every second image without its z_i."""
  rng = np.random.default_rng(batch)
  length = 2 * batch + 1
  ends = np.array([length, 3, length - 2, 1, 5])[:batch]
  text = TextFeatures(
    ids=np.zeros((batch, length), np.int32),
    mask=np.arange(length)[None] < ends[:, None],
    states=rng.normal(size=(batch, length, config.embed_dim)).astype('f'),
    z_t=rng.normal(size=(batch, config.embed_dim)).astype('f'),
  )
  x_t = rng.normal(size=(batch, *size, 3)).astype('f')
  z_i = rng.normal(size=(batch, config.embed_dim)).astype('f')
  return x_t, np.array([999, 0, 417, 38, 666][:batch]), text, z_i, np.arange(batch) % 2 == 0


def run_twins(text_proj, model, x_t, t, text, z_i, has_z_i):
  null_z_i = text_proj.learned_classifier_free_guidance_embeddings
  context, emb = text_proj(
    image_embeddings=torch.where(
      torch.from_numpy(has_z_i)[:, None], torch.from_numpy(z_i), null_z_i[None]
    ),
    prompt_embeds=torch.from_numpy(text.z_t),
    text_encoder_hidden_states=torch.from_numpy(text.states),
    do_classifier_free_guidance=False,
  )
  tokens = text_proj.config.clip_extra_context_tokens
  output = model(
    sample=torch.from_numpy(np.moveaxis(x_t, -1, 1)),
    timestep=torch.from_numpy(t),
    encoder_hidden_states=context,
    class_labels=emb,
    attention_mask=torch.nn.functional.pad(torch.from_numpy(text.mask), (tokens, 0), value=True),
  ).sample
  return [output.movedim(1, -1)]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, x_t, t, text, z_i, has_z_i):
  network, variables = DecoderNetwork(config), {'params': params}
  conditioning = network.apply(variables, text, z_i, has_z_i, method='encode_conditioning')
  time_emb = network.apply(variables, t, method='encode_time')
  return [network.apply(variables, x_t, time_emb, conditioning)]


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))


def models_tensors(models):
  parts = zip(('text_proj', 'decoder'), models, strict=True)
  return {f'{part}/{k}': v for part, model in parts for k, v in twins.tensors_of(model).items()}


def convert(tensors, config):
  return twins.convert(tensors, karlo.decoder_rules(config), expected_shapes(config))


CONFIGS = {
  'karlo': make_config(
    embed_dim=15,
    channels=6,
    multipliers=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_levels=(1, 2, 3),
    head_dim=6,
    context_dim=11,
    num_groups=3,
  ),
  'additive, one block, three tokens': make_config(
    embed_dim=9,
    num_image_tokens=3,
    channels=10,
    multipliers=(1, 3),
    num_res_blocks=1,
    attention_levels=(1,),
    head_dim=2,
    context_dim=13,
    num_groups=5,
    scale_shift=False,
  ),
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize(('batch', 'size'), [(3, (24, 8)), (1, (8, 16))])
def test_decoder_agrees_with_diffusers(name, batch, size):
  config = CONFIGS[name]
  models = make_twins(config, seed=batch)
  params = convert(models_tensors(models), config)
  inputs = make_inputs(config, batch, size)
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twins(*models, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', CONFIGS)
def test_decoder_uses_every_tensor_of_diffusers(name):
  config = CONFIGS[name]
  models = make_twins(config, seed=0)
  inputs = make_inputs(config, 3, (8, 8))
  rules = karlo.decoder_rules(config)

  def run(tensors):
    return run_ours(config, twins.lay_out(tensors, rules, expected_shapes(config)), *inputs)

  expected = run_twins(*models, *inputs)
  twins.check_each_tensor_matters(models_tensors(models), run, expected, TOLERANCE)
