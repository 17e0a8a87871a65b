"""CLIP from OpenAI's archives and open_clip's folders: both towers against their torch twins."""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import twins
from clip_resnet_twin import Twin, save_archive

import unclip_jax
from unclip_jax.configs import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.clip import ClipNetwork
from unclip_jax.stages import clip
from unclip_jax.systems import formats, loading
from unclip_jax.weights import openai_clip
from unclip_jax.weights.rules import write_tensors

TOLERANCE = 1e-5
TEXT = TextConfig(
  vocab_size=37, context_length=9, width=21, depth=2, num_heads=3, mlp_activation='quick_gelu'
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESNETS = {
  'four levels': ResNetConfig(image_size=64, width=6, depths=(1, 2, 1, 1), num_heads=3),
  'three levels': ResNetConfig(image_size=48, width=10, depths=(2, 1, 2), num_heads=5),
}
VITS = {
  'quick_gelu': ViTConfig(
    image_size=15, patch_size=5, width=30, depth=2, num_heads=5, mlp_activation='quick_gelu'
  ),
  'gelu': ViTConfig(image_size=28, patch_size=7, width=26, depth=1, num_heads=2, mlp_width=128),
}
TOWERS = {**RESNETS, **VITS}


def make_config(name):
  vision = TOWERS[name]
  text = TEXT
  if isinstance(vision, ViTConfig):
    text = dataclasses.replace(TEXT, mlp_activation=vision.mlp_activation)
  return ClipConfig(text, vision, embed_dim=13, unit_norm=False, pixel_mean=MEAN, pixel_std=STD)


def make_inputs(config, batch, seed=0):
  """Images in [-1, 1], and captions that end early and late."""
  rng = np.random.default_rng(seed)
  size, (length, end) = (
    config.vision.image_size,
    (config.text.context_length, config.text.vocab_size),
  )
  images = rng.uniform(-1, 1, size=(batch, size, size, 3))
  # Of one colour and noise, or the embeddings of such images are all alike.
  images = (0.3 * images + 0.7 * images[:, :1, :1]).astype('f')
  ends = np.array([length - 1, 1, length // 2])[:batch, None]
  positions = np.arange(length)[None]
  words = rng.integers(5, end - 2, size=(batch, length))
  ids = np.where(positions < ends, words, np.where(positions == ends, end - 1, 0)).astype(np.int32)
  return images, ids, positions <= ends


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, images, ids, mask):
  network, variables = ClipNetwork(config), {'params': params}
  (z_i, z_t, log_scale), captured = network.apply(
    variables,
    images,
    ids,
    mask,
    capture_intermediates=lambda module, _: module.name in ('qkv', 'kv'),
  )
  states = network.apply(variables, ids, mask, method='encode_text').states
  unit_i, unit_t = (z / jax.numpy.linalg.norm(z, axis=1, keepdims=True) for z in (z_i, z_t))
  logits = jax.numpy.exp(log_scale) * unit_t @ unit_i.T
  captured = captured['intermediates']
  layers = [captured['text']['blocks'][f'block_{i}']['qkv'] for i in range(config.text.depth)]
  if isinstance(config.vision, ResNetConfig):
    layers.append(captured['vision']['pool']['kv'])
  else:
    blocks = captured['vision']['blocks']
    layers += [blocks[f'block_{i}']['qkv'] for i in range(config.vision.depth)]
  # Nothing depends on the bias of the keys, which softmax cancels: the keys are compared too.
  keys = [layer['__call__'][0] for layer in layers]
  keys = [x[:, :, x.shape[2] - 2].reshape(*x.shape[:2], -1) for x in keys]
  return [z_i, z_t, states, logits, *keys]


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: clip.init(config, key), jax.random.key(0))


@pytest.mark.parametrize('name', TOWERS)
def test_towers_agree_with_their_twins(name):
  config = make_config(name)
  twin = Twin(config, seed=0)
  params = twins.convert(twin.tensors, openai_clip.rules(config), expected_shapes(config))
  inputs = make_inputs(config, 3)
  expected = twin.run(*inputs[:2])
  assert all(z.std(dim=0).mean() > 0.1 for z in expected[:2])  # inputs of a batch differ
  worst = twins.worst_deviation(run_ours(config, params, *inputs), expected)
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', ['four levels', 'gelu'])
def test_towers_use_every_tensor(name):
  config = make_config(name)
  twin = Twin(config, seed=0)
  inputs = make_inputs(config, 3)
  rules = openai_clip.rules(config)

  def run(tensors):
    # What changes a variance must leave it one.
    tensors = {k: np.abs(v) if k.endswith('running_var') else v for k, v in tensors.items()}
    return run_ours(config, twins.lay_out(tensors, rules, expected_shapes(config)), *inputs)

  assert any(key.endswith('running_mean') for key in twin.tensors) == (name == 'four levels')
  twins.check_each_tensor_matters(twin.tensors, run, twin.run(*inputs[:2]), TOLERANCE)


# --- Files.

PROMPTS = ['a cat', 'two red apples on a table']
# Heads of 64, as OpenAI's are; the vocabulary is CLIP's.
ARCHIVED = {
  'RN': ResNetConfig(image_size=32, width=6, depths=(1, 2, 1, 1), num_heads=3),
  'ViT': ViTConfig(
    image_size=24, patch_size=8, width=128, depth=1, num_heads=2, mlp_activation='quick_gelu'
  ),
}


def assert_encodes_as(model, twin):
  config = twin.config
  images, _, _ = make_inputs(config, 2)
  tokenizer = Tokenizer.clip(config.text.context_length, pad_id=0)
  z_i, z_t, *_ = twin.run(images, tokenizer.encode(PROMPTS).ids)
  pairs = (model.encode_image(images), z_i), (model.encode_text(PROMPTS), z_t)
  for ours, theirs in pairs:
    theirs = torch.nn.functional.normalize(theirs, dim=1).numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5)


