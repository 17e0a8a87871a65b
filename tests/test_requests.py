"""Calls of models whose decoders differ: what they draw, and what has no effect on which."""

import dataclasses

import numpy as np
import pytest
from tiny_decoders import GLIDE, KANDINSKY, STABLE, TEXT
from tiny_model import CONFIG, TEXTS, make_params

from unclip_jax import Sampling
from unclip_jax.config_json import from_json, override, to_json
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import common
from unclip_jax.stages import glide as glide_stage
from unclip_jax.systems import programs
from unclip_jax.systems.checks import check_config
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import UnclipError

STEPS = Sampling(num_steps=2)
DRAW = {'decoder': STEPS, 'seed': 1}


def stable(*assignments):
  return override(STABLE, [f'decoder.{each}' for each in assignments])


def make_model(config):
  check_config(config)
  assert from_json(UnclipConfig, to_json(config)) == config
  tokenizer = Tokenizer.train(TEXTS * 3, TEXT.vocab_size, TEXT.context_length)
  return Unclip(config, make_params(config), tokenizer)


@pytest.fixture(scope='module')
def kandinsky():
  return make_model(KANDINSKY)


@pytest.fixture(scope='module')
def glide():
  return make_model(GLIDE)


def test_a_decoder_of_latents_paints_other_sizes_too(kandinsky):
  own, larger = (kandinsky.sample(TEXTS[:1], size=size, **DRAW) for size in (None, 32))
  assert own.images.shape == (1, 16, 16, 3) and own.latents.shape == (1, 8, 8, 4)
  assert larger.images.shape == (1, 32, 32, 3) and larger.latents.shape == (1, 16, 16, 4)
  np.testing.assert_array_equal(own.z_i, larger.z_i)
  with pytest.raises(UnclipError, match='multiples of'):
    kandinsky.sample(TEXTS[:1], size=17)


def test_tiles_are_blended_into_nearly_the_same_picture(kandinsky):
  whole, tiled = (kandinsky.sample(TEXTS[:1], size=64, tile=tile, **DRAW) for tile in (None, 32))
  np.testing.assert_array_equal(whole.latents, tiled.latents)
  assert whole.images.shape == tiled.images.shape
  apart = np.abs(whole.stage_images[0] - tiled.stage_images[0])
  assert 0 < apart.mean() < whole.stage_images[0].std()
  for tile in (0, 31, 2):
    with pytest.raises(UnclipError, match='tile'):
      kandinsky.sample(TEXTS[:1], tile=tile)


def test_a_negative_prompt_gives_its_own_embedding_to_lead_away_from(kandinsky):
  guided = Sampling(num_steps=2, guidance_scale=3.0)
  z_i = np.ones((1, KANDINSKY.clip.embed_dim), 'f')
  images = [
    kandinsky.sample('', z_i=z_i, decoder=guided, negative_prompt=negative).images
    for negative in (None, TEXTS[1], TEXTS[2])
  ]
  assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])


def test_each_image_is_the_same_alone_and_with_others(kandinsky, glide):
  for model in (kandinsky, glide):
    both = model.sample(TEXTS[:2], **DRAW).stage_images[-1]
    alone = model.sample(TEXTS[1:2], **DRAW).stage_images[-1]
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_what_is_known_of_a_picture_is_kept(glide):
  draw = np.random.default_rng(0)
  picture = draw.integers(256, size=(1, 16, 16, 3), dtype=np.uint8)
  anew = np.zeros((1, 16, 16), bool)
  anew[:, 4:12, :8] = True
  images = glide.sample(TEXTS[:1], image=picture, mask=anew, **DRAW).images
  assert images.shape == picture.shape
  np.testing.assert_allclose(images[~anew].astype(int), picture[~anew].astype(int), atol=1)
  assert np.abs(images[anew].astype(int) - picture[anew]).mean() > 20
  # Without a picture all is new, as it is where all of one is to be painted.
  free, all_new = (
    glide.sample(TEXTS[:1], **given, **DRAW).images
    for given in ({}, {'image': picture, 'mask': np.ones((1, 16, 16), bool)})
  )
  np.testing.assert_array_equal(free, all_new)
  assert not np.array_equal(free, images)


