"""Stable unCLIP's folders against diffusers: networks, noise on z_i, tensors and configs both ways.

What the pipelines share with others is proved elsewhere: the prior, the towers, the autoencoder.
"""

import dataclasses
import functools
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import stable_unclip_twin
import torch
import twins
from etils import epath

from unclip_jax.configs import SamplingConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import decoder, stable_unclip, text_encoder
from unclip_jax.stages.diffusion_prior import Statistics
from unclip_jax.systems import loading
from unclip_jax.systems.checks import check_config
from unclip_jax.types import UnclipError
from unclip_jax.weights import stable_unclip as family
from unclip_jax.weights.foreign_folder import Components, open_components, read_components
from unclip_jax.weights.rules import write_tensors

TOLERANCE = 1e-5
KINDS = pytest.mark.parametrize('kind', stable_unclip_twin.KINDS)
END_ID = 49407
LEVELS = (0, 1, 417, 999)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """The folder; pipeline and parts of each kind."""
  folder = tmp_path_factory.mktemp('stable_unclip')
  kinds = stable_unclip_twin.KINDS
  return folder, {kind: stable_unclip_twin.make_pipelines(folder, kind) for kind in kinds}


@pytest.fixture(scope='module')
def opened(models):
  """Config and parameters of each kind, as we read them."""
  return {kind: read_all(models[0] / kind) for kind in stable_unclip_twin.KINDS}


def find_components(folder):
  name, components = read_components(epath.Path(folder))
  assert name in family.NAMES
  return components


def read_config(folder):
  return family.read_config(find_components(folder))


def read_stage(components, config, stage):
  """The tensors of a stage, and its rules."""
  names, rules = family.rules(config)[stage]
  with open_components({name: components[name] for name in names}) as file:
    tensors = {name: file.read(name) for name in file.names()}
    return tensors, rules(file.names()) if callable(rules) else rules


def read_all(folder):
  """The config, and the parameters of all stages; each tensor is used, and once."""
  components = find_components(folder)
  config = family.read_config(components)
  check_config(config)
  expected = loading.expected_params(config)
  params = {
    stage: twins.convert(*read_stage(components, config, stage), expected[stage])
    for stage in family.rules(config)
  }
  assert params.keys() == expected.keys()
  return config, params


def make_inputs(config, batch):
  rng = np.random.default_rng(batch)
  x_t = rng.normal(size=(batch, 6, 10, 4)).astype('f')
  t = np.array([999, 0, 417][:batch])
  states = rng.normal(size=(batch, 7, config.unet.context_dim)).astype('f')
  z_i, noise = rng.normal(size=(2, batch, config.embed_dim)).astype('f')
  return x_t, t, states, z_i, noise


def to_torch(x):
  return torch.from_numpy(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


@functools.partial(jax.jit, static_argnums=0)
def augment(config, params, z_i, noise, level):
  statistics = Statistics(**params['normalizer'])
  return stable_unclip.augment(config, statistics, z_i, level, noise)


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, x_t, t, states, augmented):
  text, network = TextFeatures(None, None, states, None), decoder.make_network(config)
  variables = {'params': params['network']}
  return network.apply(variables, x_t, t, text, augmented, True, method='predict')


@torch.no_grad()  # the normaliser makes parameters anew
def run_twin(pipeline, x_t, t, states, z_i, noise, level):
  """z_i as it is given to the U-Net, and the output."""
  z_i = pipeline.noise_image_embeddings(to_torch(z_i), level, to_torch(noise))
  output = pipeline.unet(to_torch(x_t), to_torch(t), to_torch(states), class_labels=z_i).sample
  return z_i, output.movedim(1, -1)


