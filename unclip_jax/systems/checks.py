"""Whether the configs of the stages can be built, each on its own and with the others."""

import math

from unclip_jax.configs import (
  AnyDecoderConfig,
  AnyUpsamplerConfig,
  ArPriorConfig,
  ClipConfig,
  DecoderConfig,
  DiffusionConfig,
  GlideDecoderConfig,
  GlideUpsamplerConfig,
  KandinskyDecoderConfig,
  LatentUNetConfig,
  PriorConfig,
  ResNetConfig,
  StableUnclipDecoderConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
  UpsamplerConfig,
  ViTConfig,
  XlmRobertaConfig,
)
from unclip_jax.stages import common
from unclip_jax.systems.settings import sizes
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
  if config.default_size is not None and config.default_size not in sizes(config):
    made = ' or '.join(map(str, sizes(config))) or 'no'
    raise UnclipError(f'default_size is {config.default_size}: the stages make {made} pixels')
  if config.clip is not None:
    _check_clip(config.clip)
  if config.autoencoder is not None and not 0 < config.autoencoder.scaling < math.inf:
    raise UnclipError(f'autoencoder.scaling is {config.autoencoder.scaling:g}: take more than 0')
  if config.decoder_text is not None:
    _check_heads('decoder_text', config.decoder_text.width, config.decoder_text.num_heads)
  stages: dict[str, PriorConfig | AnyDecoderConfig | AnyUpsamplerConfig] = {}
  shares = {}
  if isinstance(config.prior, ArPriorConfig):
    _check_ar_prior(config.prior)
  elif config.prior is not None:
    _check_prior(config.prior)
    stages['prior'] = config.prior
  if config.prior is not None:
    shares['prior.text_drop'] = config.prior.text_drop
  if config.decoder is not None:
    stages['decoder'] = config.decoder
    _check_painter('decoder', config.decoder)
    if isinstance(config.decoder, DecoderConfig):
      _check_decoder(config.decoder)
      shares['decoder.text_drop'] = config.decoder.text_drop
      shares['decoder.image_drop'] = config.decoder.image_drop
  for i, stage in enumerate(config.upsamplers):
    name = f'upsamplers.{i}'
    stages[name] = stage
    _check_painter(name, stage)
    if isinstance(stage, GlideUpsamplerConfig):
      continue
    _check_upsampler(name, stage)
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


def _check_clip(clip: ClipConfig) -> None:
  if clip.text is None and clip.vision is None:
    raise UnclipError('clip has neither clip.text nor clip.vision: give one of them')
  for name, tower in (('clip.text', clip.text), ('clip.vision', clip.vision)):
    if isinstance(tower, TextConfig | ViTConfig):
      _check_heads(name, tower.width, tower.num_heads)
    elif isinstance(tower, ResNetConfig):
      _check_resnet(name, tower)


def _check_painter(name: str, stage: AnyDecoderConfig | AnyUpsamplerConfig) -> None:
  """What all stages have that paint."""
  _check_diffusion(name, stage.diffusion)
  if (text := getattr(stage, 'text', None)) is not None:
    _check_heads(f'{name}.text', text.width, text.num_heads)
  if isinstance(stage.unet, UNetConfig):
    _check_unet(f'{name}.unet', stage.unet, stage.diffusion.learned_variance)
  if isinstance(stage, GlideDecoderConfig | GlideUpsamplerConfig):
    # The small picture, and to inpaint a picture and its mask.
    known = (3, 7) if isinstance(stage, GlideUpsamplerConfig) else (0, 4)
    if stage.unet.condition_channels not in known:
      raise UnclipError(
        f'{name}.unet.condition_channels is {stage.unet.condition_channels}: take {known[0]}, or '
        f'{known[1]} to inpaint'
      )
    if stage.unet.context_dim != stage.text.width:
      raise UnclipError(
        f'{name}.unet.context_dim is {stage.unet.context_dim}: it must be {name}.text.width, '
        f'{stage.text.width}'
      )
  if isinstance(stage, StableUnclipDecoderConfig):
    _check_latent_unet(f'{name}.unet', stage.unet, stage.diffusion.learned_variance)
    _check_diffusion(f'{name}.z_i_diffusion', stage.z_i_diffusion)
    if stage.unet.class_dim != 2 * stage.embed_dim:
      raise UnclipError(
        f'{name}.unet.class_dim is {stage.unet.class_dim}: it must be twice {name}.embed_dim, '
        f'{stage.embed_dim}'
      )
    if not 0 <= stage.noise_level < stage.z_i_diffusion.num_steps:
      raise UnclipError(
        f'{name}.noise_level is {stage.noise_level}: take 0 to '
        f'{stage.z_i_diffusion.num_steps - 1}, a step of {name}.z_i_diffusion'
      )


