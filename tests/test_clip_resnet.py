"""CLIP's ResNets, and CLIPs under OpenAI's names: their configs, sizes and faults, without torch.

That they compute what torch does is in tests/parity/test_openai_clip.py.
"""

import copy
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_shapes import CLIP, TEXT, TINY, ReadError, archive_shapes, clip_shapes
from random_params import randomised
from safetensors.numpy import save_file

import unclip_jax
from unclip_jax.config_json import from_json, to_json
from unclip_jax.configs import (
  ClipConfig,
  ResNetConfig,
  TextConfig,
  UnclipConfig,
  ViTConfig,
)
from unclip_jax.nn.clip_resnet import FrozenBatchNorm
from unclip_jax.stages import clip
from unclip_jax.systems.checks import check_config
from unclip_jax.systems.formats import open_model
from unclip_jax.systems.loading import find_folder
from unclip_jax.types import UnclipError
from unclip_jax.weights import open_clip, openai_clip
from unclip_jax.weights.rules import read_params, write_tensors


def text_tower(width, num_heads, depth=12, activation='quick_gelu'):
  return TextConfig(49408, 77, width, depth, num_heads, activation)


def openai(vision, text_width, embed_dim):
  text = text_tower(text_width, text_width // 64)
  pixels = {'pixel_mean': CLIP.pixel_mean, 'pixel_std': CLIP.pixel_std}
  return ClipConfig(text, vision, embed_dim, **pixels)


def openai_vit(size, patch, width, depth, heads):
  return ViTConfig(size, patch, width, depth, heads, 'quick_gelu')


# Table 19 and 20 of Radford et al. 2021. Learned parameters: as OpenAI's own notebook counts them,
# in millions where only the table of open_clip does.
PUBLIC = {
  'ViT-B/32': (openai(openai_vit(224, 32, 768, 12, 12), 512, 512), 151_277_313),
  'ViT-B/16': (openai(openai_vit(224, 16, 768, 12, 12), 512, 512), 149_620_737),
  'ViT-L/14': (openai(openai_vit(224, 14, 1024, 24, 16), 768, 768), 427_616_513),
  'ViT-L/14@336px': (openai(openai_vit(336, 14, 1024, 24, 16), 768, 768), 427.94),
  'RN50': (openai(ResNetConfig(224, 64, (3, 4, 6, 3), 32), 512, 1024), 102_007_137),
  'RN101': (openai(ResNetConfig(224, 64, (3, 4, 23, 3), 32), 512, 512), 119_688_033),
  'RN50x4': (openai(ResNetConfig(288, 80, (4, 6, 10, 6), 40), 640, 640), 178.30),
  'RN50x16': (openai(ResNetConfig(384, 96, (6, 8, 18, 8), 48), 768, 768), 290.98),
  'RN50x64': (openai(ResNetConfig(448, 128, (3, 15, 36, 10), 64), 1024, 1024), 623.26),
}
OPEN_CLIP = {
  'ViT-H-14': (
    {
      'embed_dim': 1024,
      'vision_cfg': {
        'image_size': 224, 'layers': 32, 'width': 1280, 'head_width': 80, 'patch_size': 14
      },
      'text_cfg': {
        'context_length': 77, 'vocab_size': 49408, 'width': 1024, 'heads': 16, 'layers': 24
      },
    },
    ClipConfig(text_tower(1024, 16, 24, 'gelu'), ViTConfig(224, 14, 1280, 32, 16), 1024),
    986.11,
  ),
  'ViT-bigG-14': (
    {
      'embed_dim': 1280,
      'vision_cfg': {
        'image_size': 224, 'layers': 48, 'width': 1664, 'head_width': 104, 'mlp_ratio': 4.9231,
        'patch_size': 14,
      },
      'text_cfg': {
        'context_length': 77, 'vocab_size': 49408, 'width': 1280, 'heads': 20, 'layers': 32
      },
    },
    ClipConfig(
      text_tower(1280, 20, 32, 'gelu'), ViTConfig(224, 14, 1664, 48, 16, 'gelu', 8192), 1280
    ),
    2539.57,
  ),
  'RN50-quickgelu': (
    {
      'embed_dim': 1024,
      'quick_gelu': True,
      'vision_cfg': {
        'image_size': 224, 'layers': [3, 4, 6, 3], 'width': 64, 'patch_size': None
      },
      'text_cfg': {
        'context_length': 77, 'vocab_size': 49408, 'width': 512, 'heads': 8, 'layers': 12
      },
    },
    ClipConfig(text_tower(512, 8), ResNetConfig(224, 64, (3, 4, 6, 3), 32), 1024),
    102.01,
  ),
}  # fmt: skip


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(functools.partial(clip.init, config), jax.random.key(0))


def assert_whole(config, tensors, count):
  """Each tensor has its place in each parameter, and there are as many as were published."""
  expected = expected_shapes(config)
  with pytest.raises(ReadError):  # names and shapes are found right before the first is read
    read_params(tensors, openai_clip.rules(config), expected, 'it', openai_clip.IGNORED)
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  found = sum(math.prod(x.shape) for path, x in leaves if path[-1].key not in ('mean', 'var'))
  assert found == count if isinstance(count, int) else round(found / 1e6, 2) == count


@pytest.mark.parametrize('name', PUBLIC)
def test_the_shapes_of_public_models_tell_their_configs(name):
  config, count = PUBLIC[name]
  tensors = archive_shapes(config)
  assert openai_clip.is_clip(tensors) and openai_clip.is_openai(tensors)
  assert openai_clip.read_config(tensors, 'it') == config
  assert_whole(config, tensors, count)


@pytest.mark.parametrize('name', OPEN_CLIP)
def test_configs_of_open_clip_tell_what_shapes_do_not(name):
  values, config, count = OPEN_CLIP[name]
  mean, std = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
  tensors = clip_shapes(config)
  assert not openai_clip.is_openai(tensors)
  pixels = {'mean': mean, 'std': std, 'size': 224, 'interpolation': 'bicubic', 'mode': 'RGB'}
  values = {'model_cfg': values, 'preprocess_cfg': pixels}
  found = open_clip.read_config(values, 'config', tensors, 'it')
  assert found == dataclasses.replace(config, pixel_mean=mean, pixel_std=std)
  check_config(UnclipConfig(found, None, None))
  assert_whole(config, tensors, count)


# --- The network.


@pytest.fixture(scope='module')
def params():
  drawn = randomised(expected_shapes(CLIP))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.abs(x) + 0.5 if path[-1].key == 'var' else x, drawn
  )


