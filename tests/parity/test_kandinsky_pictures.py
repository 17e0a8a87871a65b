"""Kandinsky's folders, opened: from caption to picture what diffusers makes of the same noise."""

import dataclasses

import kandinsky_twin
import karlo_twin
import loop_noise
import numpy as np
import pytest
import torch
import twins
from diffusers.schedulers import scheduling_ddpm, scheduling_unclip

import unclip_jax
from unclip_jax import Sampling
from unclip_jax.diffusion.schedule import cosine_schedule
from unclip_jax.systems import programs
from unclip_jax.systems.convert import convert
from unclip_jax.types import UnclipError

PROMPTS = ['a red cat', 'the quick brown fox, 3d']
PRIOR_STEPS, STEPS = 5, 6
SETTINGS = {'prior': Sampling(num_steps=PRIOR_STEPS), 'decoder': Sampling(num_steps=STEPS)}


@pytest.fixture(scope='module', params=['2.1', '2.2'])
def kandinsky(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('kandinsky')
  return request.param, folder, *kandinsky_twin.make_pipelines(folder, request.param)


def asked(part, num_steps):
  return dataclasses.replace(part, sampling=dataclasses.replace(part.sampling, num_steps=num_steps))


def with_float64_tables(pipeline):
  """As those of Karlo's test, which says why."""
  alpha_bar = torch.from_numpy(cosine_schedule(1000).alpha_bar.copy())
  scheduler = pipeline.scheduler
  scheduler.alphas_cumprod = alpha_bar
  scheduler.alphas = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
  scheduler.betas = 1 - scheduler.alphas


def draw_with_diffusers(kandinsky, model, samples, seed, monkeypatch, negative=None):
  version, _, prior, decoder, _ = kandinsky
  config, start = model.config, samples.start_noise
  width = config.clip.embed_dim
  of_prior = asked(config.prior, PRIOR_STEPS)
  noise = loop_noise.of_stage(samples, seed, programs.PRIOR, of_prior, (width,))
  latents = karlo_twin.to_torch(start.prior[:, 0])
  if negative is not None:
    # diffusers draws both embeddings in one batch.
    stage = programs.NEGATIVE_PRIOR
    second = loop_noise.of_stage(samples, seed, stage, of_prior, (width,))
    noise = [torch.cat(pair) for pair in zip(noise, second, strict=True)]
    latents = torch.cat([latents, loop_noise.start_of_prior(samples, seed, stage, width)])
  left = loop_noise.give(monkeypatch, scheduling_unclip, noise)
  with_float64_tables(prior)
  z_i, null_z_i = prior(
    list(samples.prompts),
    negative_prompt=None if negative is None else [negative] * len(samples.prompts),
    latents=latents.float(),
    num_inference_steps=PRIOR_STEPS,
    return_dict=False,
  )
  assert next(left, None) is None
  assert twins.deviation(samples.z_i, z_i) < 1e-4
  shape = start.decoder.shape[1:]
  noise = loop_noise.of_stage(samples, seed, programs.DECODER, asked(config.decoder, STEPS), shape)
  left = loop_noise.give(monkeypatch, scheduling_ddpm, noise)
  captions = {}
  if version == '2.1':
    captions = {'prompt': list(samples.prompts)}
    if negative is not None:
      captions['negative_prompt'] = [negative] * len(samples.prompts)
  size = shape[0] * config.autoencoder.factor
  images = decoder(
    **captions,
    image_embeds=z_i,
    negative_image_embeds=null_z_i,
    height=size,
    width=size,
    num_inference_steps=STEPS,
    latents=karlo_twin.to_torch(start.decoder),
    output_type='np',
  ).images
  if version == '2.2':  # 2.1 is sampled by DDIM, which draws none
    assert next(left, None) is None
  return images


@pytest.mark.parametrize('negative', [None, 'the red'])
def test_pictures_of_captions_are_those_of_diffusers(kandinsky, negative, monkeypatch):
  _, folder, *_ = kandinsky
  model = unclip_jax.load(folder / 'decoder', prior=folder / 'prior')
  samples = model.sample(PROMPTS, seed=3, negative_prompt=negative, **SETTINGS)
  images = draw_with_diffusers(kandinsky, model, samples, 3, monkeypatch, negative)
  assert samples.images.std() > 20 and images.shape == samples.images.shape
  worst = np.abs(samples.images / 255 - images).max()
  print(f'{worst * 255:.2f} levels')
  assert worst < 2 / 255


def test_both_pipelines_in_one_folder_are_the_same_model(kandinsky):
  _, folder, *_ = kandinsky
  two = unclip_jax.load(folder / 'decoder', prior=folder / 'prior')
  one = unclip_jax.load(folder / 'combined')
  assert one.config == two.config and list(one.params) == list(two.params)
  images = [model.generate(PROMPTS[:1], seed=1, **SETTINGS) for model in (one, two)]
  np.testing.assert_array_equal(*images)


def test_variations_of_a_picture_and_other_sizes(kandinsky):
  _, folder, *_ = kandinsky
  model = unclip_jax.load(folder / 'combined')
  picture = np.random.default_rng(0).integers(256, size=(1, 30, 25, 3), dtype=np.uint8)
  z_i = model.encode_image(picture)
  factor = model.config.autoencoder.factor * 2 ** (len(model.config.decoder.unet.multipliers) - 1)
  samples = model.sample('', z_i=z_i, size=3 * factor, decoder=SETTINGS['decoder'])
  assert samples.images.shape == (1, 3 * factor, 3 * factor, 3)
  np.testing.assert_array_equal(samples.z_i, z_i)
  whole = model.sample('', z_i=z_i, tile=1024, decoder=SETTINGS['decoder'])
  assert np.array_equal(whole.images, model.sample('', z_i=z_i, decoder=SETTINGS['decoder']).images)
  with pytest.raises(UnclipError, match=f'multiples of {factor} pixels'):
    model.sample('', z_i=z_i, size=factor + 1)


def test_what_is_written_for_diffusers_is_what_was_read(kandinsky, tmp_path):
  _, folder, *_ = kandinsky
  convert(folder / 'decoder', tmp_path / 'ours', 'unclip', prior=folder / 'prior')
  convert(tmp_path / 'ours', tmp_path / 'theirs', 'diffusers')
  expected = twins.tensors_in(folder / 'combined')
  written = twins.tensors_in(tmp_path / 'theirs')
  assert written.keys() == expected.keys()
  for key, tensor in expected.items():
    np.testing.assert_array_equal(written[key], tensor, str(key))
  models = [unclip_jax.load(tmp_path / name) for name in ('ours', 'theirs')]
  images = [model.generate(PROMPTS[:1], seed=1, **SETTINGS) for model in models]
  np.testing.assert_array_equal(*images)


def test_a_prior_alone_encodes_and_draws_nothing(kandinsky):
  _, folder, *_ = kandinsky
  model = unclip_jax.load(folder / 'prior')
  assert list(model.params) == ['clip', 'prior']
  assert model.encode_text(PROMPTS).shape == (2, model.config.clip.embed_dim)
  with pytest.raises(UnclipError, match='no decoder'):
    model.generate(PROMPTS)


def test_a_decoder_asks_for_its_prior(kandinsky):
  version, folder, *_ = kandinsky
  named = f'kandinsky-{version.replace(".", "-")}-prior'
  with pytest.raises(UnclipError, match=f'give its prior as well.*{named}'):
    unclip_jax.load(folder / 'decoder')
  with pytest.raises(UnclipError, match='a prior is taken from'):
    unclip_jax.load(folder / 'decoder', prior=folder / 'decoder')