def _check_prior(prior: PriorConfig) -> None:
  _check_heads('prior', prior.width, prior.num_heads)
  _check_diffusion('prior', prior.diffusion)
  if prior.diffusion.learned_variance:
    raise UnclipError('prior.diffusion.learned_variance is true: the prior predicts no variance')


def _check_ar_prior(prior: ArPriorConfig) -> None:
  _check_heads('prior', prior.width, prior.num_heads)
  if prior.text is not None:
    _check_heads('prior.text', prior.text.width, prior.text.num_heads)
  if not 1 <= prior.num_components <= prior.embed_dim:
    raise UnclipError(
      f'prior.num_components is {prior.num_components}: take 1 to prior.embed_dim, '
      f'{prior.embed_dim}'
    )
  if prior.num_buckets < 2:
    raise UnclipError(f'prior.num_buckets is {prior.num_buckets}: take 2 or more')
  sampling = prior.sampling
  if not 0 < sampling.temperature < math.inf:
    raise UnclipError(f'prior.sampling.temperature is {sampling.temperature:g}: take more than 0')
  if not 0 < sampling.dot_share <= 1:
    raise UnclipError(
      f'prior.sampling.dot_share is {sampling.dot_share:g}: take more than 0, and at most 1'
    )
  if not 0 <= sampling.guidance_scale < math.inf:
    raise UnclipError(
      f'prior.sampling.guidance_scale is {sampling.guidance_scale:g}: take 0 or more'
    )


def _check_decoder(decoder: DecoderConfig) -> None:
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
  if stage.degradation not in DEGRADATIONS:
    raise UnclipError(
      f'{name}.degradation is {stage.degradation!r}: take one of {", ".join(DEGRADATIONS)}'
    )
  if stage.residual and (stage.diffusion.prediction != 'x_0' or stage.diffusion.learned_variance):
    raise UnclipError(f'{name}.residual is true: its network must predict x_0, and no variance')
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
  clip, prior, decoder, painter = config.clip, config.prior, config.decoder, config.autoencoder
  text = None if clip is None else clip.text
  meet: list[tuple[str, int, str, int | None]] = []
  if prior is not None:
    if text is None:
      raise UnclipError('there is a prior, but no clip.text that reads captions for it')
    meet.append(('clip.embed_dim', clip.embed_dim, 'prior.embed_dim', prior.embed_dim))
    if (own_text := getattr(prior, 'text', None)) is None:
      meet.append(('clip.text.width', text.width, 'prior.text_width', prior.text_width))
    else:
      meet += _same_tokens('prior.text', text, own_text)
    length = prior.context_length
    meet.append(('clip.text.context_length', text.context_length, 'prior.context_length', length))
  if decoder is not None and not isinstance(decoder, GlideDecoderConfig):
    if clip is None:
      raise UnclipError('there is a decoder of z_i, but no clip that knows them')
    meet.append(('clip.embed_dim', clip.embed_dim, 'decoder.embed_dim', decoder.embed_dim))
  if isinstance(decoder, DecoderConfig):
    if text is None:
      raise UnclipError('there is no clip.text: the decoder reads what it says of a caption')
    if decoder.text is None:
      width = decoder.clip_text_width
      meet.append(('clip.text.width', text.width, 'decoder.clip_text_width', width))
    else:
      meet += _same_tokens('decoder.text', text, decoder.text)
  if decoder is not None:
    meet += _decoder_text_meets(config)
    if painter is not None:
      channels = decoder.unet.in_channels
      names = 'autoencoder.latent_channels', 'decoder.unet.in_channels'
      meet.append((names[0], painter.latent_channels, names[1], channels))
    size = decoder.image_size
    for i, stage in enumerate(config.upsamplers):
      meet.append(('the size before it', size, f'upsamplers.{i}.low_size', stage.low_size))
      size = stage.image_size
  for name, value, other_name, other in meet:
    if value != other:
      raise UnclipError(f'{name} is {value}, but {other_name} is {other}: they must be equal')


