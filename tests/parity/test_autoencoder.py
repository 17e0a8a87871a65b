"""Kandinsky's and Stable unCLIP's autoencoders against diffusers: what they compute, and files."""

import copy
import dataclasses
import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import twins
from safetensors.numpy import save_file

from unclip_jax.configs import AutoencoderConfig
from unclip_jax.nn.autoencoder import Autoencoder
from unclip_jax.stages import autoencoder
from unclip_jax.types import UnclipError
from unclip_jax.weights.diffusers_autoencoder import read_config, rules, write_config
from unclip_jax.weights.rules import read_params, write_tensors
from unclip_jax.weights.safetensors import named_leaves

TOLERANCE = 1e-5
CODEBOOK = 'quantize.embedding.weight'
OLD_NAMES = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
CLASSES = {'kl': diffusers.AutoencoderKL, 'vq': diffusers.VQModel}

CONFIGS = {
  # Neighbours of one width have no skip convolution between.
  'kl': AutoencoderConfig(
    channels=6, multipliers=(1, 3, 3), num_res_blocks=2, latent_channels=5, num_groups=3
  ),
  # Of less than 64 channels, the 32 groups of the decoder's norms would have one each, and the
  # biases in front of them no effect.
  'movq': AutoencoderConfig(
    channels=32,
    multipliers=(2, 3),
    num_res_blocks=1,
    latent_channels=5,
    kind='vq',
    scaling=0.7,
    attention_levels=(1,),
    num_groups=16,
    codebook_size=7,
    spatial_norm=True,
  ),
  'group norm, attention everywhere, four image channels': AutoencoderConfig(
    channels=5,
    multipliers=(4, 3, 1),
    num_res_blocks=1,
    latent_channels=3,
    kind='vq',
    image_channels=4,
    attention_levels=(0, 1, 2),
    num_groups=1,
    codebook_size=2,
  ),
}
FULL_SIZE = {
  'Stable Diffusion': AutoencoderConfig(
    channels=128, multipliers=(1, 2, 4, 4), num_res_blocks=2, latent_channels=4
  ),
  'Kandinsky': AutoencoderConfig(
    channels=128,
    multipliers=(1, 2, 2, 4),
    num_res_blocks=2,
    latent_channels=4,
    kind='vq',
    attention_levels=(3,),
    codebook_size=16384,
    spatial_norm=True,
  ),
}


class Tensors:
  """Arrays by name, as `read_params` wants them."""

  def __init__(self, arrays):
    self._arrays = arrays

  def names(self):
    return self._arrays

  def shape(self, name):
    return self._arrays[name].shape

  def read(self, name):
    return self._arrays[name]


def build_twin(config):
  return CLASSES[config.kind].from_config(write_config(config))


def make_twin(config, seed):
  return twins.randomise(build_twin(config), seed)