def test_a_resnet_projects_by_itself(params):
  assert 'image_projection' not in params
  assert params['vision']['pool']['out']['kernel'].shape == (2, 64, 7)
  images = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64, 3)).astype('f')
  encode = jax.jit(functools.partial(clip.encode_image, CLIP), static_argnums=2)
  z_i = encode(params, images)
  assert z_i.shape == (3, 7)
  assert z_i.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(z_i, axis=1), 1, rtol=1e-6)
  half = encode(params, images, jnp.bfloat16)
  np.testing.assert_allclose(half, z_i, atol=0.05)
  with pytest.raises(ValueError, match=r'CLIP takes images \[b, 64, 64, 3\]'):
    clip.encode_image(CLIP, params, images[:, :32])


def test_training_leaves_the_statistics_alone():
  norm, x = FrozenBatchNorm(), jnp.arange(8.0).reshape(1, 2, 2, 2) ** 2
  start = {'scale': jnp.ones(2), 'bias': jnp.ones(2), 'mean': jnp.ones(2), 'var': 2 * jnp.ones(2)}
  gradients = jax.grad(lambda params: (norm.apply({'params': params}, x) ** 2).sum())(start)
  assert gradients['scale'].all() and gradients['bias'].all()
  assert not gradients['mean'].any() and not gradients['var'].any()