def _same_tokens(name: str, clip: TextConfig, own: TextConfig) -> list[tuple[str, int, str, int]]:
  """What a text Transformer that reads the captions of CLIP has as CLIP has it."""
  return [
    (f'clip.text.{field}', getattr(clip, field), f'{name}.{field}', getattr(own, field))
    for field in ('context_length', 'vocab_size')
  ]


def _decoder_text_meets(config: UnclipConfig) -> list[tuple[str, int, str, int | None]]:
  """What a decoder expects of the text encoder that is its own."""
  own, decoder = config.decoder_text, config.decoder
  if isinstance(decoder, StableUnclipDecoderConfig):
    name, wanted = 'decoder.unet.context_dim', decoder.unet.context_dim
  elif isinstance(decoder, KandinskyDecoderConfig) and decoder.text_width is not None:
    name, wanted = 'decoder.text_width', decoder.text_width
  elif own is None:
    return []
  else:
    raise UnclipError('there is a decoder_text, but the decoder reads nothing of it')
  if own is None:
    raise UnclipError(f'there is no decoder_text: the decoder expects states of {name} {wanted}')
  meet: list[tuple[str, int, str, int | None]] = [('decoder_text.width', own.width, name, wanted)]
  if isinstance(own, XlmRobertaConfig):
    names = 'decoder_text.embed_dim', 'decoder.text_embed_dim'
    meet.append((names[0], own.embed_dim, names[1], getattr(decoder, 'text_embed_dim', None)))
  return meet


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
  most = diffusion.threshold_max
  if most is not None and (percentile is None or not most >= 1):
    raise UnclipError(
      f'{name}.diffusion.threshold_max is {most:g}: take 1 or more, beside a dynamic_threshold'
    )


def _check_channels(name: str, unet: UNetConfig | LatentUNetConfig, learned_variance: bool) -> None:
  wanted = unet.in_channels * (2 if learned_variance else 1)
  if unet.out_channels != wanted:
    variance = 'learned' if learned_variance else 'not learned'
    raise UnclipError(
      f'{name}.out_channels is {unet.out_channels}: with {unet.in_channels} in_channels and a '
      f'variance that is {variance} it must be {wanted}'
    )


def _check_latent_unet(name: str, unet: LatentUNetConfig, learned_variance: bool) -> None:
  _check_channels(name, unet, learned_variance)
  levels = len(unet.multipliers)
  for field in ('num_heads', 'depths'):
    if len(getattr(unet, field)) != levels:
      raise UnclipError(f'{name}.{field} has {len(getattr(unet, field))} numbers: take {levels}')
  for multiplier, heads in zip(unet.multipliers, unet.num_heads, strict=True):
    _check_heads(name, unet.channels * multiplier, heads)


def _check_unet(name: str, unet: UNetConfig, learned_variance: bool) -> None:
  _check_channels(name, unet, learned_variance)
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
