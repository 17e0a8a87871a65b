"""Kandinsky's folders: configs and tensors as diffusers has them, there and back."""

import dataclasses
import shutil

import diffusers
import jax
import kandinsky_twin
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.numpy import load_file, save_file

from unclip_jax.config_json import override
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.presets import preset
from unclip_jax.systems.loading import expected_params
from unclip_jax.types import UnclipError
from unclip_jax.weights import kandinsky
from unclip_jax.weights.foreign_folder import Components, open_components, read_components
from unclip_jax.weights.rules import read_params, write_tensors

PROMPTS = ['a red cat, the', 'xyz']


@pytest.fixture(scope='module', params=kandinsky_twin.CONFIGS)
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('kandinsky')
  kandinsky_twin.make_pipelines(folder, request.param)
  return folder / 'combined', request.param


def open_components_of(folder):
  """The components of a pipeline, by the names of the combined one."""
  name, found = read_components(epath.Path(folder))
  if name in kandinsky.PRIOR_NAMES:
    return Components({ours: found[its] for ours, its in kandinsky.PRIOR_COMPONENTS.items()})
  assert name in kandinsky.NAMES
  return found


def read_stages(config, components):
  """The parameters of each stage, and the tensors written back from them."""
  stages, expected = kandinsky.rules(config), expected_params(config)
  assert stages.keys() == expected.keys()
  params, written = {}, {}
  for stage, (names, rules) in stages.items():
    with open_components({name: components[name] for name in names}) as tensors:
      params[stage] = read_params(tensors, rules, expected[stage], stage, kandinsky.IGNORED)
    for name, tensor in write_tensors(params[stage], rules).items():
      assert name not in written
      written[name] = tensor
  return params, written


def parts_of(config):
  """What a prior's folder holds of a config, and what a decoder's."""
  prior = dataclasses.replace(config, decoder=None, decoder_text=None, autoencoder=None)
  return prior, dataclasses.replace(config, clip=None, prior=None)


def test_configs_of_one_folder_and_of_two(folder):
  config = kandinsky_twin.CONFIGS[folder[1]]
  prior, decoder = parts_of(config)
  for kind, expected in (('combined', config), ('prior', prior), ('decoder', decoder)):
    assert kandinsky.read_config(open_components_of(folder[0].parent / kind)) == expected


def test_every_tensor_is_read_and_written_once(folder):
  path, version = folder
  config = kandinsky_twin.CONFIGS[version]
  params, written = read_stages(config, open_components_of(path))
  expected = {
    f'{file.parent.name}/{name}': tensor
    for file in path.rglob('*.safetensors')
    for name, tensor in load_file(file).items()
  }
  assert written.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(written[name], tensor, name, strict=True)
  for kind, part in zip(('prior', 'decoder'), parts_of(config), strict=True):
    of_part, _ = read_stages(part, open_components_of(path.parent / kind))
    jax.tree.map(np.testing.assert_array_equal, of_part, {name: params[name] for name in of_part})


def write_folder(config, written, tokenizers, out):
  """The folder that diffusers is to open."""
  classes = [tokenizers[name].transformers_class for name in sorted(tokenizers, reverse=True)]
  end_id = tokenizers['prior_tokenizer'].end_id
  files = kandinsky.write_configs(config, classes[-1], end_id, *classes[:-1])
  for path, values in files.items():
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    kandinsky_twin.write_json(out / path, values)
  for component in {name.partition('/')[0] for name in written}:
    tensors = {k.partition('/')[2]: x for k, x in written.items() if k.startswith(f'{component}/')}
    is_transformers = component in kandinsky.OF_TRANSFORMERS
    stem = 'model' if is_transformers else 'diffusion_pytorch_model'
    save_file(tensors, out / component / f'{stem}.safetensors', {'format': 'pt'})
  for name, tokenizer in tokenizers.items():
    tokenizer.save_transformers(out / name)


