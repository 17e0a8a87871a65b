"""GLIDE (filtered) as OpenAI's release saves it: a state dict a network, and no config beside it.

Sizes are read from names and shapes; whether a network inpaints, from the channels of its first
convolution. What these do not tell is as in `GLIDE`.
"""

import dataclasses
from collections.abc import Mapping

from unclip_jax.configs import (
  DiffusionConfig,
  GlideDecoderConfig,
  GlideUpsamplerConfig,
  SamplingConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
)
from unclip_jax.weights import adm
from unclip_jax.weights.rules import Rule, Tensors, dense, layer_norm, same

BASE, UPSAMPLE = 'base', 'upsample'
# The part that holds each stage.
STAGE_PARTS: Mapping[str, tuple[str, ...]] = {'decoder': (BASE,), 'upsampler_0': (UPSAMPLE,)}

_TEXT = TextConfig(vocab_size=50257, context_length=128, width=512, depth=16, num_heads=8)
_UNET = UNetConfig(
  in_channels=3,
  out_channels=6,
  channels=192,
  multipliers=(1, 2, 3, 4),
  num_res_blocks=3,
  attention_levels=(1, 2, 3),
  head_dim=adm.HEAD_DIM,
  context_dim=_TEXT.width,
  dropout=0.1,
)
# Of glide-text2im: model_creation.py, and how notebooks/text2im.ipynb samples.
GLIDE = UnclipConfig(
  clip=None,
  prior=None,
  decoder=GlideDecoderConfig(
    image_size=64,
    unet=_UNET,
    diffusion=DiffusionConfig(schedule='cosine', learned_variance=True, clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=100, variance='learned', guidance_scale=3.0),
    text=_TEXT,
  ),
  upsamplers=(
    GlideUpsamplerConfig(
      image_size=256,
      low_size=64,
      unet=dataclasses.replace(
        _UNET,
        multipliers=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(3, 4, 5),
        condition_channels=3,
      ),
      diffusion=DiffusionConfig(schedule='linear', learned_variance=True, clip_x_0=1.0),
      sampling=SamplingConfig(
        num_steps=27, sampler='ddim', spacing='fast27', variance='learned', guidance_scale=1.0
      ),
      text=_TEXT,
      temperature=0.997,
    ),
  ),
)
# What notebooks/inpaint.ipynb does in another way.
_INPAINT_GUIDANCE = 5.0
_INPAINT_UPSAMPLER = 'ddpm'
_INPAINT_CHANNELS = 4  # the known picture and its mask


def read_config(parts: Mapping[str, Tensors], where: str) -> UnclipConfig:
  """The config of a pair of networks, by the names and shapes of their tensors.

  Args:
    parts: the tensors of 'base' and, where it is there, of 'upsample'.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor that tells a size is missing or is of a shape that it cannot have, or the
      two are not of one pair.
  """
  base, upsamplers = _read_base(_network(parts, BASE, where)), ()
  if UPSAMPLE in parts:
    net = _network(parts, UPSAMPLE, where)
    upsamplers = (_read_upsampler(net, base.image_size),)
    _check_pair(net, base, upsamplers[0])
  return dataclasses.replace(GLIDE, decoder=base, upsamplers=upsamplers)


def rules(config: UnclipConfig) -> dict[str, list[Rule]]:
  """The rules of each stage; the names of tensors are after those of their part and a slash."""
  result = {'decoder': _rules(config.decoder, BASE)}
  for upsampler in config.upsamplers:
    result['upsampler_0'] = _rules(upsampler, UPSAMPLE)
  return result


# --- Sizes.


def _network(parts: Mapping[str, Tensors], part: str, where: str) -> adm.Network:
  return adm.Network(parts[part], '', 'GLIDE', f'{where}: {part}: ')


def _read_base(net: adm.Network) -> GlideDecoderConfig:
  plain = GLIDE.decoder
  text = _read_text(net)
  unet = _read_unet(net, plain.unet, text)
  base = dataclasses.replace(plain, image_size=_image_size(unet), unet=unet, text=text)
  if not _inpaints(unet, plain.unet):
    return base
  sampling = dataclasses.replace(base.sampling, guidance_scale=_INPAINT_GUIDANCE)
  return dataclasses.replace(base, sampling=sampling)


