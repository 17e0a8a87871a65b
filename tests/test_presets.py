"""The presets' sizes against those of the paper, and configs on their way to JSON and back."""

import dataclasses
import json
import math

import jax
import pytest

from unclip_jax.config_json import from_json, override, to_json
from unclip_jax.configs import (
  ConvTowerConfig,
  UnclipConfig,
  ViTConfig,
)
from unclip_jax.presets import KARLO, PAPER, PAPER_AR, PRESETS, TINY, preset
from unclip_jax.stages import ar_prior, clip, decoder, diffusion_prior, upsampler
from unclip_jax.systems.checks import check_config
from unclip_jax.types import UnclipError


def count(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def shapes_of(stage, config):
  return jax.eval_shape(lambda key: stage.init(config, key), jax.random.key(0))


def transformer_size(width, depth):
  """Weights of attention (4 w^2) and of an MLP of ratio 4 (8 w^2), biases and two norms."""
  return depth * (12 * width**2 + 13 * width)


def within(actual, expected, share=0.02):
  return abs(actual / expected - 1) < share


def test_prior_of_the_paper_has_1_21_billion_parameters():
  assert within(count(shapes_of(diffusion_prior, PAPER.prior)), 1.21e9)


def test_ar_prior_of_the_paper_has_1_21_billion_for_text_and_0_80_for_components():
  params = shapes_of(ar_prior, PAPER_AR.prior)
  assert count(params['text_encoder']['blocks']) == transformer_size(2048, 24)
  assert count(params['blocks']) == transformer_size(1664, 24)
  assert within(count(params['text_encoder']['blocks']), 1.21e9)
  assert within(count(params['blocks']), 0.80e9)
  assert params['out_proj']['kernel'].shape == (1664, 1024)
  # 256 tokens, z_t, the dot product, and 318 components that the last one is predicted from.
  assert params['positions'].shape == (256 + 1 + 1 + 318, 1664)
  assert dataclasses.replace(PAPER_AR, prior=PAPER.prior) == PAPER


def test_decoder_of_the_paper_has_2_24_billion_in_its_unet_and_1_21_in_its_text_transformer():
  params = shapes_of(decoder, PAPER.decoder)
  assert within(count(params['unet']), 2.24e9)
  text = params['text_encoder']
  assert within(count(text['blocks']), 1.21e9)
  assert count(text['blocks']) == transformer_size(2048, 24)
  # What the text encoder has beside its blocks is the vocabulary, two tables of 256 positions
  # and the last norm; the paper's 3.5 billion are the sum of all.
  beside = (49408 + 2 * 256 + 2) * 2048
  assert count(text) - count(text['blocks']) == beside
  assert within(count(params), 3.5e9, share=0.05)


def test_upsamplers_of_the_paper_have_730_and_282_million_parameters():
  for config, expected in zip(PAPER.upsamplers, (730e6, 282e6), strict=True):
    assert within(count(shapes_of(upsampler, config)), expected)


def test_upsamplers_with_additive_time_have_692_and_267_million_parameters():
  for config, expected in zip(PAPER.upsamplers, (692e6, 267e6), strict=True):
    unet = dataclasses.replace(config.unet, scale_shift=False)
    assert within(count(shapes_of(upsampler, dataclasses.replace(config, unet=unet))), expected)


def test_stages_of_karlo_have_the_parameters_that_are_published():
  assert within(count(shapes_of(diffusion_prior, KARLO.prior)), 1022e6, share=1e-4)
  params = shapes_of(decoder, KARLO.decoder)
  assert within(count(params['unet']), 885e6, share=1e-3)
  nets = shapes_of(upsampler, KARLO.upsamplers[0])
  assert {name: round(count(net) / 1e6) for name, net in nets.items()} == {
    'unet': 692,
    'final_unet': 692,
  }
  assert count(shapes_of(clip, KARLO.clip)) == 427_616_513  # OpenAI's ViT-L/14


def test_clip_of_the_paper_is_a_vit_h_16_and_a_text_transformer_of_24_blocks():
  params = shapes_of(clip, PAPER.clip)
  assert count(params['vision']['blocks']) == transformer_size(1280, 32)
  assert count(params['text']['blocks']) == transformer_size(1024, 24)
  assert params['vision']['positions'].shape == (16 * 16 + 1, 1280)
  assert params['image_projection']['kernel'].shape == (1280, 1024)


@pytest.mark.parametrize('name', PRESETS)
def test_stages_of_a_preset_fit_each_other(name):
  config = preset(name)
  check_config(config)
  assert config.prior.embed_dim == config.decoder.embed_dim == config.clip.embed_dim
  if getattr(config.prior, 'text', None) is None:
    assert config.prior.text_width == config.clip.text.width
  else:
    assert config.prior.text.vocab_size == config.clip.text.vocab_size
    assert config.prior.text.context_length == config.clip.text.context_length
  assert config.prior.context_length == config.clip.text.context_length
  if config.decoder.text is None:
    assert config.decoder.clip_text_width == config.clip.text.width
  else:
    assert config.decoder.text.vocab_size == config.clip.text.vocab_size
    assert config.decoder.text.context_length == config.clip.text.context_length
  size = config.decoder.image_size
  for stage in config.upsamplers:
    assert stage.low_size == size
    size = stage.image_size
    unit = stage.unet.patch_size * 2 ** (len(stage.unet.multipliers) - 1)
    assert size % unit == 0
    assert int(size * stage.crop_fraction) % unit == 0


@pytest.mark.parametrize('name', PRESETS)
def test_preset_survives_json(name):
  config = preset(name)
  text = json.dumps(to_json(config))
  assert from_json(UnclipConfig, json.loads(text)) == config
  assert hash(from_json(UnclipConfig, json.loads(text))) == hash(config)


def test_both_kinds_of_image_tower_are_told_apart():
  towers = {name: type(preset(name).clip.vision) for name in PRESETS}
  assert set(towers.values()) == {ViTConfig, ConvTowerConfig}


def test_both_kinds_of_prior_are_told_apart_whatever_fields_are_left_out():
  for name, least in (
    ('tiny', ('text_drop', 'unit_norm')),
    ('tiny_ar', ('text_drop', 'sampling', 'unit_norm')),
  ):
    values = to_json(preset(name))
    for field in least:
      del values['prior'][field]
    assert type(from_json(UnclipConfig, values).prior) is type(preset(name).prior)


def test_unknown_preset_names_those_that_exist():
  with pytest.raises(UnclipError, match=r"'huge'.*tiny, emoji_small, emoji, paper, karlo"):
    preset('huge')


def test_override_sets_fields_at_any_depth_and_leaves_the_rest():
  changed = override(
    TINY,
    [
      'decoder.unet.channels=48',
      'decoder.unet.multipliers=[1, 2, 3]',
      'prior.diffusion.prediction=v',
      'upsamplers.0.blur_sigma=1',
      'decoder.text=null',
      'clip.unit_norm=false',
    ],
  )
  assert changed.decoder.unet.channels == 48
  assert changed.decoder.unet.multipliers == (1, 2, 3)
  assert changed.prior.diffusion.prediction == 'v'
  assert changed.upsamplers[0].blur_sigma == 1.0
  assert type(changed.upsamplers[0].blur_sigma) is float
  assert changed.decoder.text is None
  assert changed.clip.unit_norm is False
  assert changed.clip.vision == TINY.clip.vision
  assert override(TINY, []) == TINY


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('decoder.unet.width=3', r"decoder\.unet has no field 'width'.*channels"),
    ('decoder.nothing.channels=3', r"decoder has no field 'nothing'.*unet"),
    ('nothing=3', r"the config has no field 'nothing'.*clip, prior, decoder"),
    ('upsamplers.1.low_size=3', r"upsamplers has no field '1'.*0 to 0"),
    ('decoder.unet.channels.x=3', r"decoder\.unet\.channels has no field 'x'"),
    ('decoder.unet.channels=many', r"config\.decoder\.unet\.channels.*int.*'many'"),
    ('decoder.unet.channels=true', r'config\.decoder\.unet\.channels.*int.*True'),
    ('decoder.unet.channels=1.5', r'config\.decoder\.unet\.channels.*int.*1\.5'),
    ('decoder.unet.multipliers=2', r'config\.decoder\.unet\.multipliers.*list.*2'),
    ('decoder.unet.multipliers=[1, "a"]', r"config\.decoder\.unet\.multipliers\.1.*int.*'a'"),
    ('clip.pixel_mean=[0, 1]', r'config\.clip\.pixel_mean.*3 values.*2'),
    ('decoder.unet=7', r'config\.decoder\.unet.*object.*int'),
    ('decoder.unet.channels', r'path\.to\.field=value'),
  ],
)
def test_override_names_what_is_wrong(assignment, message):
  with pytest.raises(UnclipError, match=message):
    override(TINY, [assignment])


def test_from_json_names_unknown_and_missing_fields():
  values = to_json(TINY)
  values['prior']['wdith'] = values['prior'].pop('width')
  with pytest.raises(UnclipError, match=r"config\.prior: unknown field 'wdith'.*width"):
    from_json(UnclipConfig, values)
  del values['prior']['wdith']
  with pytest.raises(UnclipError, match=r"config\.prior: field 'width' is missing"):
    from_json(UnclipConfig, values)
  with pytest.raises(UnclipError, match=r'config: expected an object, got list'):
    from_json(UnclipConfig, [])
