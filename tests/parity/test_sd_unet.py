"""Stable Diffusion's U-Net against diffusers: outputs, tensors both ways, configs both ways."""

import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins

from unclip_jax.configs import LatentUNetConfig
from unclip_jax.nn.latent_unet import LatentUNet
from unclip_jax.weights.diffusers_latent_unet import read_config, rules, write_config
from unclip_jax.weights.rules import read_params, write_tensors
from unclip_jax.weights.safetensors import named_leaves

TOLERANCE = 1e-5

CONFIGS = {
  # Stable unCLIP's: linear projections, a class embedding; heads and depths differ by level.
  'stable diffusion 2': LatentUNetConfig(
    in_channels=5,
    out_channels=3,
    channels=15,
    multipliers=(1, 3, 2),
    num_res_blocks=1,
    attention_levels=(0, 2),
    num_heads=(3, 9, 5),
    depths=(2, 1, 1),
    context_dim=11,
    class_dim=7,
    num_groups=5,
  ),
  'stable diffusion 1': LatentUNetConfig(
    in_channels=4,
    out_channels=4,
    channels=9,
    multipliers=(1, 2),
    num_res_blocks=2,
    attention_levels=(0,),
    num_heads=(3, 3),
    depths=(1, 1),
    context_dim=13,
    linear_projection=False,
    num_groups=3,
  ),
}
# What diffusers is told, not by way of our `write_config`.
TWINS = {
  'stable diffusion 2': {
    'in_channels': 5,
    'out_channels': 3,
    'block_out_channels': (15, 45, 30),
    'layers_per_block': 1,
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D', 'CrossAttnUpBlock2D'),
    'attention_head_dim': [3, 9, 5],
    'transformer_layers_per_block': [2, 1, 1],
    'cross_attention_dim': 11,
    'class_embed_type': 'projection',
    'projection_class_embeddings_input_dim': 7,
    'use_linear_projection': True,
    'upcast_attention': True,
    'norm_num_groups': 5,
  },
  'stable diffusion 1': {
    'block_out_channels': (9, 18),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'),
    'attention_head_dim': 3,
    'cross_attention_dim': 13,
    'norm_num_groups': 3,
  },
}
NAMES = pytest.mark.parametrize('name', CONFIGS)
# Batch and size for each; a size of 7 is not halved evenly.
INPUTS = {'stable diffusion 2': (3, (8, 12)), 'stable diffusion 1': (3, (10, 7))}
CASES = [(name, *shape) for name, shape in INPUTS.items()] + [('stable diffusion 2', 1, (7, 10))]
STABLE_UNCLIP = {
  '_class_name': 'UNet2DConditionModel',
  'attention_head_dim': [5, 10, 20, 20],
  'block_out_channels': [320, 640, 1280, 1280],
  'class_embed_type': 'projection',
  'cross_attention_dim': 1024,
  'projection_class_embeddings_input_dim': 2048,
  'sample_size': 96,
  'upcast_attention': True,
  'use_linear_projection': True,
}


def make_twin(name, seed):
  return twins.randomise(diffusers.UNet2DConditionModel(**TWINS[name]), seed)


def make_inputs(config, batch, size):
  rng = np.random.default_rng(batch)
  x = rng.normal(size=(batch, *size, config.in_channels)).astype('f')
  t = np.array([999, 0, 417][:batch])
  context = rng.normal(size=(batch, 2 * batch + 1, config.context_dim)).astype('f')
  class_embedding = rng.normal(size=(batch, config.class_dim)).astype('f')
  return x, t, context, class_embedding if config.class_dim else None


def run_twin(twin, x, t, context, class_embedding):
  output = twin(
    sample=torch.from_numpy(np.moveaxis(x, -1, 1)),
    timestep=torch.from_numpy(t),
    encoder_hidden_states=torch.from_numpy(context),
    class_labels=None if class_embedding is None else torch.from_numpy(class_embedding),
  ).sample
  return [output.movedim(1, -1)]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, x, t, context, class_embedding):
  network, variables = LatentUNet(config), {'params': params}
  return [network.apply(variables, x, t, context, class_embedding, method='predict')]


@functools.cache
def expected_shapes(config):
  inputs = make_inputs(config, 1, (8, 8))
  init = functools.partial(LatentUNet(config).init, method='predict')
  return jax.eval_shape(init, jax.random.key(0), *inputs)['params']