@KINDS
@pytest.mark.parametrize('level', LEVELS)
def test_decoder_agrees_with_diffusers(models, opened, kind, level):
  pipeline, _ = models[1][kind]
  config, params = opened[kind][0].decoder, opened[kind][1]['decoder']
  x_t, t, states, z_i, noise = make_inputs(config, 3)
  expected, output = run_twin(pipeline, x_t, t, states, z_i, noise, level)
  of_noise = twins.deviation(augment(config, params, z_i, noise, level), expected)
  of_network = twins.deviation(run_ours(config, params, x_t, t, states, expected.numpy()), output)
  print(f'{kind} {level} {of_noise:.1e} {of_network:.1e}')
  # The sine of a large angle: in float32, 999 is known to 6e-5.
  assert of_noise < TOLERANCE + 6e-8 * level
  assert of_network < TOLERANCE


def test_decoder_uses_every_tensor_of_diffusers(models):
  folder, twins_of = models
  pipeline, _ = twins_of['l']
  components = find_components(folder / 'l')
  config = family.read_config(components)
  tensors, rules = read_stage(components, config, 'decoder')
  expected = loading.expected_params(config)['decoder']
  *inputs, z_i, noise = make_inputs(config.decoder, 1)
  level = 700

  def run(changed):
    params = twins.lay_out(changed, rules, expected)
    augmented = augment(config.decoder, params, z_i, noise, level)
    return augmented, run_ours(config.decoder, params, *inputs, augmented)

  outputs = run_twin(pipeline, *inputs, z_i, noise, level)
  twins.check_each_tensor_matters(tensors, run, outputs, 5 * TOLERANCE)


@functools.partial(jax.jit, static_argnums=0)
def encode_text(config, params, ids, mask):
  return [text_encoder.encode(config, params, ids, mask).states]


def test_text_encoder_is_that_of_diffusers(models):
  folder, twins_of = models
  pipeline, _ = twins_of['h']
  components = find_components(folder / 'h')
  config = family.read_config(components)
  tensors, rules = read_stage(components, config, 'decoder_text')
  expected_params = loading.expected_params(config)['decoder_text']
  tokens = pipeline.tokenizer(
    ['a red apple on a table', ''], padding='max_length', return_tensors='pt'
  )
  expected = [pipeline.text_encoder(tokens.input_ids)[0]]
  ids, mask = tokens.input_ids.numpy().astype('i'), tokens.attention_mask.numpy() > 0

  def run(changed):
    params = twins.lay_out(changed, rules, expected_params)
    return encode_text(config.decoder_text, params, ids, mask)

  assert twins.worst_deviation(run(tensors), expected) < TOLERANCE
  # Nothing depends on the bias of the keys, which softmax cancels.
  felt = {name: x for name, x in tensors.items() if not name.endswith('k_proj.bias')}
  keys = {name: x for name, x in tensors.items() if name not in felt}
  assert len(keys) == config.decoder_text.depth
  twins.check_each_tensor_matters(felt, lambda x: run(x | keys), expected, TOLERANCE)


@KINDS
def test_configs_are_those_of_the_folder(models, kind):
  folder, _ = models
  config = read_config(folder / kind)
  assert (config.prior is None) == (config.clip.text is None) == (kind == 'h')
  assert (config.clip.vision is None) == (kind == 'l')
  part = config.decoder
  assert config.clip.embed_dim == part.embed_dim == stable_unclip_twin.EMBED_DIMS[kind]
  assert (part.image_size, part.noise_level, config.autoencoder.kind) == (6, 0, 'kl')
  assert part.z_i_diffusion.schedule == 'cosine' and part.z_i_diffusion.num_steps == 1000
  assert config.decoder_text.mlp_activation == 'gelu'
  by_kind = {
    'l': SamplingConfig(20, 'ddim', 'leading', offset=1, to_x_0=False, guidance_scale=10.0),
    'h': SamplingConfig(20, 'ddim', 'trailing', guidance_scale=10.0),
  }
  assert part.sampling == by_kind[kind]
  if kind == 'l':
    assert config.prior.sampling == SamplingConfig(25, 'ddpm', 'leading', guidance_scale=4.0)
    assert config.prior.diffusion.clip_x_0 == 5.0
  else:
    assert part.diffusion.keep_eps and part.diffusion.clip_x_0 == 3.0