def test_the_upsampler_of_glide_is_run_as_its_stage_is(glide):
  samples = glide.sample(TEXTS[:1], upsampler=STEPS, **DRAW)
  config, tokens = GLIDE.upsamplers[0], glide.tokenizer.encode(TEXTS[:1])
  known, mask = np.zeros((1, 16, 16, 3), 'f'), np.zeros((1, 16, 16, 1), 'f')
  sampling = dataclasses.replace(config.sampling, num_steps=2)
  expected, _ = glide_stage.sample_upsampler(
    config,
    glide.params['upsampler_0'],
    TextFeatures(*tokens, None, None),
    samples.stage_images[0],
    programs.stage_keys(
      programs.image_keys(np.uint32(1), np.zeros(1, np.uint32)), stage=programs.UPSAMPLER
    ),
    common.make_plan(config.diffusion, sampling),
    common.make_sampler(sampling.sampler, sampling.variance),
    known=known,
    mask=mask,
  )
  np.testing.assert_allclose(samples.stage_images[1], expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_clip_has_no_embeddings(glide):
  samples = glide.sample(TEXTS[:2], size=8, **DRAW)
  assert samples.z_i is None and samples.z_t is None and samples.images.shape == (2, 8, 8, 3)
  assert 'decoder' in repr(glide)
  for call in (
    lambda: glide.encode_text(TEXTS),
    lambda: glide.encode_image(samples.images),
  ):
    with pytest.raises(UnclipError, match='no clip'):
      call()


@pytest.mark.parametrize(
  ('which', 'given', 'match'),
  [
    ('kandinsky', {'noise_level': 3}, 'noise level is without effect'),
    ('kandinsky', {'mask': np.ones((1, 4, 4), bool)}, 'completes no pictures'),
    ('kandinsky', {'z_i': np.ones((1, 32), 'f'), 'prior': STEPS}, 'prior does not run'),
    ('kandinsky', {'z_i': np.ones((1, 32), 'f'), 'num_candidates': 2}, 'prior does not run'),
    ('kandinsky', {'z_i': np.ones((1, 32), 'f')}, 'caption is without effect'),
    ('kandinsky', {'upsampler': STEPS}, 'has none'),
    ('glide', {'prior': STEPS}, 'has no prior'),
    ('glide', {'num_candidates': 2}, 'has no prior'),
    ('glide', {'image': np.zeros((1, 8, 8, 3), 'f'), 'mask': np.ones((1, 8, 4), bool)}, 'one size'),
    ('glide', {'z_i': np.ones((1, 32), 'f')}, 'knows no CLIP'),
    ('glide', {'z_t': np.ones((1, 32), 'f')}, 'knows no CLIP'),
    ('glide', {'tile': 8}, 'no autoencoder'),
    ('glide', {'size': 24}, 'no size 24'),
    ('glide', {'image': np.zeros((1, 8, 8, 3), 'f')}, 'go together'),
    ('glide', {'image': np.zeros((2, 8, 8, 3), 'f'), 'mask': np.ones((1, 8, 8), bool)}, 'image'),
    ('glide', {'image': np.full((1, 8, 8, 3), 9, 'f'), 'mask': np.ones((1, 8, 8), bool)}, 'uint8'),
    ('glide', {'image': np.zeros((1, 8, 8, 3), 'f'), 'mask': np.ones((1, 8, 8))}, 'booleans'),
  ],
)
def test_what_has_no_effect_or_does_not_fit_is_named(which, given, match, request):
  with pytest.raises(UnclipError, match=match):
    request.getfixturevalue(which).sample(TEXTS[:1], **given)


@pytest.mark.parametrize(
  ('config', 'match'),
  [
    (dataclasses.replace(KANDINSKY, clip=None), 'no clip'),
    (dataclasses.replace(KANDINSKY, decoder_text=TEXT), 'reads nothing of it'),
    (
      dataclasses.replace(
        KANDINSKY, decoder=dataclasses.replace(KANDINSKY.decoder, text_width=8, text_embed_dim=8)
      ),
      'no decoder_text',
    ),
    (
      dataclasses.replace(
        KANDINSKY, autoencoder=dataclasses.replace(KANDINSKY.autoencoder, latent_channels=3)
      ),
      'autoencoder.latent_channels is 3',
    ),
    (
      dataclasses.replace(CONFIG, clip=dataclasses.replace(CONFIG.clip, text=None)),
      'no clip.text',
    ),
    (override(STABLE, ['autoencoder.scaling=0']), 'scaling is 0'),
    (stable('unet.class_dim=12'), 'class_dim is 12: it must be twice'),
    (stable('unet.out_channels=8'), 'out_channels is 8'),
    (stable('unet.depths=[1]'), 'depths has 1 numbers: take 2'),
    (stable('unet.num_heads=[3,2]'), 'num_heads is 3'),
    (stable('noise_level=1000'), 'noise_level is 1000: take 0 to 999'),
    (stable('z_i_diffusion.schedule=cubic'), "z_i_diffusion.diffusion.schedule is 'cubic'"),
    (dataclasses.replace(STABLE, decoder_text=None), 'no decoder_text'),
    (override(GLIDE, ['decoder.unet.condition_channels=3']), 'condition_channels is 3: take 0, or'),
    (override(GLIDE, ['upsamplers.0.unet.context_dim=9']), 'context_dim is 9: it must be'),
  ],
)
def test_configs_whose_stages_do_not_meet_are_refused(config, match):
  with pytest.raises(UnclipError, match=match):
    check_config(config)
