"""Whether the configs of the stages can be built, each on its own and with the others."""

import math

from unclip_jax.configs import (
  DecoderConfig,
  DiffusionConfig,
  PriorConfig,
  ResNetConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
  UpsamplerConfig,
  ViTConfig,
)
from unclip_jax.stages import common
from unclip_jax.types import UnclipError

DEGRADATIONS = ('blur', 'bsr')


def check_config(config: UnclipConfig) -> None:
  """Checks that the stages fit together, and that each can be built as it is meant.

  Raises:
    UnclipError: not so; names the fields.
  """
  if config.upsamplers and config.decoder is None:
    raise UnclipError('there are upsamplers, but no decoder that they could follow')
  _check_stages_meet(config)
  for name, tower in (('clip.text', config.clip.text), ('clip.vision', config.clip.vision)):
    if isinstance(tower, TextConfig | ViTConfig):
      _check_heads(name, tower.width, tower.num_heads)
    elif isinstance(tower, ResNetConfig):
      _check_resnet(name, tower)
  stages: dict[str, PriorConfig | DecoderConfig | UpsamplerConfig] = {}
  shares = {}
  if config.prior is not None:
    _check_prior(config.prior)
    stages['prior'] = config.prior
    shares['prior.text_drop'] = config.prior.text_drop
  if config.decoder is not None:
    _check_decoder(config.decoder)
    stages['decoder'] = config.decoder
    shares['decoder.text_drop'] = config.decoder.text_drop
    shares['decoder.image_drop'] = config.decoder.image_drop
  for i, stage in enumerate(config.upsamplers):
    name = f'upsamplers.{i}'
    _check_upsampler(name, stage)
    stages[name] = stage
    for field in ('crop_fraction', 'blur_fraction', 'low_noise'):
      shares[f'{name}.{field}'] = getattr(stage, field)
  for name, stage in stages.items():
    try:
      common.make_plan(stage.diffusion, stage.sampling)
      common.make_sampler(stage.sampling.sampler, stage.sampling.variance)
    except UnclipError as error:
      raise UnclipError(f'{name}.sampling: {error}') from error
  for name, share in shares.items():
    if not 0 <= share <= 1:
      raise UnclipError(f'{name} is {share:g}: take a fraction from 0 to 1')


def _check_prior(prior: PriorConfig) -> None:
  _check_heads('prior', prior.width, prior.num_heads)
  _check_diffusion('prior', prior.diffusion)
  if prior.diffusion.learned_variance:
    raise UnclipError('prior.diffusion.learned_variance is true: the prior predicts no variance')


def _check_decoder(decoder: DecoderConfig) -> None:
  if decoder.text is not None:
    _check_heads('decoder.text', decoder.text.width, decoder.text.num_heads)
  _check_diffusion('decoder', decoder.diffusion)
  _check_unet('decoder.unet', decoder.unet, decoder.diffusion.learned_variance)
  for name in ('z_i_noise', 'draft_size'):
    if not 0 <= getattr(decoder, name) < math.inf:
      raise UnclipError(f'decoder.{name} is {getattr(decoder, name):g}: take 0 or more')
  draft = decoder.draft_size
  if draft and decoder.draft_width < 1:
    raise UnclipError(f'decoder.draft_width is {decoder.draft_width}: take 1 or more')
  wanted = decoder.unet.in_channels if draft else 0
  if decoder.unet.condition_channels != wanted:
    raise UnclipError(
      f'decoder.unet.condition_channels is {decoder.unet.condition_channels}: with a '
      f'decoder.draft_size of {draft} it must be {wanted}'
    )
  if draft and decoder.image_size % draft:
    raise UnclipError(
      f'decoder.draft_size is {draft}: it must divide decoder.image_size, {decoder.image_size}'
    )


def _check_upsampler(name: str, stage: UpsamplerConfig) -> None:
  _check_diffusion(name, stage.diffusion)
  _check_unet(f'{name}.unet', stage.unet, stage.diffusion.learned_variance)
  if stage.degradation not in DEGRADATIONS:
    raise UnclipError(
      f'{name}.degradation is {stage.degradation!r}: take one of {", ".join(DEGRADATIONS)}'
    )
  if stage.keep_low < 0:
    raise UnclipError(f'{name}.keep_low is {stage.keep_low}: take 0 or more')
  sizes = {'low_size': stage.low_size, 'image_size': stage.image_size}
  for field, size in sizes.items():
    divisor = stage.keep_low if field == 'low_size' else stage.low_size
    if stage.keep_low and (divisor < 1 or size % divisor):
      raise UnclipError(
        f'{name}.{field} is {size}: with a keep_low of {stage.keep_low} it must be a multiple of '
        f'{divisor}'
      )


