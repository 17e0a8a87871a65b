"""Folders of other programs that are damaged or of another kind: one line that names what is wrong.

Nothing is written, nothing falls back to random weights.
"""

import json
import shutil
from pathlib import Path

import karlo_twin
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_bad_input import complaint

NET, TEXT = 'diffusion_pytorch_model.safetensors', 'model.safetensors'


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  folder = tmp_path_factory.mktemp('karlo')
  karlo_twin.make_pipelines(folder)
  return folder / 'text'


def edit_json(path, **changes):
  """Changes fields; None removes one."""
  values = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(path, change):
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, {'format': 'pt'})


def rename(tensors, old, new):
  tensors[new] = tensors.pop(old)


def put(name, value):
  def change(tensors):
    tensors[name] = value(tensors[name])

  return change


def with_nan(x):
  x = x.copy()
  x.flat[x.size // 2] = np.nan
  return x


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


def to_shards(folder, listed):
  """The tensors in one shard, with an index that names `listed` for it."""
  (folder / NET).rename(folder / 'part.safetensors')
  names = load_file(folder / 'part.safetensors')
  weight_map = dict.fromkeys(names, listed)
  index = folder / 'diffusion_pytorch_model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


class Payload:
  """A pickle that would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (Path.touch, (self.path,))


def to_pickle(folder, content):
  (folder / NET).unlink()
  torch.save(content, folder / 'diffusion_pytorch_model.bin')


DAMAGES = {
  'no folder': (lambda m: shutil.rmtree(m), ['there is no model folder']),
  'no index': (lambda m: (m / 'model_index.json').unlink(), ['is not a model', 'model_index.json']),
  'an index that is no JSON': (lambda m: cut(m / 'model_index.json', 40), ['not valid JSON']),
  'another pipeline': (
    lambda m: edit_json(m / 'model_index.json', _class_name='FluxPipeline'),
    ["_class_name is 'FluxPipeline'", 'UnCLIPPipeline'],
  ),
  'no config': (lambda m: (m / 'decoder' / 'config.json').unlink(), ['config.json is missing']),
  'another network': (
    lambda m: edit_json(m / 'decoder' / 'config.json', _class_name='UNet3DModel'),
    ["_class_name is 'UNet3DModel'", 'UNet2DConditionModel'],
  ),
  'a field without a meaning': (
    lambda m: edit_json(m / 'decoder' / 'config.json', time_warp=3),
    ["'time_warp' (3) has no meaning here"],
  ),
  'a field that asks for more': (
    lambda m: edit_json(m / 'prior' / 'config.json', norm_in_type='layer'),
    ["'norm_in_type' ('layer')"],
  ),
  'a block of another kind': (
    lambda m: edit_json(
      m / 'decoder' / 'config.json', down_block_types=['DownBlock2D', 'SimpleCrossAttnDownBlock2D']
    ),
    ["a block 'DownBlock2D'"],
  ),
  'an activation of another kind': (
    lambda m: edit_json(m / 'decoder' / 'config.json', act_fn='gelu'),
    ["act_fn is 'gelu'", "'silu'"],
  ),
  'a field that is missing': (
    lambda m: edit_json(m / 'decoder' / 'config.json', in_channels=None),
    ["'in_channels' is missing"],
  ),
  'a field of another type': (
    lambda m: edit_json(m / 'decoder' / 'config.json', layers_per_block='two'),
    ["layers_per_block is 'two'"],
  ),
  'another scheduler': (
    lambda m: edit_json(m / 'prior_scheduler' / 'scheduler_config.json', _class_name='PNDM'),
    ["_class_name is 'PNDM'", 'UnCLIPScheduler'],
  ),
  'stages that do not meet': (
    lambda m: edit_json(m / 'text_encoder' / 'config.json', projection_dim=25),
    ['clip.embed_dim is 25', 'prior.embed_dim is 24'],
  ),
  'a config of another size': (
    lambda m: edit_json(m / 'prior' / 'config.json', num_layers=3),
    ['transformer_blocks.2', 'missing'],
  ),
  'no weights': (lambda m: (m / 'prior' / NET).unlink(), ['prior has no weights', NET]),
  'a tensor missing': (
    lambda m: edit_tensors(m / 'prior' / NET, lambda t: t.pop('clip_std')),
    ['prior/clip_std is missing'],
  ),
  'a tensor more': (
    lambda m: edit_tensors(m / 'decoder' / NET, lambda t: t.update(extra=np.ones(3, 'f'))),
    ['decoder/extra is not known'],
  ),
  'a tensor by another name': (
    lambda m: edit_tensors(
      m / 'text_proj' / NET, lambda t: rename(t, 'embedding_proj.bias', 'embedding.bias')
    ),
    ['text_proj/embedding_proj.bias is missing'],
  ),
  'a tensor of another shape': (
    lambda m: edit_tensors(m / 'super_res_last' / NET, put('conv_out.bias', lambda x: x[:2])),
    ['super_res_last/conv_out.bias of shape [2]', 'final_unet.conv_out.bias of shape [3]'],
  ),
  'a tensor of other axes': (
    lambda m: edit_tensors(m / 'decoder' / NET, put('conv_in.weight', lambda x: x[0])),
    ['decoder/conv_in.weight of shape [3, 3, 3]'],
  ),
  'a tensor of whole numbers': (
    lambda m: edit_tensors(m / 'prior' / NET, put('clip_std', lambda x: x.astype(np.int32))),
    ['prior/clip_std is of type int32'],
  ),
  'a decoder without its embedding': (
    lambda m: edit_json(m / 'decoder' / 'config.json', class_embed_type=None),
    ["class_embed_type is None: only 'identity'"],
  ),
  'no heads': (
    lambda m: edit_json(m / 'prior' / 'config.json', num_attention_heads=0),
    ['num_attention_heads is 0'],
  ),
  'a NaN': (
    lambda m: edit_tensors(m / 'decoder' / NET, put('conv_in.weight', with_nan)),
    ['decoder/conv_in.weight holds a NaN'],
  ),
  'a file cut short': (lambda m: cut(m / 'prior' / NET, 5000), [NET, 'cut short']),
  'an index that leads outside': (
    lambda m: to_shards(m / 'prior', '../decoder/' + NET),
    ['only files inside of the folder are read'],
  ),
  'an index of a shard that is not there': (
    lambda m: to_shards(m / 'prior', 'other.safetensors'),
    ['other.safetensors'],
  ),
  'a pickle that would run code': (
    lambda m: to_pickle(m / 'prior', {'x': Payload(m / 'evil')}),
    ['refused', 'diffusion_pytorch_model.bin'],
  ),
  'no tokenizer': (lambda m: shutil.rmtree(m / 'tokenizer'), ['tokenizer']),
  'another CLIP': (
    lambda m: edit_json(m / 'text_encoder' / 'config.json', layer_norm_eps=1e-6),
    ['layer_norm_eps is 1e-06'],
  ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_folder_is_named(capsys, pristine, tmp_path, damage):
  change, parts = DAMAGES[damage]
  folder = Path(shutil.copytree(pristine, tmp_path / 'model'))
  change(folder)
  before = sorted(tmp_path.rglob('*'))
  line = complaint(
    capsys, 'generate', 'a cat', '--model', folder, '--out', tmp_path / 'out', '--no-cache'
  )
  assert str(folder) in line
  for part in parts:
    assert part in line, line
  assert sorted(tmp_path.rglob('*')) == before