def test_what_is_written_opens_in_diffusers(folder, tmp_path):
  path, version = folder
  config, components = kandinsky_twin.CONFIGS[version], open_components_of(path)
  _, written = read_stages(config, components)
  tokenizers = {'prior_tokenizer': Tokenizer.from_transformers(components['prior_tokenizer'])}
  if version == '2.1':
    tokenizers['tokenizer'] = Tokenizer.from_xlm_roberta(components['tokenizer'])
  write_folder(config, written, tokenizers, tmp_path)
  assert kandinsky.read_config(open_components_of(tmp_path)) == config
  ours, theirs = (diffusers.DiffusionPipeline.from_pretrained(each) for each in (tmp_path, path))
  assert type(ours) is type(theirs)
  assert ours.components.keys() == theirs.components.keys()
  for name, part in theirs.components.items():
    mine = ours.components[name]
    assert type(mine) is type(part)
    if isinstance(part, torch.nn.Module):
      torch.testing.assert_close(mine.state_dict(), part.state_dict(), rtol=0, atol=0)
    elif 'scheduler' in name:
      assert plain(mine.config) == plain(part.config)
    elif 'tokenizer' in name:
      assert mine(PROMPTS).input_ids == part(PROMPTS).input_ids
    else:
      assert plain(mine.to_dict()) == plain(part.to_dict())


def plain(config):
  """Without what is of diffusers' own books."""
  return {k: v for k, v in config.items() if not k.startswith('_')}


@pytest.fixture
def copy(folder, tmp_path):
  """A copy of the configs."""
  shutil.copytree(folder[0], tmp_path / 'copy', ignore=shutil.ignore_patterns('*.safetensors'))
  return tmp_path / 'copy', folder[1]


def test_a_scheduler_of_fixed_variance_leaves_the_network_as_it_is(copy):
  path, version = copy
  config = kandinsky_twin.CONFIGS[version].decoder
  name = 'scheduler/scheduler_config.json'
  kandinsky_twin.change_json(path / name, _class_name='DDPMScheduler', variance_type='fixed_small')
  read = kandinsky.read_config(open_components_of(path))
  assert read.decoder.diffusion == config.diffusion
  assert (read.decoder.sampling.sampler, read.decoder.sampling.variance) == ('ddpm', 'fixed_small')
  files = kandinsky.write_configs(read, 'CLIPTokenizer', 1, 'XLMRobertaTokenizer')
  assert files[name]['variance_type'] == 'fixed_small'


def test_a_size_that_no_file_tells_is_that_of_the_pipelines(copy):
  kandinsky_twin.change_json(copy[0] / 'unet/config.json', sample_size=None)
  read = kandinsky.read_config(open_components_of(copy[0]))
  assert read.decoder.image_size == 512 // read.autoencoder.factor == 256


UNET, MOVQ, TEXT = (f'{name}/config.json' for name in ('unet', 'movq', 'text_encoder'))
NO_VQ = dict.fromkeys(('num_vq_embeddings', 'vq_embed_dim', 'norm_type'))


@pytest.mark.parametrize(
  ('file', 'changes', 'match'),
  [
    (UNET, {'addition_embed_type': 'image_hint'}, "addition_embed_type is 'image_hint': only"),
    (UNET, {'addition_embed_type': None}, 'addition_embed_type is None: only'),
    (UNET, {'encoder_hid_dim_type': 'text_proj'}, "encoder_hid_dim_type is 'text_proj': only"),
    (UNET, {'encoder_hid_dim_type': None}, 'encoder_hid_dim_type is None: only'),
    (UNET, {'encoder_hid_dim': None}, "the field 'encoder_hid_dim' is missing"),
    (UNET, {'in_channels': 9}, 'in_channels is 9 and out_channels 8: only 4 .* and 8'),
    (UNET, {'out_channels': 4}, 'in_channels is 4 and out_channels 4: only 4 .* and 8'),
    (UNET, {'class_embed_type': 'identity'}, "'class_embed_type'"),
    (UNET, {'mid_block_type': 'UNetMidBlock2DCrossAttn'}, 'mid_block_type is'),
    (UNET, {'time_gate': 3}, "'time_gate'"),
    (UNET, {'_class_name': 'UNet2DModel'}, "_class_name is 'UNet2DModel'"),
    (MOVQ, {'_class_name': 'AutoencoderKL', **NO_VQ}, "of the kind 'kl': Kandinsky has"),
    (MOVQ, {'latent_channels': 5, 'vq_embed_dim': 5}, 'only 5 of the latent and 10'),
    (MOVQ, {'tiles': 2}, "'tiles'"),
    ('scheduler/scheduler_config.json', {'_class_name': 'SomeScheduler'}, "'SomeScheduler'"),
    ('prior_prior/config.json', {'added_emb_type': 'none'}, "added_emb_type is 'none'"),
    ('prior_scheduler/scheduler_config.json', {'beta_schedule': 'linear'}, 'beta_schedule is'),
    ('prior_text_encoder/config.json', {'hidden_act': 'relu'}, "hidden_act is 'relu'"),
    ('prior_image_encoder/config.json', {'projection_dim': 5}, 'projection_dim of the towers'),
  ],
)
def test_fields_that_ours_does_not_know_are_refused(copy, file, changes, match):
  kandinsky_twin.change_json(copy[0] / file, **changes)
  with pytest.raises(UnclipError, match=match) as error:
    kandinsky.read_config(open_components_of(copy[0]))
  assert '\n' not in str(error.value)


