"""Karlo's folders, opened: from caption to picture what diffusers makes of the same noise."""

import shutil

import diffusers
import karlo_twin
import loop_noise
import numpy as np
import pytest
import tiny_model
import torch
import twins
from diffusers.schedulers import scheduling_unclip

import unclip_jax
from experiments.bench_sampling import TINY_KARLO_CONFIG
from unclip_jax.diffusion.schedule import cosine_schedule
from unclip_jax.systems import programs
from unclip_jax.systems.convert import convert

PROMPTS = ['a red apple on a table', 'the quick brown fox, 3d']


@pytest.fixture(scope='module')
def karlo(tmp_path_factory):
  folder = tmp_path_factory.mktemp('karlo')
  return folder, *karlo_twin.make_pipelines(folder)


def noise_of(model, samples, seed):
  """The noise of all stages, in the order of the steps."""
  config, start = model.config, samples.start_noise
  stages = [
    (programs.DECODER, config.decoder, start.decoder.shape[1:]),
    (programs.UPSAMPLER, config.upsamplers[0], start.upsamplers[0].shape[1:]),
  ]
  if config.prior is not None:
    stages.insert(0, (programs.PRIOR, config.prior, (config.clip.embed_dim,)))
  return [x for stage in stages for x in loop_noise.of_stage(samples, seed, *stage)]


def run_twin(pipeline, model, samples, seed, monkeypatch, **scales):
  noise = loop_noise.give(monkeypatch, scheduling_unclip, noise_of(model, samples, seed))
  start = samples.start_noise
  images = pipeline(
    list(samples.prompts),
    prior_latents=karlo_twin.to_torch(start.prior[:, 0]),
    decoder_latents=karlo_twin.to_torch(start.decoder),
    super_res_latents=karlo_twin.to_torch(start.upsamplers[0]),
    output_type='np',
    **scales,
  ).images
  assert next(noise, None) is None
  return images


def with_float64_tables(pipeline):
  """diffusers' own are float32: alpha_bar of t = 999 has four digits, and a net that is not trained
  makes six levels of the difference, as it takes most of x_T for signal.
  """
  alpha_bar = torch.from_numpy(cosine_schedule(1000).alpha_bar.copy())
  for name in ('prior', 'decoder', 'super_res'):
    scheduler = getattr(pipeline, f'{name}_scheduler')
    scheduler.alphas_cumprod = alpha_bar
    scheduler.alphas = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    scheduler.betas = 1 - scheduler.alphas


def test_pictures_of_captions_are_those_of_diffusers(karlo, monkeypatch):
  folder, pipeline, _ = karlo
  model = unclip_jax.load(folder / 'text')
  with_float64_tables(pipeline)
  samples = model.sample(PROMPTS, seed=3)
  images = run_twin(pipeline, model, samples, 3, monkeypatch)
  assert samples.images.std() > 20 and images.shape == samples.images.shape
  worst = np.abs(samples.images / 255 - images).max()
  print(f'{worst * 255:.2f} levels')
  assert worst < 2 / 255


def test_variations_of_a_picture_are_those_of_diffusers(karlo, monkeypatch):
  folder, pipeline, parts = karlo
  with_float64_tables(pipeline)
  twin = diffusers.UnCLIPImageVariationPipeline(
    **{name: part for name, part in parts.items() if 'prior' not in name},
    feature_extractor=None,
  )
  twin.set_progress_bar_config(disable=True)
  model = unclip_jax.load(folder / 'variation')
  assert 'prior' not in model.params
  image = np.random.default_rng(0).uniform(-1, 1, size=(2, 20, 20, 3)).astype('f')
  z_i = model.encode_image(image)
  mean, std = (np.float32(karlo_twin.PREPROCESSOR[f'image_{name}']) for name in ('mean', 'std'))
  pixels = karlo_twin.to_torch((((image + 1) / 2 - mean) / std).astype('f'))
  expected = parts['image_encoder'](pixels).image_embeds
  assert twins.deviation(np.asarray(z_i), expected) < 1e-5
  samples = model.sample(['', ''], seed=5, z_i=z_i)
  noise = loop_noise.give(monkeypatch, scheduling_unclip, noise_of(model, samples, 5))
  images = twin(
    image=pixels,
    decoder_latents=karlo_twin.to_torch(samples.start_noise.decoder),
    super_res_latents=karlo_twin.to_torch(samples.start_noise.upsamplers[0]),
    output_type='np',
  ).images
  assert next(noise, None) is None
  assert samples.images.std() > 20
  assert np.abs(samples.images / 255 - images).max() < 2 / 255


def test_what_is_written_for_diffusers_is_what_was_read(karlo, tmp_path):
  folder, *_ = karlo
  for name in ('text', 'variation'):
    convert(folder / name, tmp_path / f'our_{name}', 'unclip')
    convert(tmp_path / f'our_{name}', tmp_path / name, 'diffusers')
    expected, written = twins.tensors_in(folder / name), twins.tensors_in(tmp_path / name)
    assert written.keys() == expected.keys()
    for key, tensor in expected.items():
      np.testing.assert_array_equal(written[key], tensor, str(key))
  pipeline = diffusers.UnCLIPPipeline.from_pretrained(tmp_path / 'text')
  for name in ('prior', 'decoder', 'super_res'):
    ours, theirs = (
      dict(getattr(each, f'{name}_scheduler').config) for each in (pipeline, karlo[1])
    )
    assert {k: v for k, v in ours.items() if k[0] != '_'} == {
      k: v for k, v in theirs.items() if k[0] != '_'
    }
  assert pipeline.tokenizer(PROMPTS).input_ids == karlo[1].tokenizer(PROMPTS).input_ids


def test_both_pipelines_open_what_is_written_of_a_model_that_has_all(karlo, tmp_path):
  folder, *_ = karlo
  shutil.copytree(folder / 'text', tmp_path / 'all')
  for name in ('image_encoder', 'feature_extractor'):
    shutil.copytree(folder / 'variation' / name, tmp_path / 'all' / name)
  convert(tmp_path / 'all', tmp_path / 'both', 'diffusers')
  for name in ('UnCLIPPipeline', 'UnCLIPImageVariationPipeline'):
    getattr(diffusers, name).from_pretrained(tmp_path / 'both')


def test_a_model_of_ours_runs_in_diffusers(tmp_path, monkeypatch):
  """One of the architecture of Karlo, with the tokenizer and the sizes of the tiny preset."""
  config = TINY_KARLO_CONFIG
  tiny_model.write_tiny_model(tmp_path / 'ours', config)
  convert(tmp_path / 'ours', tmp_path / 'theirs', 'diffusers')
  pipeline = diffusers.UnCLIPPipeline.from_pretrained(tmp_path / 'theirs')
  pipeline.set_progress_bar_config(disable=True)
  with_float64_tables(pipeline)
  model = unclip_jax.load(tmp_path / 'ours')
  samples = model.sample(['a cat', 'red'], seed=1)
  steps = {
    'prior_num_inference_steps': config.prior.sampling.num_steps,
    'decoder_num_inference_steps': config.decoder.sampling.num_steps,
    'super_res_num_inference_steps': config.upsamplers[0].sampling.num_steps,
    'prior_guidance_scale': config.prior.sampling.guidance_scale,
    'decoder_guidance_scale': config.decoder.sampling.guidance_scale,
  }
  images = run_twin(pipeline, model, samples, 1, monkeypatch, **steps)
  assert samples.images.std() > 20
  assert np.abs(samples.images / 255 - images).max() < 2 / 255
