"""Karlo's own files, opened: the model that the folder of diffusers holds of the same networks."""

import contextlib
import dataclasses
import functools
import json
import shutil

import diffusers
import jax
import karlo_original_twin
import karlo_twin
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import twins
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

import unclip_jax
from unclip_jax.config_json import override
from unclip_jax.presets import KARLO
from unclip_jax.systems import checks, formats, loading
from unclip_jax.systems.convert import convert
from unclip_jax.systems.settings import Sampling
from unclip_jax.types import UnclipError
from unclip_jax.weights import karlo_original
from unclip_jax.weights.foreign_folder import Joined
from unclip_jax.weights.rules import read_params

TOLERANCE = 1e-5
# Heads are 64 wide: two of them in each Transformer, and in the last level of the decoder.
SIZES = {
  'embed_dim': 128,
  'prior_heads': (2, 64),
  'channels': 32,
  'multipliers': (1, 2, 4),
  'num_res_blocks': 1,
  'head_dim': 64,
  'groups': 32,
  'size': 64,
  'up_channels': 32,
  'up_groups': 32,
  'up_size': 256,
}


class Fakes(twins.Tensors):
  """Tensors of which there are only shapes."""

  def read(self, name):
    raise EOFError(name)


@pytest.fixture(scope='module')
def parts():
  parts = karlo_twin.make_parts(**SIZES)
  std = parts['prior'].clip_std
  std.copy_(std.abs() + 0.1)  # no deviation is negative
  return parts


@pytest.fixture(scope='module')
def release(parts):
  return karlo_original_twin.original_tensors(parts)


@pytest.fixture(scope='module')
def tensors(release):
  """Of each part, as conversions read them."""
  pairs = {**release, 'statistics': dict(zip(('mean', 'std'), release['statistics'], strict=True))}
  return {
    part: twins.Tensors({name: x.numpy() for name, x in named.items()})
    for part, named in pairs.items()
  }


@pytest.fixture(scope='module')
def folders(tmp_path_factory, parts, release):
  """The folder of diffusers, and that of the original."""
  theirs, original = (tmp_path_factory.mktemp('karlo') / name for name in ('diffusers', 'original'))
  parts = {**parts, 'tokenizer': karlo_twin.make_tokenizer(theirs.parent / 'clip_tokenizer')}
  image_encoder = parts.pop('image_encoder')
  diffusers.UnCLIPPipeline(**parts).save_pretrained(theirs)
  image_encoder.save_pretrained(theirs / 'image_encoder')
  karlo_original_twin.save_release(original, release)
  return theirs, original


@pytest.fixture(scope='module')
def models(folders):
  return [unclip_jax.load(folder) for folder in folders]


def open_fakes(tensors, part=None):
  """What opens a folder of such files and looks at them, up to where a tensor is read.

  Of all stages, or of the one that a part belongs to.
  """
  config = karlo_original.read_config(tensors, 'twin')
  checks.check_config(config)
  rules, stages = karlo_original.rules(config), {}
  for stage, names in karlo_original.STAGE_PARTS.items():
    if part in (None, *names):
      joined = Joined({name: Fakes(tensors[name]) for name in names})
      stages[stage] = formats.Stage(functools.partial(read_stage, joined, rules[stage]), ())
  opened = formats.Model('twin', 'twin', '', config, None, None, stages)
  for stage in stages:
    with contextlib.suppress(EOFError):
      loading.read_stages(opened, 'float32', [stage])


def read_stage(tensors, rules, expected):
  return read_params(tensors, rules, expected, 'twin', karlo_original.IGNORED)


def message(tensors, part, changed):
  """What opening says where the tensors of a part are others."""
  with pytest.raises(UnclipError) as caught:
    open_fakes({**tensors, part: Fakes(changed)}, part)
  return str(caught.value)


# --- The same model.