def test_configs_survive_json():
  config = UnclipConfig(clip=CLIP, prior=None, decoder=None)
  assert from_json(UnclipConfig, to_json(config)) == config


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'image_size': 48}, 'image_size is 48: with 4 levels it must be a multiple of 32'),
    ({'image_size': 0}, 'image_size is 0'),
    ({'width': 5}, 'width is 5: the stem needs an even number'),
    ({'width': 0}, 'width is 0'),
    ({'depths': ()}, r'depths is \[\]'),
    ({'depths': (1, 0, 2)}, r'depths is \[1, 0, 2\]: take 1 or more'),
    ({'num_heads': 3}, 'num_heads is 3: it must divide the 128 channels'),
    ({'num_heads': 0}, 'num_heads is 0'),
  ],
)
def test_what_cannot_be_built_is_refused(change, match):
  vision = dataclasses.replace(TINY, **change)
  config = UnclipConfig(dataclasses.replace(CLIP, vision=vision), None, None)
  with pytest.raises(UnclipError, match=rf'clip\.vision\.{match}'):
    check_config(config)


# --- Files.


@pytest.fixture(scope='module')
def archive(params, tmp_path_factory):
  """A file as OpenAI's, but for its format."""
  path = tmp_path_factory.mktemp('archive') / 'RN.safetensors'
  tensors = write_tensors(params, openai_clip.rules(CLIP))
  marks = {'input_resolution': 64, 'context_length': 5, 'vocab_size': 49408}
  marks |= {'visual.bn1.num_batches_tracked': 9}
  masks = {'transformer.resblocks.0.attn_mask': np.full((5, 5), -np.inf, 'f')}
  save_file({**tensors, **masks, **{k: np.array(v) for k, v in marks.items()}}, path)
  return path


def test_a_file_opens_as_a_model(params, archive):
  model = unclip_jax.load(archive)
  assert model.config == UnclipConfig(clip=CLIP, prior=None, decoder=None)
  jax.tree.map(np.testing.assert_array_equal, model.params['clip'], params)
  opened = open_model(find_folder(archive))
  assert opened.written_by == 'OpenAI (CLIP)'
  assert (opened.tokenizer.context_length, opened.tokenizer.pad_id) == (5, 0)
  with pytest.raises(UnclipError, match='this model has no decoder'):
    model.generate('a cat')


def test_what_is_no_clip_is_refused(tmp_path, archive):
  other = tmp_path / 'unet.safetensors'
  save_file({'conv_in.weight': np.ones(3, 'f')}, other)
  text = tmp_path / 'unclip.json'
  text.write_text('{}')
  plain = tmp_path / 'plain.safetensors'
  save_file({name: np.zeros(s, 'f') for name, s in clip_shapes(CLIP).items()}, plain)
  for path, match in (
    (other, 'holds no CLIP by the names of OpenAI'),
    (text, 'is a file: give the folder'),
    (plain, r'neither its heads nor its activation: put the open_clip_config\.json'),
    (tmp_path / 'none.pt', 'there is no model folder'),
  ):
    with pytest.raises(UnclipError, match=match):
      unclip_jax.load(path)


def test_folders_of_open_clip(tmp_path):
  (tmp_path / 'open_clip_config.json').write_text('{}')
  with pytest.raises(UnclipError, match=r'has no open_clip_model\.safetensors or'):
    unclip_jax.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  with pytest.raises(UnclipError, match="model_type is 'bert'"):  # nothing else could be read
    unclip_jax.load(tmp_path)
  save_file({'ln_final.weight': np.ones(3, 'f')}, tmp_path / 'open_clip_model.safetensors')
  with pytest.raises(UnclipError, match=r'token_embedding\.weight is missing'):
    unclip_jax.load(tmp_path)