def write_folder(out, config, params, tokenizers):
  """A folder of diffusers of a model of ours, as `convert` writes it."""
  files = {}
  for stage, (_, rules) in family.rules(config).items():
    rules = rules(()) if callable(rules) else rules
    for name, tensor in write_tensors(params[stage], rules).items():
      component, _, rest = name.partition('/')
      files.setdefault(component, {})[rest] = tensor
  for path, values in family.write_configs(config, 'CLIPTokenizer', END_ID).items():
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_text(json.dumps(values))
  for component, tensors in files.items():
    stem = 'model' if component in family.OF_TRANSFORMERS else 'diffusion_pytorch_model'
    path = out / component / f'{stem}.safetensors'
    safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  for tokenizer in tokenizers:
    shutil.copytree(tokenizer, out / tokenizer.name)


@KINDS
def test_diffusers_opens_what_is_written(models, opened, kind, tmp_path):
  folder, twins_of = models
  pipeline, parts = twins_of[kind]
  tokenizers = list((folder / kind).glob('*tokenizer'))
  config, params = opened[kind]
  write_folder(tmp_path, config, params, tokenizers)
  assert read_config(tmp_path) == config
  # transformers' processors of images want torchvision.
  left_out = {'feature_extractor': None} if kind == 'h' else {}
  again = type(pipeline).from_pretrained(tmp_path, **left_out)
  assert again.components.keys() == pipeline.components.keys()
  for name, part in parts.items():
    other = getattr(again, name)
    assert type(other) is type(part)
    if isinstance(part, torch.nn.Module):
      expected, written = part.state_dict(), other.state_dict()
      assert written.keys() == expected.keys()
      assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())


def test_a_folder_with_both_pipelines_keeps_all_components(opened, tmp_path):
  (config, params), (variation, _) = opened['l'], opened['h']
  clip = dataclasses.replace(config.clip, vision=variation.clip.vision)
  both = dataclasses.replace(config, clip=clip)
  towers = jax.tree.map(lambda x: jnp.ones(x.shape), loading.expected_params(both)['clip'])
  write_folder(tmp_path, both, {**params, 'clip': towers}, ())
  name, components = read_components(epath.Path(tmp_path))
  # Both are named, as the pipeline for variations opens no folder whose index leaves its parts out.
  assert name == family.TEXT_TO_IMAGE and components.keys() >= set(family.EXTRA)
  assert family.read_config(components) == both
  # Without the prior it is the pipeline for variations, and the text tower stays where it is.
  written = family.write_configs(dataclasses.replace(both, prior=None), 'CLIPTokenizer', END_ID)
  assert written['model_index.json']['_class_name'] == family.VARIATION
  assert 'prior_text_encoder' not in written['model_index.json']
  assert 'prior_text_encoder/config.json' in written


def test_a_prior_of_karlos_folder_is_sampled_as_karlo_does(models, tmp_path):
  components = Components(find_components(models[0] / 'l'))
  scheduler = diffusers.UnCLIPScheduler(prediction_type='sample', clip_sample_range=5.0)
  scheduler.save_config(tmp_path)
  components['prior_scheduler'] = epath.Path(tmp_path)
  config = family.read_config(components)
  assert config.prior.sampling == SamplingConfig(25, 'ddpm', 'karlo', guidance_scale=4.0)
  written = family.write_configs(config, 'CLIPTokenizer', END_ID)
  assert written['prior_scheduler/scheduler_config.json']['timestep_spacing'] == 'linspace'


