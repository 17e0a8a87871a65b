"""The networks of Kandinsky's decoders against those of diffusers."""

import functools

import jax
import kandinsky_twin
import numpy as np
import pytest
import torch
import twins

from unclip_jax.configs import (
  DiffusionConfig,
  KandinskyDecoderConfig,
  SamplingConfig,
  UNetConfig,
)
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import decoder
from unclip_jax.weights import kandinsky

TOLERANCE = 1e-5


def make_config(embed_dim, num_image_tokens, text_width=None, text_embed_dim=None, **unet):
  return KandinskyDecoderConfig(
    image_size=8,
    embed_dim=embed_dim,
    unet=UNetConfig(**unet),
    diffusion=DiffusionConfig('linear', learned_variance=True),
    sampling=SamplingConfig(num_steps=100, guidance_scale=4.0),
    num_image_tokens=num_image_tokens,
    text_width=text_width,
    text_embed_dim=text_embed_dim,
  )


# Name: config, batch, size of the latents.
CASES = {
  '2.1': (
    make_config(
      9, 3, 13, 11, in_channels=4, out_channels=8, channels=6, multipliers=(1, 2, 3),
      num_res_blocks=1, attention_levels=(1, 2), head_dim=3, context_dim=7, num_groups=3,
    ), 3, (12, 8),
  ),
  '2.1, one token, attention everywhere, additive time': (
    make_config(
      17, 1, 5, 19, in_channels=3, out_channels=6, channels=10, multipliers=(1, 2),
      num_res_blocks=2, attention_levels=(0, 1), head_dim=5, context_dim=11, num_groups=5,
      scale_shift=False,
    ), 1, (4, 6),
  ),
  '2.2': (
    make_config(
      13, 5, in_channels=5, out_channels=10, channels=8, multipliers=(1, 3),
      num_res_blocks=2, attention_levels=(1,), head_dim=6, context_dim=9, num_groups=4,
    ), 4, (6, 10),
  ),
  '2.2, two tokens, three levels': (
    make_config(
      7, 2, in_channels=4, out_channels=8, channels=14, multipliers=(1, 1, 2),
      num_res_blocks=1, attention_levels=(2,), head_dim=4, context_dim=17, num_groups=7,
    ), 2, (8, 4),
  ),
}  # fmt: skip
FULL_SIZE = {
  '2.1': make_config(
    768, 10, 1024, 768, in_channels=4, out_channels=8, channels=384, multipliers=(1, 2, 3, 4),
    num_res_blocks=3, attention_levels=(1, 2, 3), context_dim=768,
  ),
  '2.2': make_config(
    1280, 32, in_channels=4, out_channels=8, channels=384, multipliers=(1, 2, 3, 4),
    num_res_blocks=3, attention_levels=(1, 2, 3), context_dim=768,
  ),
}  # fmt: skip


def make_inputs(config, batch, size):
  """Latents, timesteps from both ends and between, captions with padding, and embeddings."""
  rng = np.random.default_rng(batch)
  length = 2 * batch + 1

  def draw(*shape):
    return rng.normal(size=(batch, *shape)).astype('f')

  text = None
  if config.text_width is not None:
    text = TextFeatures(
      ids=np.zeros((batch, length), np.int32),
      mask=np.arange(length)[None] < np.arange(1, batch + 1)[:, None],
      states=draw(length, config.text_width),
      z_t=draw(config.text_embed_dim),
    )
  t = np.array([999, 0, 417, 38][:batch])
  return draw(*size, config.unet.in_channels), t, text, draw(config.embed_dim)


def run_twin(model, x_t, t, text, z_i):
  """The output, NHWC."""
  added = {'image_embeds': torch.from_numpy(z_i)}
  if text is not None:
    added['text_embeds'] = torch.from_numpy(text.z_t)
  output = model(
    sample=torch.from_numpy(np.moveaxis(x_t, -1, 1)),
    timestep=torch.from_numpy(t),
    encoder_hidden_states=None if text is None else torch.from_numpy(text.states),
    added_cond_kwargs=added,
  ).sample
  return output.movedim(1, -1)


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, x_t, t, text, z_i):
  network = decoder.make_network(config)
  return network.apply({'params': params}, x_t, t, text, z_i, True, method='predict')


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('seed', [1, 2])
def test_decoder_agrees_with_diffusers(name, seed):
  config, batch, size = CASES[name]
  model = kandinsky_twin.make_unet(config, seed)
  inputs = make_inputs(config, batch, size)
  rules = kandinsky.decoder_rules(config)
  params = twins.convert(twins.tensors_of(model), rules, expected_shapes(config))
  worst = twins.deviation(run_ours(config, params, *inputs), run_twin(model, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', CASES)
def test_decoder_uses_every_tensor_of_diffusers(name):
  config, batch, size = CASES[name]
  model = kandinsky_twin.make_unet(config, seed=3)
  inputs = make_inputs(config, batch, size)
  rules, expected = kandinsky.decoder_rules(config), expected_shapes(config)

  def run(tensors):
    return [run_ours(config, twins.lay_out(tensors, rules, expected), *inputs)]

  tensors = twins.tensors_of(model)
  twins.check_each_tensor_matters(tensors, run, [run_twin(model, *inputs)], TOLERANCE)


@pytest.mark.parametrize('version', FULL_SIZE)
def test_full_size_has_the_shapes_of_diffusers(version):
  config = FULL_SIZE[version]
  with torch.device('meta'):
    model = kandinsky_twin.build_unet(config)
  theirs = {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in model.state_dict().items()}
  ours = {
    '.'.join(p.key for p in path): leaf.shape
    for path, leaf in jax.tree.leaves_with_path(expected_shapes(config))
  }
  read_shapes = {}
  for rule in kandinsky.decoder_rules(config):
    leaves = jax.eval_shape(rule.layout.read, tuple(theirs.pop(name) for name in rule.theirs))
    read_shapes |= {name: x.shape for name, x in zip(rule.ours, leaves, strict=True)}
  assert not theirs
  assert read_shapes == ours