@pytest.mark.parametrize(
  ('name', 'shape', 'match'),
  [
    ('token_embedding.weight', None, r'token_embedding\.weight is missing'),
    ('text_projection', None, 'text_projection is missing'),
    ('token_embedding.weight', (64,), r'is of shape \[64\]: it must have 2 axes'),
    ('visual.attnpool.positional_embedding', (4, 128), 'has 4 rows: it must have a square'),
    ('visual.attnpool.positional_embedding', (1, 128), 'has 1 rows'),
    ('visual.attnpool.positional_embedding', (0, 128), r'is of shape \[0, 128\]'),
    ('token_embedding.weight', (49408, 96), 'the text tower is 96 wide, no multiple of the 64'),
    ('transformer.resblocks.0.mlp.c_fc.weight', None, r'c_fc\.weight is missing'),
  ],
)
def test_shapes_that_cannot_be_are_refused(name, shape, match):
  tensors = archive_shapes(CLIP)
  tensors.pop(name)
  if shape is not None:
    tensors[name] = shape
  with pytest.raises(UnclipError, match=match):
    openai_clip.read_config(tensors, 'it')


def test_shapes_that_contradict_each_other_are_refused():
  tensors = archive_shapes(CLIP)
  tensors['visual.layer1.0.conv1.weight'] = (2, 4, 1, 1)
  config = openai_clip.read_config(tensors, 'it')
  with pytest.raises(UnclipError, match=r'visual.* of shape .* cannot become our'):
    assert_whole(config, tensors, 0)


@pytest.mark.parametrize(
  ('where', 'value', 'match'),
  [
    ('text_cfg.hf_model_name', 'roberta-base', "'hf_model_name' .'roberta-base'. has no meaning"),
    ('text_cfg.hf_tokenizer_name', 'google/mt5-base', 'hf_tokenizer_name'),
    ('text_cfg.heads', None, "'heads' is missing"),
    ('text_cfg.width', 512, 'text_cfg: width is 512: only 64'),
    ('text_cfg.pool_type', 'eos', "pool_type is 'eos'"),
    ('text_cfg.no_causal_mask', True, 'no_causal_mask'),
    ('text_cfg.mlp_ratio', 3, 'mlp_ratio is 3, but'),
    ('text_cfg.mlp_ratio', math.inf, 'mlp_ratio is inf'),
    ('vision_cfg.timm_model_name', 'resnet50', 'timm_model_name'),
    ('vision_cfg.image_size', [64, 96], 'image_size'),
    ('vision_cfg.layers', [1, 1, 1, 1], r'layers is \[1, 1, 1, 1\]: only \[1, 2, 1, 1\]'),
    ('vision_cfg.head_width', 48, 'head_width is 48: it must divide 128'),
    ('vision_cfg.head_width', 0, 'head_width is 0'),
    ('vision_cfg', 3, 'vision_cfg is 3'),
    ('embed_dim', 8, 'embed_dim is 8: only 7'),
    ('custom_text', True, 'custom_text'),
    ('multimodal_cfg', {'width': 3}, 'multimodal_cfg'),
    ('quick_gelu', 'yes', "quick_gelu is 'yes'"),
    ('../preprocess_cfg.resize_mode', 'squash', "resize_mode is 'squash'"),
    ('../preprocess_cfg.mean', [0.5], 'of three channels'),
    ('../preprocess_cfg.std', [0.5, 0, 0.5], 'of three channels'),
    ('../other', 1, "the field 'other'"),
  ],
)
def test_configs_of_open_clip_are_read_field_by_field(where, value, match):
  model = {
    'embed_dim': 7,
    'vision_cfg': {'image_size': 64, 'layers': [1, 2, 1, 1], 'width': 4, 'patch_size': None},
    'text_cfg': {'context_length': 5, 'vocab_size': 49408, 'width': 64, 'heads': 1, 'layers': 1},
  }
  values = copy.deepcopy({'model_cfg': model, 'preprocess_cfg': {}})
  assert open_clip.read_config(values, 'config', clip_shapes(CLIP), 'it').text == TEXT
  node = values if where.startswith('../') else values['model_cfg']
  *path, leaf = where.removeprefix('../').split('.')
  for part in path:
    node = node[part]
  node[leaf] = value
  values = json.loads(json.dumps(values))
  with pytest.raises(UnclipError, match=match):
    open_clip.read_config(values, 'config', clip_shapes(CLIP), 'it')