def test_configs_are_equal_but_for_the_range_of_x_0(models):
  theirs, original = models
  assert theirs.config.prior.diffusion.clip_x_0 == 5
  assert original.config.prior.diffusion.clip_x_0 == 10
  assert original.config == override(theirs.config, ['prior.diffusion.clip_x_0=10.0'])
  assert original.tokenizer.encode(['a red apple', '']).ids.tolist() == (
    theirs.tokenizer.encode(['a red apple', '']).ids.tolist()
  )


def test_parameters_are_those_of_diffusers(models):
  theirs, original = (model.params for model in models)
  assert set(original) == {'clip', 'prior', 'decoder', 'upsampler_0'}
  assert jax.tree.structure(original) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, original, theirs)


def test_pictures_are_those_of_diffusers(models):
  theirs, original = models
  theirs = dataclasses.replace(theirs, config=original.config)  # which is of the range alone
  few = {
    'prior': Sampling(num_steps=3),
    'decoder': Sampling(num_steps=2),
    'upsampler': Sampling(num_steps=2),
  }
  images, expected = (
    model.sample(['a red apple on a table'], seed=3, **few).images for model in (original, theirs)
  )
  assert images.shape == (1, 256, 256, 3)
  assert images.std() > 20
  np.testing.assert_array_equal(images, expected)


def test_conversion_to_diffusers_gives_what_it_wrote_but_for_the_range(folders, tmp_path):
  convert(folders[1], tmp_path, 'diffusers')
  weights = sorted(path.relative_to(folders[0]) for path in folders[0].rglob('*.safetensors'))
  assert len(weights) == 7
  for path in weights:
    expected, written = (
      safetensors.numpy.load_file(folder / path) for folder in (folders[0], tmp_path)
    )
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
      np.testing.assert_array_equal(written[name], tensor, f'{path}: {name}')
  scheduler = json.loads((tmp_path / 'prior_scheduler' / 'scheduler_config.json').read_text())
  assert scheduler['clip_sample_range'] == 10


# --- Each tensor.


def test_every_tensor_is_in_one_rule_and_written_as_it_was(tensors):
  config = karlo_original.read_config(tensors, 'twin')
  expected, rules = loading.expected_params(config), karlo_original.rules(config)
  for stage, part_names in karlo_original.STAGE_PARTS.items():
    named = {
      f'{part}/{name}': tensor
      for part in part_names
      for name, tensor in tensors[part].items()
      if not name.endswith(karlo_original.IGNORED)
    }
    twins.convert(named, rules[stage], expected[stage])
    assert len(named) > 20


def test_a_tensor_that_is_missing_or_renamed_is_named(tensors):
  num_named = 0
  for part, named in tensors.items():
    for name in named:
      if name.endswith(karlo_original.IGNORED):
        continue
      changed = dict(named)
      tensor = changed.pop(name)
      num_named += 1
      if num_named % 2:
        changed[f'other.{name}'] = tensor
      said = message(tensors, part, changed)
      # By the first norms of its blocks CLIP's depth is told: without one, another block is named.
      assert name in said or (part == 'clip' and name.endswith('ln_1.weight')), (name, said)
  assert num_named > 400


# What tells a size is right by itself: named is what is not of that size.
SIZES_TOLD = {
  ('prior', 'model.text_enc_proj.weight', 0): 'must divide prior.width, 129',
  ('prior', 'model.text_enc_proj.weight', 1): 'prior.text_width is 129',
  ('prior', 'model.clip_img_proj.weight', 1): 'prior.embed_dim is 129',
  ('prior', 'model.positional_embedding', 1): 'prior.context_length is 78',
  ('decoder', 'model.text_seq_proj.0.weight', 0): 'decoder/model.clip_tok_proj.weight of shape',
  ('decoder', 'model.text_seq_proj.0.weight', 1): 'decoder.clip_text_width is 129',
  ('decoder', 'model.clip_tok_proj.weight', 1): 'decoder.embed_dim is 129',
  ('decoder', 'model.out.2.weight', 0): 'decoder.unet.out_channels is 7',
  ('super_res', 'model_first_steps.out.2.weight', 0): 'upsamplers.0.unet.out_channels is 4',
}


