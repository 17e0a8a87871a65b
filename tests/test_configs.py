"""Configs that cannot be, and their overrides."""

import pytest
from tiny_model import TWO_LEVELS as CONFIG

from unclip_jax.config_json import override
from unclip_jax.presets import preset
from unclip_jax.systems.checks import check_config
from unclip_jax.types import UnclipError


@pytest.mark.parametrize(
  ('assignments', 'match'),
  [
    (['prior.diffusion.schedule=sqrt'], r"prior\.diffusion\.schedule is 'sqrt'.*cosine, linear"),
    (['upsamplers.0.diffusion.prediction=x0'], r"upsamplers\.0\.diffusion\.prediction is 'x0'"),
    (
      ['decoder.diffusion.dynamic_threshold=0.995'],
      r'decoder\.diffusion\.dynamic_threshold.*0.995',
    ),
    (['prior.diffusion.learned_variance=true'], r'prior\.diffusion\.learned_variance'),
    (['decoder.unet.out_channels=3'], r'decoder\.unet\.out_channels is 3: .*must be 6'),
    (['upsamplers.0.unet.out_channels=6'], r'upsamplers\.0\.unet\.out_channels is 6: .*must be 3'),
    (['decoder.z_i_noise=-0.5'], r'decoder\.z_i_noise is -0\.5: take 0 or more'),
    (['decoder.z_i_noise=Infinity'], r'decoder\.z_i_noise is inf'),
    (
      ['decoder.draft_size=5', 'decoder.unet.condition_channels=3'],
      r'decoder\.draft_size is 5: it must divide decoder\.image_size, 16',
    ),
    (
      ['decoder.draft_size=8', 'decoder.unet.condition_channels=3', 'decoder.draft_width=0'],
      r'decoder\.draft_width is 0: take 1 or more',
    ),
    (['decoder.draft_size=8'], r'decoder\.unet\.condition_channels is 0: .* 8 it must be 3'),
    (['decoder.unet.condition_channels=3'], r'condition_channels is 3: .* 0 it must be 0'),
    (['decoder.text=null'], r'clip\.text\.width is 24, but decoder\.clip_text_width is None'),
    (
      ['decoder.text=null', 'decoder.clip_text_width=32'],
      r'clip\.text\.width is 24, but decoder\.clip_text_width is 32',
    ),
    (['decoder.unet.head_dim=12'], r'decoder\.unet\.head_dim is 12.*32 channels of level 1'),
    (['decoder.unet.head_dim=0'], r'decoder\.unet\.head_dim is 0'),
    (['decoder.unet.attention_levels=[0]', 'decoder.unet.head_dim=32'], r'16 channels of level 0'),
    (['decoder.unet.attention_levels=[2]'], r'attention_levels has 2: there are 2 levels'),
    (['prior.num_heads=3'], r'prior\.num_heads is 3: it must divide prior\.width, 32'),
    (['prior.num_heads=0'], r'prior\.num_heads is 0'),
    (['clip.text.num_heads=5'], r'clip\.text\.num_heads is 5'),
    (['clip.vision.num_heads=5'], r'clip\.vision\.num_heads is 5'),
    (['decoder.text.num_heads=5'], r'decoder\.text\.num_heads is 5'),
    (['decoder.image_drop=-0.1'], r'decoder\.image_drop is -0\.1: take a fraction'),
    (['upsamplers.0.low_noise=-0.1'], r'upsamplers\.0\.low_noise is -0\.1: take a fraction'),
    (
      ['upsamplers.0.keep_low=1', 'upsamplers.0.image_size=40'],
      r'upsamplers\.0\.image_size is 40: with a keep_low of 1 it must be a multiple of 16',
    ),
    (['upsamplers.0.keep_low=3'], r'upsamplers\.0\.low_size is 16: .* a multiple of 3'),
    (['upsamplers.0.residual=true'], r'upsamplers\.0\.residual is true: .*must predict x_0'),
    (['upsamplers.0.keep_low=-1'], r'upsamplers\.0\.keep_low is -1: take 0 or more'),
    (['upsamplers.0.blur_fraction=2.0'], r'upsamplers\.0\.blur_fraction is 2: take a fraction'),
    (['upsamplers.0.degradation=rain'], r"upsamplers\.0\.degradation is 'rain'.*blur, bsr"),
    (['decoder.diffusion.clip_x_0=-1.0'], r'decoder\.diffusion\.clip_x_0 is -1: take more than 0'),
    (['decoder.unet.dropout=2.0'], r'decoder\.unet\.dropout is 2'),
    (['decoder.sampling.num_steps=-1'], r'decoder\.sampling: .*-1'),
    (['prior.sampling.sampler=euler'], r"prior\.sampling: there is no sampler 'euler'"),
  ],
)
def test_a_config_that_cannot_be_names_its_fields(assignments, match):
  check_config(CONFIG)
  with pytest.raises(UnclipError, match=match):
    check_config(override(CONFIG, assignments))


def test_width_is_short_for_the_channels_of_a_unet_and_stays_the_width_of_others():
  config = override(
    preset('emoji_small'), ['decoder.width=64', 'upsamplers.0.width=16', 'prior.width=96']
  )
  assert config.decoder.unet.channels == 64
  assert config.upsamplers[0].unet.channels == 16
  assert config.prior.width == 96
  check_config(config)
  for wrong in ('width=1', 'upsamplers.9.width=1', 'decoder.sampling.width=1'):
    with pytest.raises(UnclipError, match='has no field'):
      override(CONFIG, [wrong])