def test_files_that_are_missing_or_damaged_are_named(copy):
  path, version = copy
  files = [*path.glob('*/config.json'), *path.glob('*/scheduler_config.json')]
  assert len(files) == 7 + (version == '2.1')
  for file in files:
    text = file.read_text()
    file.write_text(text[:-9])
    with pytest.raises(UnclipError, match=rf'{file} is not valid JSON'):
      kandinsky.read_config(open_components_of(path))
    file.unlink()
    with pytest.raises(UnclipError, match=rf'{file} is missing'):
      kandinsky.read_config(open_components_of(path))
    file.write_text(text)


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('prior', 'prior_text_encoder'),
    ('prior', 'prior_scheduler'),
    ('decoder', 'unet'),
    ('decoder', 'movq'),
    ('decoder', 'scheduler'),
  ],
)
def test_components_that_are_missing_are_named(folder, kind, name):
  components = open_components_of(folder[0].parent / kind)
  del components[name]
  with pytest.raises(UnclipError, match=f'has no component {name!r}'):
    kandinsky.read_config(components)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'decoder': None}, 'its decoder is of another kind'),
    ({'clip': None}, 'it has no CLIP'),
    ({'prior': None}, 'it has no prior'),
    ({'autoencoder': None}, 'it has no autoencoder'),
    ({'upsamplers': preset('karlo').upsamplers}, 'it has upsamplers'),
    ({'decoder_text': None}, 'only one of decoder_text and decoder.text_width is set'),
    (['clip.unit_norm=true'], r'clip\.unit_norm is true'),
    (['prior.unit_norm=true'], r'prior\.unit_norm is true'),
    (['autoencoder.kind=kl'], r'autoencoder\.kind is not vq'),
    (['autoencoder.scaling=0.5'], r'autoencoder\.scaling is not 1'),
    (['decoder.unet.attention_levels=[]'], 'has no attention'),
    (['decoder.diffusion.learned_variance=false'], 'learned_variance is false'),
    (['decoder.num_image_tokens=32'], 'num_image_tokens is not 10'),
    (['decoder.embed_dim=23'], r'decoder\.embed_dim, text_embed_dim and unet\.context_dim differ'),
    (['decoder.text_embed_dim=23'], r'text_embed_dim and unet\.context_dim differ'),
    (['decoder.unet.patch_size=2'], 'patch_size'),
    (['decoder.unet.multipliers=[2,4]'], 'multipliers begin with 2'),
    (['clip.vision=null'], 'no image tower'),
  ],
)
def test_models_that_diffusers_does_not_have_are_not_written(changes, match):
  config = kandinsky_twin.CONFIGS['2.1']
  if isinstance(changes, dict):
    config = dataclasses.replace(config, **changes)
  else:
    config = override(config, changes)
  with pytest.raises(UnclipError, match=match):
    kandinsky.write_configs(config, 'CLIPTokenizer', 49407, 'XLMRobertaTokenizer')