def test_a_tensor_of_another_shape_is_named(tensors):
  cases = [(part, name, 0) for part in ('prior', 'statistics', 'decoder') for name in tensors[part]]
  cases.append(('decoder', 'model.time_embed.0.weight', 1))
  # The U-Nets have the rules of the decoder's, but for their first convolution.
  cases += [
    ('super_res', f'model_{x}.input_blocks.0.0.weight', 0) for x in ('first_steps', 'last_step')
  ]
  for part, name, axis in {*cases, *SIZES_TOLD}:
    tensor = tensors[part][name]
    larger = np.concatenate([tensor, tensor.take([0], axis)], axis)
    said = message(tensors, part, {**tensors[part], name: larger})
    assert SIZES_TOLD.get((part, name, axis), name) in said, (name, said)


def test_a_tensor_that_is_not_known_is_named(tensors):
  for part in ('prior', 'decoder', 'super_res'):
    said = message(tensors, part, {**tensors[part], 'ema.decay': np.ones(1, 'f')})
    assert f'{part}/ema.decay is not known' in said


def test_masks_that_hold_nothing_learned_are_left_out(tensors):
  extra = {f'model.{name}': np.ones((1, 81, 81), 'f') for name in ('causal_mask', 'cf_mask')}
  open_fakes({**tensors, 'prior': Fakes({**tensors['prior'], **extra})}, 'prior')


# --- The order of rows.


def test_attention_on_interleaved_rows_is_that_of_diffusers(parts, release):
  layer = parts['decoder'].down_blocks[2].attentions[0]
  assert layer.heads == 2
  generator = torch.Generator().manual_seed(0)
  x = torch.randn(3, 128, 4, 5, generator=generator)
  context = torch.randn(3, 7, SIZES.get('context_dim', 10), generator=generator)
  is_seen = torch.arange(7)[None] < torch.tensor([[7], [3], [1]])
  mask = torch.where(is_seen, 0.0, -torch.inf)[:, None]
  expected = layer(x, encoder_hidden_states=context, attention_mask=mask).flatten(2)

  def run(tensors):
    inputs = x.flatten(2), context.transpose(1, 2), is_seen
    return karlo_original_twin.attention(tensors, name, *inputs, num_heads=2, groups=32)

  name, tensors = 'model.input_blocks.5.1', release['decoder']
  assert twins.deviation(run(tensors), expected) < TOLERANCE
  # Rows of q, k and v one under the other, as others have them, give something else.
  for fused in ('qkv', 'encoder_kv'):
    num = 3 if fused == 'qkv' else 2
    rows = tensors[f'{name}.{fused}.weight']
    rows = rows.unflatten(0, (2, num, 64)).transpose(0, 1).flatten(0, 2)
    assert twins.deviation(run({**tensors, f'{name}.{fused}.weight': rows}), expected) > 0.01


def test_attention_of_the_prior_on_interleaved_rows_is_that_of_diffusers(parts, release):
  layer = parts['prior'].transformer_blocks[1].attn1
  x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))
  mask = torch.full((1, 9, 9), -torch.inf).triu(1).expand(2 * layer.heads, 9, 9)
  name = 'model.transformer.resblocks.1.attn'
  ours = karlo_original_twin.prior_attention(release['prior'], name, x, num_heads=2)
  assert twins.deviation(ours, layer(x, attention_mask=mask)) < TOLERANCE


# --- Sizes.


