"""Stable unCLIP's folders, opened: pictures of captions and variations are those of diffusers."""

import dataclasses
import json
import shutil

import diffusers
import jax
import karlo_twin
import loop_noise
import numpy as np
import pytest
import stable_unclip_twin
import torch
import twins
from diffusers.pipelines.stable_diffusion import (
  pipeline_stable_unclip,
  pipeline_stable_unclip_img2img,
)
from diffusers.schedulers import scheduling_ddpm

import unclip_jax
from unclip_jax import Sampling
from unclip_jax.diffusion import samplers
from unclip_jax.diffusion.schedule import cosine_schedule, linear_schedule
from unclip_jax.systems import programs
from unclip_jax.systems.convert import convert
from unclip_jax.types import UnclipError

PROMPTS = ['a red cat', 'the quick brown fox, 3d']
PRIOR_STEPS, STEPS = 5, 5  # numbers that divide 1,000: DDIM of diffusers steps by 1000 // n
SIZE = 16  # theirs have to be multiples of 8
DECODER = Sampling(num_steps=STEPS)


@pytest.fixture(scope='module', params=stable_unclip_twin.KINDS)
def stable_unclip(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('stable_unclip')
  return (
    request.param,
    folder / request.param,
    *stable_unclip_twin.make_pipelines(folder, request.param),
  )


OF_CAPTIONS = pytest.mark.parametrize('stable_unclip', ['l'], indirect=True)
OF_PICTURES = pytest.mark.parametrize('stable_unclip', ['h'], indirect=True)


def noise_of_z_i(samples, seed):
  keys = programs.image_keys(np.uint32(seed), samples.indices.astype(np.uint32))
  keys = programs.stage_keys(keys, stage=programs.DECODER)
  keys = jax.vmap(lambda key: jax.random.fold_in(key, programs.Z_I_NOISE))(keys)
  return karlo_twin.to_torch(np.asarray(samplers.start_noise(keys, samples.z_i.shape[1:])))


def with_float64_tables(scheduler, schedule):
  """As those of Karlo's test, which says why."""
  alpha_bar = torch.from_numpy(schedule.alpha_bar.copy())
  scheduler.alphas_cumprod = alpha_bar
  scheduler.alphas = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
  scheduler.betas = 1 - scheduler.alphas


@OF_CAPTIONS
@pytest.mark.parametrize('noise_level', [0, 700])
def test_pictures_of_captions_are_those_of_diffusers(stable_unclip, noise_level, monkeypatch):
  _, folder, pipeline, _ = stable_unclip
  model = unclip_jax.load(folder)
  prior = Sampling(num_steps=PRIOR_STEPS)
  samples = model.sample(
    PROMPTS, seed=3, prior=prior, decoder=DECODER, noise_level=noise_level, size=SIZE
  )
  part = model.config.prior
  part = dataclasses.replace(
    part, sampling=dataclasses.replace(part.sampling, num_steps=PRIOR_STEPS)
  )
  width = (part.embed_dim,)
  drawn = loop_noise.of_stage(samples, 3, programs.PRIOR, part, width)
  left = loop_noise.give(monkeypatch, scheduling_ddpm, drawn)
  loop_noise.give(monkeypatch, pipeline_stable_unclip, [noise_of_z_i(samples, 3)])
  with_float64_tables(pipeline.prior_scheduler, cosine_schedule(1000))
  images = pipeline(
    PROMPTS,
    num_inference_steps=STEPS,
    prior_num_inference_steps=PRIOR_STEPS,
    prior_latents=karlo_twin.to_torch(samples.start_noise.prior[:, 0]),
    latents=karlo_twin.to_torch(samples.start_noise.decoder),
    noise_level=noise_level,
    height=SIZE,
    width=SIZE,
    output_type='np',
  ).images
  assert next(left, None) is None
  assert samples.images.std() > 20 and images.shape == samples.images.shape
  worst = np.abs(samples.images / 255 - images).max()
  print(f'{worst * 255:.2f} levels')
  assert worst < 2 / 255


@OF_PICTURES
@pytest.mark.parametrize('negative', [None, 'the red'])
def test_variations_of_a_picture_are_those_of_diffusers(stable_unclip, negative, monkeypatch):
  _, folder, pipeline, parts = stable_unclip
  compare_variations(folder, pipeline, parts, negative, monkeypatch)


@OF_PICTURES
@pytest.mark.parametrize(
  ('cls', 'options'),
  [
    (
      diffusers.PNDMScheduler,
      {'skip_prk_steps': True, 'steps_offset': 1, 'timestep_spacing': 'leading'},
    ),
    (diffusers.DPMSolverMultistepScheduler, {}),
    (diffusers.UniPCMultistepScheduler, {}),
  ],
)
@pytest.mark.filterwarnings('ignore:__array__ implementation')  # how diffusers makes arrays
def test_variations_by_other_solvers_are_those_of_diffusers(
  stable_unclip, cls, options, monkeypatch, tmp_path
):
  _, folder, pipeline, parts = stable_unclip
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  monkeypatch.setattr(pipeline, 'scheduler', cls.from_config(pipeline.scheduler.config, **options))
  pipeline.scheduler.save_config(tmp_path / 'scheduler')
  compare_variations(tmp_path, pipeline, parts, None, monkeypatch)


def compare_variations(folder, pipeline, parts, negative, monkeypatch):
  model = unclip_jax.load(folder)
  assert 'prior' not in model.params and model.tokenizer is None
  image = np.random.default_rng(0).uniform(-1, 1, size=(2, 20, 20, 3)).astype('f')
  z_i = model.encode_image(image)
  mean, std = (np.float32(stable_unclip_twin.PREPROCESSOR[f'image_{k}']) for k in ('mean', 'std'))
  expected = parts['image_encoder'](
    karlo_twin.to_torch((((image + 1) / 2 - mean) / std).astype('f'))
  )
  assert twins.deviation(np.asarray(z_i), expected.image_embeds) < 1e-5
  samples = model.sample(
    PROMPTS,
    seed=5,
    z_i=z_i,
    noise_level=40,
    negative_prompt=negative,
    decoder=DECODER,
    size=SIZE,
  )
  loop_noise.give(monkeypatch, pipeline_stable_unclip_img2img, [noise_of_z_i(samples, 5)])
  with_float64_tables(pipeline.scheduler, linear_schedule(1000))
  images = pipeline(
    prompt=PROMPTS,
    negative_prompt=None if negative is None else [negative] * 2,
    image_embeds=expected.image_embeds,
    num_inference_steps=STEPS,
    latents=karlo_twin.to_torch(samples.start_noise.decoder),
    noise_level=40,
    height=SIZE,
    width=SIZE,
    output_type='np',
  ).images
  assert samples.images.std() > 20
  assert np.abs(samples.images / 255 - images).max() < 2 / 255


def test_the_prior_of_karlo_is_taken(tmp_path):
  """Public Stable unCLIP of ViT-L/14 comes without a prior, and Karlo's is of the same CLIP."""
  karlo_twin.make_pipelines(tmp_path / 'karlo', embed_dim=24)
  _, parts = stable_unclip_twin.make_pipelines(tmp_path, 'l')
  own = {k: v for k, v in parts.items() if not k.startswith('prior')}
  for name, part in own.items():
    part.save_pretrained(tmp_path / 'own' / name)
  stable_unclip_twin.make_clip(24, 0)['image_encoder'].save_pretrained(
    tmp_path / 'own' / 'image_encoder'
  )
  classes = {name: ['diffusers', type(part).__name__] for name, part in own.items()}
  classes['image_encoder'] = ['transformers', 'CLIPVisionModelWithProjection']
  index = {'_class_name': 'StableUnCLIPImg2ImgPipeline', **classes}
  (tmp_path / 'own' / 'model_index.json').write_text(json.dumps(index))
  model = unclip_jax.load(tmp_path / 'own', prior=tmp_path / 'karlo' / 'text')
  alone = unclip_jax.load(tmp_path / 'karlo' / 'text')
  for prompt in PROMPTS:
    z_i = [m.sample(prompt, decoder=Sampling(num_steps=1)).z_i for m in (model, alone)]
    np.testing.assert_allclose(*z_i, rtol=1e-5, atol=1e-5)
  assert model.config.clip.vision is not None and model.config.clip.text is not None
  convert(tmp_path / 'own', tmp_path / 'both', 'diffusers', prior=tmp_path / 'karlo' / 'text')
  for name in ('StableUnCLIPPipeline', 'StableUnCLIPImg2ImgPipeline'):
    getattr(diffusers, name).from_pretrained(tmp_path / 'both')


def test_what_is_written_for_diffusers_is_what_was_read(stable_unclip, tmp_path):
  _, folder, *_ = stable_unclip
  convert(folder, tmp_path / 'ours', 'unclip')
  convert(tmp_path / 'ours', tmp_path / 'theirs', 'diffusers')
  # What is written has the names of the public files, which transformers 5 writes no more.
  expected = {
    (part, f'text_model.{name}' if part == 'text_encoder' else name): tensor
    for (part, name), tensor in twins.tensors_in(folder).items()
  }
  written = twins.tensors_in(tmp_path / 'theirs')
  assert written.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(written[key], tensor, str(key))
  for part in ('text_encoder', 'unet', 'vae'):
    configs = [
      json.loads((at / part / 'config.json').read_text()) for at in (folder, tmp_path / 'theirs')
    ]
    # Without it transformers finds no end of text.
    assert configs[0].get('eos_token_id') == configs[1].get('eos_token_id')
  models = [unclip_jax.load(tmp_path / name) for name in ('ours', 'theirs')]
  z_i = np.linspace(-1, 1, models[0].config.clip.embed_dim, dtype='f')[None]
  images = [model.sample(PROMPTS[:1], seed=1, z_i=z_i, decoder=DECODER).images for model in models]
  np.testing.assert_array_equal(*images)


def test_a_noise_level_that_does_not_exist_is_refused(stable_unclip):
  _, folder, *_ = stable_unclip
  model = unclip_jax.load(folder)
  z_i = np.ones((1, model.config.clip.embed_dim), 'f')
  for level in (-1, 1000, 1.5):
    with pytest.raises(UnclipError, match='noise level'):
      model.sample(PROMPTS[:1], z_i=z_i, noise_level=level)
  if 'prior' not in model.params:
    with pytest.raises(UnclipError, match='has no prior'):
      model.generate(PROMPTS)
