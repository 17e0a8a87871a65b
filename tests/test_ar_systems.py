"""Models with an autoregressive prior: what they draw, their folders, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from processes import in_a_process
from tiny_model import CONFIG, TEXTS, make_params, write_tiny_model

import unclip_jax
from unclip_jax import Sampling, StartNoise, fuse
from unclip_jax.config_json import from_json, override, to_json
from unclip_jax.configs import UnclipConfig
from unclip_jax.measure.hlo import loop_collectives
from unclip_jax.presets import TINY_AR
from unclip_jax.stages import ar_prior, diffusion_prior
from unclip_jax.systems import bench_figures, bench_subject, formats, programs, settings
from unclip_jax.systems.checks import check_config
from unclip_jax.systems.convert import convert
from unclip_jax.systems.stage_calls import record
from unclip_jax.types import UnclipError

AR = override(dataclasses.replace(CONFIG, prior=TINY_AR.prior), ['prior.depth=1'])
DRAW = {'decoder': Sampling(num_steps=2), 'size': 16}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('ar'), AR)


@pytest.fixture(scope='module')
def model(folder):
  return unclip_jax.load(folder)


def test_a_folder_opens_as_it_was_written(folder, model, tmp_path):
  assert model.config == AR
  jax.tree.map(np.testing.assert_array_equal, dict(model.params), make_params(AR))
  convert(folder, tmp_path / 'out', 'unclip', 'bfloat16')
  again = unclip_jax.load(tmp_path / 'out').params['prior']['quantiser']
  assert {leaf.dtype.name for leaf in jax.tree.leaves(again)} == {'float32'}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
    again,
    dict(model.params['prior']['quantiser']),
  )
  with pytest.raises(UnclipError, match='diffusers has no autoregressive prior'):
    convert(folder, tmp_path / 'theirs', 'diffusers')


def test_an_embedding_is_the_best_of_the_candidates_of_its_stage(model):
  scale = 1.5
  asked = {'prior': Sampling(guidance_scale=scale), 'num_candidates': 3}
  samples = model.sample(TEXTS[:1], seed=4, num_images=2, **asked, **DRAW)
  assert samples.images.shape == (2, 16, 16, 3)
  assert samples.start_noise.prior is None
  keys = programs.stage_keys(
    programs.image_keys(np.uint32(4), np.arange(2, dtype=np.uint32)), stage=programs.PRIOR
  )
  tokens, nothing = (model.tokenizer.encode([text] * 2) for text in (TEXTS[0], ''))
  text, null_text = (
    programs.encode_text(model.params['clip'], *each, config=AR.clip, dtype=np.float32)
    for each in (tokens, nothing)
  )
  z_i = jax.jit(ar_prior.sample, static_argnums=(0, 7, 8))(
    AR.prior,
    model.params['prior']['network'],
    ar_prior.Quantiser(**model.params['prior']['quantiser']),
    text,
    null_text,
    programs.candidate_keys(keys, num_candidates=3).reshape(-1),
    scale,
    np.float32,
    3,
  )
  best = diffusion_prior.rerank(z_i.reshape(2, 3, -1), text.z_t)
  np.testing.assert_allclose(samples.z_i, best, atol=1e-4)
  assert np.abs(samples.z_i[0] - samples.z_i[1]).max() > 1e-3


def test_each_image_is_the_same_alone_and_with_others_and_the_program_is_one(model):
  programs.sample_ar_prior.clear_cache()
  both = model.sample(TEXTS[:2], seed=1, first_image=1, **DRAW)
  size = programs.sample_ar_prior._cache_size()
  model.sample(TEXTS[1:], seed=2, **DRAW)
  assert size == programs.sample_ar_prior._cache_size() == 1
  alone = model.sample(TEXTS[1], seed=1, first_image=1, **DRAW)
  np.testing.assert_allclose(alone.z_i, both.z_i[1:], atol=1e-5)
  again = model.sample(TEXTS[1], seed=1, first_image=1, start_noise=alone.start_noise, **DRAW)
  np.testing.assert_array_equal(again.images, alone.images)


def test_guidance_leads_away_from_a_negative_caption(model):
  prior = Sampling(guidance_scale=4.0)
  drawn = [
    model.sample(TEXTS[0], prior=prior, negative_prompt=negative, num_images=2, **DRAW).z_i
    for negative in (None, TEXTS[1])
  ]
  assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_all_stages_are_one_program_too(model):
  fused = fuse(model, 2, **DRAW)
  images = fused.generate(TEXTS[:2], 3)
  assert np.abs(images.astype(int) - model.generate(TEXTS[:2], 3, **DRAW)).max() <= 1


def draw_on_many_devices(folder):
  asked = {'prior': Sampling(guidance_scale=2.0), 'num_candidates': 2, **DRAW}
  one = unclip_jax.load(folder).sample(TEXTS[:3], 7, **asked).z_i
  program, found = programs.sample_ar_prior, []

  def spy(*args, **static):
    found.append(loop_collectives(program.lower(*args, **static).compile().as_text()))
    return program(*args, **static)

  programs.sample_ar_prior = spy
  for model_devices in (1, 2):
    model = unclip_jax.load(folder, num_devices=4, model_devices=model_devices)
    np.testing.assert_allclose(model.sample(TEXTS[:3], 7, **asked).z_i, one, atol=1e-5)
  alone, shared = found
  assert not alone and shared  # a device that has all of the network waits for no other


def test_many_devices_draw_what_one_does(folder):
  in_a_process(draw_on_many_devices, str(folder), num_devices=4)


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    ({'prior': Sampling(num_steps=5)}, 'prior: num_steps is without effect on an autoregressive'),
    ({'prior': Sampling(sampler='ddim')}, 'prior: sampler is without effect'),
    ({'prior': Sampling(eta=0.0)}, 'prior: eta is without effect'),
    ({'prior': Sampling(spacing='trailing')}, 'prior: spacing is without effect'),
    ({'prior': Sampling(guidance_rescale=0.5)}, 'prior: guidance_rescale is without effect'),
    ({'prior': Sampling(guidance_interval=(0, 1))}, 'prior: guidance_interval is without effect'),
    ({'prior': Sampling(guidance_scale=-1.0)}, 'guidance scale -1 is negative'),
    ({'prior': Sampling(guidance_scale='2')}, 'guidance scale must be a number'),
    ({'prior': 2.0}, 'give a Sampling, not float'),
    ({'start_noise': StartNoise(np.zeros((1, 1, 16), 'f'))}, 'begins from none'),
  ],
)
def test_what_has_no_effect_is_refused(model, asked, message):
  with pytest.raises(UnclipError, match=message):
    model.sample(TEXTS[0], **asked)


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('prior.num_components=17', 'num_components is 17: take 1 to prior.embed_dim, 16'),
    ('prior.num_buckets=1', 'num_buckets is 1'),
    ('prior.num_heads=3', 'num_heads is 3'),
    ('prior.text_width=23', 'clip.text.width is 24, but prior.text_width is 23'),
    ('prior.context_length=11', 'prior.context_length is 11'),
    ('prior.text_drop=1.5', 'prior.text_drop is 1.5'),
    ('prior.sampling.temperature=0.0', 'temperature is 0'),
    ('prior.sampling.dot_share=0.0', 'dot_share is 0'),
    ('prior.sampling.guidance_scale=-1.0', 'guidance_scale is -1'),
  ],
)
def test_configs_that_cannot_be_built_are_refused(assignment, message):
  with pytest.raises(UnclipError, match=message):
    check_config(override(AR, [assignment]))


def test_a_text_transformer_of_its_own_reads_what_clip_reads():
  own = dataclasses.replace(AR.clip.text, depth=1)
  prior = dataclasses.replace(AR.prior, text=own, text_width=None)
  config = dataclasses.replace(AR, prior=prior)
  check_config(config)
  assert from_json(UnclipConfig, to_json(config)) == config
  with pytest.raises(UnclipError, match=r'but prior\.text\.vocab_size is 9'):
    check_config(override(config, ['prior.text.vocab_size=9']))


def test_it_is_described_and_measured_as_other_priors_are(model):
  default = AR.prior.sampling
  described = settings.describe(default, Sampling(guidance_scale=2))
  assert described == {'guidance_scale': 2, 'temperature': 1.0, 'dot_share': 0.5}
  guided = dataclasses.replace(default, guidance_scale=3.0)
  assert settings.summary(guided) == 'autoregressive, guidance 3'
  assert 'prior' not in formats.diffusion_stages(AR)
  subject = bench_subject.of_preset('', AR)
  options = bench_subject.Options(steps=(2, 2), guided=True)
  request = bench_subject.make_request(subject, options, 2)
  assert bench_figures.steps(request) == {'decoder': 2, 'upsampler_0': 2}
  assert 'prior' in bench_figures.about(subject, options)['guided']
  calls = record(subject.config, request, np.dtype('float32'), None)
  assert [call.program for call in calls['prior']] == [programs.sample_ar_prior]
  assert bench_figures.analytic_flops(AR, 'prior', request) is None
  made = calls['prior'][0].lower(subject.read('prior', 'float32')).out_info
  assert made.x_0.shape == (2, 16)