def _read_upsampler(net: adm.Network, low_size: int) -> GlideUpsamplerConfig:
  plain = GLIDE.upsamplers[0]
  text = _read_text(net)
  unet = _read_unet(net, plain.unet, text)
  upsampler = dataclasses.replace(
    plain, image_size=_image_size(unet), low_size=low_size, unet=unet, text=text
  )
  if not _inpaints(unet, plain.unet):
    return upsampler
  sampling = dataclasses.replace(upsampler.sampling, sampler=_INPAINT_UPSAMPLER)
  return dataclasses.replace(upsampler, sampling=sampling)


def _check_pair(
  net: adm.Network, base: GlideDecoderConfig, upsampler: GlideUpsamplerConfig
) -> None:
  text, other = base.text, upsampler.text
  if (other.vocab_size, other.context_length) != (text.vocab_size, text.context_length):
    raise net.error(
      f'it reads {other.context_length} tokens out of {other.vocab_size}, the base '
      f'{text.context_length} out of {text.vocab_size}: take the upsampler of that base'
    )
  if upsampler.image_size <= base.image_size:
    raise net.error(
      f'it paints {upsampler.image_size} pixels a side, the base {base.image_size}: take the '
      'upsampler of that base'
    )
  pairs = ((base, GLIDE.decoder), (upsampler, GLIDE.upsamplers[0]))
  if len({_inpaints(one.unet, plain.unet) for one, plain in pairs}) > 1:
    raise net.error('of it and the base one inpaints, the other does not: take both of one pair')


def _read_text(net: adm.Network) -> TextConfig:
  vocab_size, width = net.shape('token_embedding.weight', 2)
  if width % adm.HEAD_DIM:
    raise net.error(
      f"its Transformer is {width} wide, no multiple of the {adm.HEAD_DIM} that a head of GLIDE's "
      'has'
    )
  return dataclasses.replace(
    _TEXT,
    vocab_size=vocab_size,
    context_length=net.shape('positional_embedding', 2)[0],
    width=width,
    depth=net.count(r'transformer\.resblocks\.(\d+)\.'),
    num_heads=width // adm.HEAD_DIM,
  )


def _read_unet(net: adm.Network, known: UNetConfig, text: TextConfig) -> UNetConfig:
  first = 'input_blocks.0.0.weight'
  plain = known.in_channels + known.condition_channels
  found = net.shape(first, 4)[1]
  if found not in (plain, plain + _INPAINT_CHANNELS):
    raise net.error(
      f'{first} takes {found} channels: it must be {plain}, or {plain + _INPAINT_CHANNELS} to '
      'inpaint'
    )
  condition_channels = found - known.in_channels
  known = dataclasses.replace(known, condition_channels=condition_channels, context_dim=text.width)
  unet = adm.read_unet(net, known)
  if unet.out_channels != known.out_channels:
    raise net.error(
      f'out.2.weight has {unet.out_channels} rows: it must have {known.out_channels}, of the noise '
      'and of its variance'
    )
  return unet


def _image_size(unet: UNetConfig) -> int:
  """As in model_creation.py: the last level is always of 8 pixels a side."""
  return 8 * 2 ** (len(unet.multipliers) - 1)


def _inpaints(unet: UNetConfig, plain: UNetConfig) -> bool:
  return unet.condition_channels > plain.condition_channels


# --- Names.


def _rules(config: GlideDecoderConfig | GlideUpsamplerConfig, part: str) -> list[Rule]:
  theirs = f'{part}/'
  return [
    same('text_encoder.tokens.embedding', f'{theirs}token_embedding.weight'),
    same('text_encoder.positions', f'{theirs}positional_embedding'),
    same('text_encoder.padding', f'{theirs}padding_embedding'),
    *adm.transformer_rules(config.text.depth, 'text_encoder.', theirs),
    *layer_norm('text_encoder.norm', f'{theirs}final_ln'),
    *dense('text_to_emb', f'{theirs}transformer_proj'),
    *adm.unet_rules(config.unet, 'unet.', theirs),
  ]