def test_names_of_older_files_are_read(models, tmp_path):
  """Those of Stable Diffusion 2.1's own files, and of diffusers and transformers today."""
  components = Components(find_components(models[0] / 'l'))
  config = family.read_config(components)
  new, old = ('to_q', 'to_k', 'to_v', 'to_out.0'), ('query', 'key', 'value', 'proj_attn')
  for stage, part, stem in (
    ('autoencoder', 'vae', 'diffusion_pytorch_model'),
    ('decoder_text', 'text_encoder', 'model'),
  ):
    path = components[part] / f'{stem}.safetensors'
    tensors = safetensors.numpy.load_file(path)
    renamed = tensors
    if stage == 'decoder_text':
      assert 'final_layer_norm.weight' in tensors
      renamed = {f'text_model.{name}': tensor for name, tensor in tensors.items()}
    else:
      for before, after in zip(new, old, strict=True):
        renamed = {name.replace(before, after): tensor for name, tensor in renamed.items()}
    assert renamed.keys() != tensors.keys()
    (tmp_path / part).mkdir()
    safetensors.numpy.save_file(renamed, tmp_path / part / path.name)
    expected = loading.expected_params(config)[stage]
    today = twins.convert(*read_stage(components, config, stage), expected)
    components[part] = epath.Path(tmp_path / part)
    then = twins.convert(*read_stage(components, config, stage), expected)
    jax.tree.map(np.testing.assert_array_equal, then, today)


@pytest.mark.parametrize(
  ('path', 'change', 'message'),
  [
    ('unet/config.json', {'sample_size': [6, 8]}, 'sample_size'),
    ('unet/config.json', {'out_channels': 8}, 'out_channels'),
    ('unet/config.json', {'class_embed_type': None}, 'projection_class_embeddings_input_dim is 0'),
    ('unet/config.json', {'act_fn': 'relu'}, 'act_fn'),
    (
      'image_normalizer/config.json',
      {'embedding_dim': 23},
      'projection_class_embeddings_input_dim',
    ),
    ('image_normalizer/config.json', {'_class_name': 'Other'}, '_class_name'),
    (
      'vae/config.json',
      {'_class_name': 'VQModel', 'use_quant_conv': None, 'use_post_quant_conv': None},
      '_class_name',
    ),
    ('text_encoder/config.json', {'hidden_act': 'relu'}, 'hidden_act'),
    ('scheduler/scheduler_config.json', {'timestep_spacing': 'linspace'}, 'timestep_spacing'),
    (
      'scheduler/scheduler_config.json',
      {'_class_name': 'DDPMScheduler', 'variance_type': 'learned_range'},
      'variance_type',
    ),
    ('image_noising_scheduler/scheduler_config.json', {'_class_name': 'X'}, '_class_name'),
    ('prior_scheduler/scheduler_config.json', {'beta_schedule': 'sigmoid'}, 'beta_schedule'),
  ],
)
def test_bad_fields_are_named(models, tmp_path, path, change, message):
  folder = shutil.copytree(
    models[0] / 'l', tmp_path / 'model', ignore=shutil.ignore_patterns('*.safetensors')
  )
  values = json.loads((folder / path).read_text())
  (folder / path).write_text(json.dumps(values | change))
  with pytest.raises(UnclipError, match=message) as caught:
    read_config(folder)
  assert '\n' not in str(caught.value) and path.partition('/')[0] in str(caught.value)


@pytest.mark.parametrize('name', ['unet', 'vae', 'text_encoder', 'image_normalizer'])
def test_a_component_that_is_missing_is_named(models, name):
  components = Components(find_components(models[0] / 'l'))
  del components[name]
  with pytest.raises(UnclipError, match=f'no component {name!r}'):
    family.read_config(components)


@pytest.mark.parametrize(
  ('part', 'change', 'message'),
  [
    ('clip', {'unit_norm': True}, 'clip.unit_norm'),
    ('clip', None, 'no CLIP'),
    ('clip', {'text': None}, 'no text tower'),
    ('prior', {'unit_norm': True}, 'prior.unit_norm'),
    ('prior', None, 'neither a prior nor an image tower'),
    ('autoencoder', {'kind': 'vq'}, 'no autoencoder'),
    ('decoder', None, 'decoder is of another kind'),
    ('decoder_text', None, 'no text encoder'),
  ],
)
def test_what_stable_unclip_does_not_have_is_not_written(models, part, change, message):
  config = read_config(models[0] / 'l')
  value = None if change is None else dataclasses.replace(getattr(config, part), **change)
  with pytest.raises(UnclipError, match=message):
    family.write_configs(dataclasses.replace(config, **{part: value}), 'CLIPTokenizer', END_ID)