def full_size():
  """Names and shapes of Karlo v1, of networks that hold no numbers."""
  widths = {'block_out_channels': (320, 640, 960, 1280), 'layers_per_block': 3}
  up = diffusers.UNet2DModel
  upsampler = {
    'in_channels': 6,
    'out_channels': 3,
    'down_block_types': ('ResnetDownsampleBlock2D',) * 4,
    'up_block_types': ('ResnetUpsampleBlock2D',) * 4,
    'add_attention': False,
    **widths,
  }
  clip = {'vocab_size': 49408, 'projection_dim': 768}
  with torch.device('meta'):
    parts = {
      'text_encoder': transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
          hidden_size=768, intermediate_size=3072, num_attention_heads=12, **clip
        )
      ),
      'image_encoder': transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
          hidden_size=1024,
          intermediate_size=4096,
          num_attention_heads=16,
          num_hidden_layers=24,
          patch_size=14,
          projection_dim=768,
        )
      ),
      'prior': diffusers.PriorTransformer(),
      'text_proj': UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536),
      'decoder': diffusers.UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        down_block_types=('ResnetDownsampleBlock2D', *['SimpleCrossAttnDownBlock2D'] * 3),
        mid_block_type='UNetMidBlock2DSimpleCrossAttn',
        up_block_types=(*['SimpleCrossAttnUpBlock2D'] * 3, 'ResnetUpsampleBlock2D'),
        attention_head_dim=64,
        cross_attention_dim=1536,
        class_embed_type='identity',
        resnet_time_scale_shift='scale_shift',
        **widths,
      ),
      'super_res_first': up(**upsampler),
      'super_res_last': up(**upsampler),
    }
    tensors = karlo_original_twin.original_tensors(parts)
  mean, std = tensors['statistics']
  tensors['statistics'] = {'mean': mean, 'std': std}
  return {
    part: Fakes({name: jax.ShapeDtypeStruct(tuple(x.shape), 'f') for name, x in named.items()})
    for part, named in tensors.items()
  }


def test_shapes_of_the_full_size_are_those_of_the_preset():
  tensors = full_size()
  config = karlo_original.read_config(tensors, 'full')
  assert config == override(KARLO, ['prior.diffusion.clip_x_0=10.0'])
  open_fakes(tensors)  # names and shapes are looked at before any is read


# --- Folders.


@pytest.mark.parametrize('part', ['clip', 'statistics'])
def test_a_file_that_is_missing_is_named(folders, tmp_path, part):
  folder = tmp_path / 'release'
  shutil.copytree(folders[1], folder, copy_function=shutil.os.link)
  name = karlo_original_twin.FILES[part]
  (folder / name).unlink()
  with pytest.raises(UnclipError, match=f'has no {name}'):
    formats.open_model(loading.find_folder(folder))


def test_two_files_for_one_part_are_named(folders, tmp_path):
  folder = tmp_path / 'release'
  shutil.copytree(folders[1], folder, copy_function=shutil.os.link)
  (folder / 'decoder-old.ckpt').write_bytes(b'')
  with pytest.raises(UnclipError, match=r'decoder-ckpt.*decoder-old\.ckpt.*move one away'):
    formats.open_model(loading.find_folder(folder))


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (torch.ones(2, 128), 'is not a mean and a standard deviation'),
    ((torch.ones(128), torch.zeros(128)), 'is not a mean and a standard deviation'),
    ((torch.ones(127), torch.ones(127)), r'statistics/mean of shape \[127\]'),
    (None, 'cannot be read'),
  ],
)
def test_statistics_of_another_kind_are_named(folders, tmp_path, content, said):
  folder = tmp_path / 'release'
  shutil.copytree(folders[1], folder, copy_function=shutil.os.link)
  path = folder / karlo_original_twin.FILES['statistics']
  path.unlink()
  if content is None:
    path.write_bytes(b'PK\x03\x04')
  else:
    torch.save(content, path)
  with pytest.raises(UnclipError, match=said):
    model = formats.open_model(loading.find_folder(folder))
    loading.read_stages(model, 'float32', ['prior'])