def make_inputs(config, seed):
  """Images, and latents that are none of theirs."""
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(2, 12, 20, config.image_channels))
  latent = rng.normal(size=(2, 12 // config.factor, 20 // config.factor, config.latent_channels))
  return image.astype('f'), latent.astype('f')


def key_layers(model):
  """The names of the layers that project to keys."""
  return [name for name, _ in model.named_modules() if name.endswith('.to_k')]


def run_twin(twin, image, latent, dtype=torch.float64):
  """What a twin computes, in float64: its own float32 may be off by more than the tolerance."""
  twin = copy.deepcopy(twin).double() if dtype == torch.float64 else twin
  keys = {}
  for name in key_layers(twin):
    layer = twin.get_submodule(name)
    layer.register_forward_hook(lambda layer, x, y, name=name: keys.update({name: y}))
  image, latent = (torch.from_numpy(np.moveaxis(x, -1, 1)).to(dtype) for x in (image, latent))
  if isinstance(twin, diffusers.VQModel):
    encoded = [twin.encode(image).latents]
    decoded = twin.decode(latent, force_not_quantize=True).sample
  else:
    posterior = twin.encode(image).latent_dist
    encoded = [posterior.mean, posterior.logvar]
    decoded = twin.decode(latent).sample
  return [*(x.movedim(1, -1) for x in (*encoded, decoded)), *(keys[k] for k in key_layers(twin))]


def qkv_paths(config, layers):
  """The modules of ours whose middle third are the keys of those layers."""
  ours = {theirs: rule.ours[0] for rule in rules(config) for theirs in rule.theirs}
  return tuple(ours[f'{name}.weight'].removesuffix('.kernel') for name in layers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_ours(config, key_paths, params, image, latent):
  def encode_and_decode(module, image, latent):
    encoded = module.moments(image) if config.kind == 'kl' else (module.encode(image),)
    return *encoded, module.decode(latent)

  outputs, captured = Autoencoder(config).apply(
    {'params': params},
    image,
    latent,
    method=encode_and_decode,
    capture_intermediates=lambda module, _: module.name == 'qkv',
  )
  keys = []
  for path in key_paths:
    node = captured['intermediates']
    for name in path.split('.'):
      node = node[name]
    keys.append(node['__call__'][0][:, :, 1, 0])
  # Nothing depends on the bias of the keys, which softmax cancels: the keys are compared too.
  return [*outputs, *keys]


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: autoencoder.init(config, key), jax.random.key(0))


def read(config, arrays):
  its_rules = rules(config, arrays.keys())
  return read_params(Tensors(arrays), its_rules, expected_shapes(config), 'a twin')


def lay_out(config, arrays):
  """As `read`, by the rules alone: many times as fast."""
  made = {}
  for rule in rules(config):
    ours = rule.layout.read(tuple(arrays[name] for name in rule.theirs))
    made |= dict(zip(rule.ours, ours, strict=True))
  expected = expected_shapes(config)
  return jax.tree.unflatten(jax.tree.structure(expected), [made[n] for n in named_leaves(expected)])


def rename_attention(arrays):
  """As diffusers named the layers before 0.17."""

  def old_name(name):
    for new, old in OLD_NAMES.items():
      name = name.replace(f'.{new}.', f'.{old}.')
    return name

  return {old_name(name): array for name, array in arrays.items()}


def assert_same_arrays(got, wanted):
  assert got.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(got[name], array, strict=True, err_msg=name)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('seed', [1, 2])
def test_autoencoder_agrees_with_diffusers(name, seed):
  config = CONFIGS[name]
  twin = make_twin(config, seed)
  params = read(config, twins.tensors_of(twin))
  inputs = make_inputs(config, seed)
  paths = qkv_paths(config, key_layers(twin))
  actual, expected = run_ours(config, paths, params, *inputs), run_twin(twin, *inputs)
  worst = twins.worst_deviation(actual, expected)
  own = twins.worst_deviation(run_twin(twin, *inputs, dtype=torch.float32), expected)
  print(f'{name} {worst:.1e}, float32 of diffusers {own:.1e}')
  # Which of the two is nearer to float64 is a matter of the processor.
  assert worst < max(TOLERANCE, 1.5 * own)


@pytest.mark.parametrize('name', CONFIGS)
def test_autoencoder_uses_every_tensor_of_diffusers(name):
  config = CONFIGS[name]
  twin = make_twin(config, seed=0)
  inputs = make_inputs(config, seed=0)
  paths = qkv_paths(config, key_layers(twin))
  tensors = twins.tensors_of(twin)
  # What is decoded is not quantised: nothing but a file holds the codebook.
  codebook = {CODEBOOK: tensors.pop(CODEBOOK)} if config.kind == 'vq' else {}

  def run(changed):
    return run_ours(config, paths, lay_out(config, changed | codebook), *inputs)

  twins.check_each_tensor_matters(tensors, run, run_twin(twin, *inputs), TOLERANCE)
  if codebook:
    params = read(config, tensors | codebook)
    np.testing.assert_array_equal(params['codebook'], codebook[CODEBOOK], strict=True)


@pytest.mark.parametrize('name', CONFIGS)
def test_tensors_are_written_as_they_were_read(name):
  config = CONFIGS[name]
  tensors = twins.tensors_of(make_twin(config, seed=0))
  assert_same_arrays(write_tensors(read(config, tensors), rules(config)), tensors)


@pytest.mark.parametrize('name', ['kl', 'movq'])
def test_old_names_of_attention_are_read_and_written(name, tmp_path):
  config = CONFIGS[name]
  twin = make_twin(config, seed=0)
  tensors = twins.tensors_of(twin)
  old = rename_attention(tensors)
  assert len(old.keys() - tensors.keys()) == 8 * len(key_layers(twin))
  params = read(config, old)
  jax.tree.map(np.testing.assert_array_equal, params, read(config, tensors))
  assert_same_arrays(write_tensors(params, rules(config, old.keys())), old)
  # The names are those that diffusers still opens.
  save_file(old, tmp_path / 'diffusion_pytorch_model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(write_config(config)))
  opened = CLASSES[config.kind].from_pretrained(tmp_path, low_cpu_mem_usage=False)
  assert_same_arrays(twins.tensors_of(opened.requires_grad_(False)), tensors)


@pytest.mark.parametrize('name', FULL_SIZE)
def test_full_size_has_the_shapes_of_diffusers(name):
  config = FULL_SIZE[name]
  with torch.device('meta'):
    twin = build_twin(config)
  theirs = {k: jax.ShapeDtypeStruct(v.shape, np.float32) for k, v in twin.state_dict().items()}
  ours = {
    '.'.join(p.key for p in path): leaf.shape
    for path, leaf in jax.tree.leaves_with_path(expected_shapes(config))
  }
  read_shapes = {}
  for rule in rules(config):
    leaves = jax.eval_shape(rule.layout.read, tuple(theirs.pop(name) for name in rule.theirs))
    read_shapes |= {name: x.shape for name, x in zip(rule.ours, leaves, strict=True)}
  assert not theirs
  assert read_shapes == ours


@pytest.mark.parametrize('config', [*CONFIGS.values(), *FULL_SIZE.values()])
def test_config_is_read_as_it_was_written(config):
  assert read_config(write_config(config)) == config


@pytest.mark.parametrize('config', CONFIGS.values())
def test_config_that_diffusers_writes_is_read(config, tmp_path):
  build_twin(config).save_config(tmp_path)
  values = json.loads((tmp_path / 'config.json').read_text())
  assert values.keys() > write_config(config).keys()
  assert read_config(values) == config


def test_config_of_few_fields_has_the_defaults_of_diffusers():
  for name, twin_class in (('AutoencoderKL', CLASSES['kl']), ('VQModel', CLASSES['vq'])):
    config = read_config({'_class_name': name})
    build = {k: v for k, v in dict(twin_class().config).items() if not k.startswith('_')}
    # The codebook has the latent's channels if nothing is said.
    written = write_config(config) | {'vq_embed_dim': build.get('vq_embed_dim')}
    assert build == build | {k: _as_tuple(written[k]) for k in build.keys() & written.keys()}


def _as_tuple(value):
  return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
  ('kind', 'changes', 'match'),
  [
    ('kl', {'_class_name': 'AutoencoderTiny'}, "_class_name is 'AutoencoderTiny'.*AutoencoderKL"),
    ('kl', {'_class_name': None}, '_class_name is None'),
    ('kl', {'act_fn': 'gelu'}, "act_fn is 'gelu'"),
    ('kl', {'out_channels': 4}, 'out_channels is 4: only 3'),
    ('kl', {'mid_block_add_attention': False}, 'mid_block_add_attention is False'),
    ('kl', {'use_quant_conv': False}, 'use_quant_conv is False'),
    ('kl', {'use_post_quant_conv': False}, 'use_post_quant_conv is False'),
    ('kl', {'shift_factor': 0.1}, 'shift_factor is 0.1'),
    ('kl', {'latents_mean': [0.0] * 5}, 'latents_mean is'),
    ('kl', {'latents_std': [1.0] * 5}, 'latents_std is'),
    ('kl', {'norm_type': 'spatial'}, "'norm_type'"),
    ('kl', {'attention_window': 8}, "'attention_window'"),
    ('kl', {'layers_per_block': 'two'}, "layers_per_block is 'two'"),
    ('kl', {'block_out_channels': [6, 4.5, 12]}, 'block_out_channels is'),
    ('kl', {'block_out_channels': [6, 0, 12]}, 'block_out_channels is'),
    ('kl', {'down_block_types': ['DownEncoderBlock2D'] * 2}, 'down_block_types is .* only 3 of'),
    ('kl', {'up_block_types': 'UpDecoderBlock2D'}, 'up_block_types is'),
    (
      'kl',
      {'up_block_types': ['UpDecoderBlock2D', 'UpBlock2D', 'UpDecoderBlock2D']},
      'up_block_types is .*UpBlock2D.* or AttnUpDecoderBlock2D',
    ),
    (
      'movq',
      {'up_block_types': ['UpDecoderBlock2D', 'AttnUpDecoderBlock2D']},
      r'up_block_types has attention at the levels \[0\], and down_block_types at \[1\]',
    ),
    ('movq', {'vq_embed_dim': 6}, 'vq_embed_dim is 6: only None, 5'),
    ('movq', {'norm_type': 'batch'}, "norm_type is 'batch'"),
    ('movq', {'lookup_from_codebook': True}, 'lookup_from_codebook is True'),
  ],
)
def test_fields_that_ours_does_not_know_are_refused(kind, changes, match):
  values = write_config(CONFIGS[kind]) | changes
  with pytest.raises(UnclipError, match=rf'^movq/config\.json: .*{match}'):
    read_config(values, 'movq/config.json')


def test_config_that_diffusers_does_not_have_is_not_written():
  with pytest.raises(UnclipError, match="kind 'kl' with spatial norm"):
    write_config(dataclasses.replace(CONFIGS['movq'], kind='kl'))