def _check_stages_meet(config: UnclipConfig) -> None:
  clip, text, prior, decoder = config.clip, config.clip.text, config.prior, config.decoder
  meet: list[tuple[str, int, str, int | None]] = []
  if prior is not None:
    meet += [
      ('clip.embed_dim', clip.embed_dim, 'prior.embed_dim', prior.embed_dim),
      ('clip.text.width', text.width, 'prior.text_width', prior.text_width),
      (
        'clip.text.context_length', text.context_length,
        'prior.context_length', prior.context_length,
      ),
    ]  # fmt: skip
  if decoder is not None:
    meet.append(('clip.embed_dim', clip.embed_dim, 'decoder.embed_dim', decoder.embed_dim))
    if decoder.text is None:
      width = decoder.clip_text_width
      meet.append(('clip.text.width', text.width, 'decoder.clip_text_width', width))
    else:
      for field in ('context_length', 'vocab_size'):
        names = f'clip.text.{field}', f'decoder.text.{field}'
        meet.append((names[0], getattr(text, field), names[1], getattr(decoder.text, field)))
    size = decoder.image_size
    for i, stage in enumerate(config.upsamplers):
      meet.append(('the size before it', size, f'upsamplers.{i}.low_size', stage.low_size))
      size = stage.image_size
  for name, value, other_name, other in meet:
    if value != other:
      raise UnclipError(f'{name} is {value}, but {other_name} is {other}: they must be equal')


def _check_heads(name: str, width: int, num_heads: int) -> None:
  if num_heads < 1 or width % num_heads:
    raise UnclipError(f'{name}.num_heads is {num_heads}: it must divide {name}.width, {width}')


def _check_resnet(name: str, tower: ResNetConfig) -> None:
  if not tower.depths or min(tower.depths) < 1:
    raise UnclipError(f'{name}.depths is {list(tower.depths)}: take 1 or more for each level')
  if tower.width < 2 or tower.width % 2:
    raise UnclipError(f'{name}.width is {tower.width}: the stem needs an even number')
  if tower.image_size < 1 or tower.image_size % tower.factor:
    raise UnclipError(
      f'{name}.image_size is {tower.image_size}: with {len(tower.depths)} levels it must be a '
      f'multiple of {tower.factor}'
    )
  if tower.num_heads < 1 or tower.pooled_width % tower.num_heads:
    raise UnclipError(
      f'{name}.num_heads is {tower.num_heads}: it must divide the {tower.pooled_width} channels '
      'that are pooled'
    )


def _check_diffusion(name: str, diffusion: DiffusionConfig) -> None:
  words = {
    'schedule': (diffusion.schedule, ('cosine', 'linear', 'scaled_linear')),
    'prediction': (diffusion.prediction, ('eps', 'x_0', 'v')),
  }
  for field, (word, known) in words.items():
    if word not in known:
      raise UnclipError(f'{name}.diffusion.{field} is {word!r}: take one of {", ".join(known)}')
  if diffusion.clip_x_0 is not None and not diffusion.clip_x_0 > 0:
    raise UnclipError(f'{name}.diffusion.clip_x_0 is {diffusion.clip_x_0:g}: take more than 0')
  percentile = diffusion.dynamic_threshold
  if percentile is not None and not 50 <= percentile <= 100:
    raise UnclipError(
      f'{name}.diffusion.dynamic_threshold is {percentile:g}: take a percentile from 50 to 100'
    )


def _check_unet(name: str, unet: UNetConfig, learned_variance: bool) -> None:
  wanted = unet.in_channels * (2 if learned_variance else 1)
  if unet.out_channels != wanted:
    variance = 'learned' if learned_variance else 'not learned'
    raise UnclipError(
      f'{name}.out_channels is {unet.out_channels}: with {unet.in_channels} in_channels and a '
      f'variance that is {variance} it must be {wanted}'
    )
  if not 0 <= unet.dropout < 1:
    raise UnclipError(f'{name}.dropout is {unet.dropout:g}: take 0 or more, and less than 1')
  levels = range(len(unet.multipliers))
  for level in unet.attention_levels:
    if level not in levels:
      raise UnclipError(f'{name}.attention_levels has {level}: there are {len(levels)} levels')
  # Wherever there is attention there is some in the middle, at the last level's width.
  for level in {*unet.attention_levels, *levels[-1:]} if unet.attention_levels else ():
    channels = unet.channels * unet.multipliers[level]
    if unet.head_dim < 1 or channels % unet.head_dim:
      raise UnclipError(
        f'{name}.head_dim is {unet.head_dim}: it must divide the {channels} channels of level '
        f'{level}'
      )