def lay_out(config, tensors):
  """What `read_params` makes, without the compilation for each shape that its checks cost."""
  expected, arrays = expected_shapes(config), {}
  for rule in rules(config):
    made = rule.layout.read(tuple(tensors[name] for name in rule.theirs))
    arrays |= zip(rule.ours, made, strict=True)
  leaves = [arrays[name] for name in named_leaves(expected)]
  return jax.tree.unflatten(jax.tree.structure(expected), leaves)


@pytest.mark.parametrize(('name', 'batch', 'size'), CASES)
def test_latent_unet_agrees_with_diffusers(name, batch, size):
  config, twin = CONFIGS[name], make_twin(name, seed=batch)
  inputs = make_inputs(config, batch, size)
  params = lay_out(config, twins.tensors_of(twin))
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twin(twin, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@NAMES
def test_latent_unet_agrees_where_activations_are_faint(name):
  # At a variance near the epsilons of the norms, which are not all the same, these are felt.
  config, twin = CONFIGS[name], make_twin(name, seed=5)
  for tensor, p in twin.named_parameters():
    in_blocks = 'blocks' in tensor or 'mid_block' in tensor
    is_before_norm = any(x in tensor for x in ('conv', 'time_emb_proj', 'proj_in', 'proj_out'))
    if tensor.startswith('conv_in') or (in_blocks and is_before_norm):
      p.mul_(0.02)
  inputs = make_inputs(config, *INPUTS[name])
  params = lay_out(config, twins.tensors_of(twin))
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twin(twin, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@NAMES
def test_latent_unet_uses_every_tensor_of_diffusers(name):
  config, twin = CONFIGS[name], make_twin(name, seed=0)
  inputs = make_inputs(config, *INPUTS[name])

  def run(tensors):
    return run_ours(config, lay_out(config, tensors), *inputs)

  tensors = twins.tensors_of(twin)
  twins.check_each_tensor_matters(tensors, run, run_twin(twin, *inputs), TOLERANCE)


def assert_same(written, tensors):
  assert written.keys() == tensors.keys()
  for name, value in tensors.items():
    assert written[name].dtype == value.dtype
    np.testing.assert_array_equal(written[name], value)


@NAMES
def test_tensors_that_are_laid_out_and_written_are_the_same(name):
  config, tensors = CONFIGS[name], twins.tensors_of(make_twin(name, seed=0))
  assert_same(write_tensors(lay_out(config, tensors), rules(config)), tensors)


def test_tensors_that_are_read_and_written_are_the_same():
  config = CONFIGS['stable diffusion 1']
  tensors = twins.tensors_of(make_twin('stable diffusion 1', seed=0))
  params = read_params(twins.Tensors(tensors), rules(config), expected_shapes(config), 'the twin')
  assert_same(write_tensors(params, rules(config)), tensors)


@NAMES
def test_config_of_diffusers_is_read(name, tmp_path):
  make_twin(name, seed=0).save_config(tmp_path)
  values = json.loads((tmp_path / 'config.json').read_text())
  assert read_config(values) == CONFIGS[name]


@NAMES
def test_diffusers_builds_the_same_network_from_a_config_that_is_written(name):
  config, twin = CONFIGS[name], make_twin(name, seed=0)
  other = diffusers.UNet2DConditionModel.from_config(write_config(config)).eval()
  other.load_state_dict(twin.state_dict())
  inputs = make_inputs(config, 1, (4, 4))
  with torch.no_grad():
    assert torch.equal(run_twin(other, *inputs)[0], run_twin(twin, *inputs)[0])


def test_names_and_shapes_at_full_size():
  config = read_config(STABLE_UNCLIP)
  with torch.device('meta'):
    model = diffusers.UNet2DConditionModel.from_config(STABLE_UNCLIP)
  theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
  ours = {name: leaf.shape for name, leaf in named_leaves(expected_shapes(config)).items()}
  made = {}
  for rule in rules(config):
    arrays = tuple(jax.ShapeDtypeStruct(theirs.pop(x), jnp.float32) for x in rule.theirs)
    shapes = [x.shape for x in jax.eval_shape(rule.layout.read, arrays)]
    made |= zip(rule.ours, shapes, strict=True)
  assert not theirs
  assert made == ours