@pytest.mark.parametrize('name', ARCHIVED)
def test_an_archive_of_openai_opens(tmp_path, name):
  text = dataclasses.replace(TEXT, vocab_size=49408, width=64, num_heads=1, depth=1)
  config = ClipConfig(text, ARCHIVED[name], embed_dim=13, pixel_mean=MEAN, pixel_std=STD)
  twin = Twin(config, seed=0)
  path = tmp_path / f'{name}.pt'
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', r'`torch\.jit\.\w+` is (deprecated|not supported)')
    save_archive(twin, path)
  model = unclip_jax.load(path)
  assert model.config.clip == config
  assert_encodes_as(model, twin)
  opened = formats.open_model(loading.find_folder(path))
  params = loading.read_stages(opened, np.float32)['clip']
  written = write_tensors(params, openai_clip.rules(config))
  assert written.keys() == twin.tensors.keys()
  for key, tensor in twin.tensors.items():  # half precision is exact in float32
    np.testing.assert_array_equal(written[key], tensor, key)


@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_a_folder_of_open_clip_opens(tmp_path, ending):
  vision = ViTConfig(image_size=28, patch_size=7, width=26, depth=2, num_heads=2, mlp_width=128)
  text = dataclasses.replace(TEXT, vocab_size=49408, mlp_activation='gelu')
  mean, std = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
  config = ClipConfig(text, vision, embed_dim=13, pixel_mean=mean, pixel_std=std)
  twin = Twin(config, seed=0)
  values = {
    'model_cfg': {
      'embed_dim': 13,
      'vision_cfg': {
        'image_size': 28,
        'layers': 2,
        'width': 26,
        'head_width': 13,
        'mlp_ratio': 4.9231,
        'patch_size': 7,
      },
      'text_cfg': {'context_length': 9, 'vocab_size': 49408, 'width': 21, 'heads': 3, 'layers': 2},
    },
    'preprocess_cfg': {'mean': list(mean), 'std': list(std)},
  }
  (tmp_path / 'open_clip_config.json').write_text(json.dumps(values))
  tensors = {name: torch.from_numpy(array) for name, array in twin.tensors.items()}
  if ending == 'safetensors':
    path = tmp_path / 'open_clip_model.safetensors'
    safetensors.torch.save_file(tensors, path)
  else:
    tensors['text_projection.weight'] = tensors.pop('text_projection').T
    path = tmp_path / 'open_clip_pytorch_model.bin'
    torch.save(tensors, path)
  model = unclip_jax.load(tmp_path)
  assert model.config.clip == config
  assert_encodes_as(model, twin)
  assert unclip_jax.load(path).config == model.config
