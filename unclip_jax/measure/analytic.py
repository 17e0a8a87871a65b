"""FLOPs of the stages in closed form, from their configs: what a compiler's count is held against.

Matrix products and convolutions alone, a multiply-add as two operations. A convolution is counted
where a weight meets a pixel: at the border, where it meets padding, it does less. Everything is
counted as often as sampling needs it: what a prompt gives, and the timestep embeddings of a plan,
once; the rest at each step, for twice the batch where it is guided.

Where the residual blocks of a U-Net have their 3x3 convolutions by Winograd's minimal filtering
(`nn/convolution.py`; on CPUs, in float32), these are counted by the products that it makes: `tiled`
says where, by the pixels of the batch and the channels on either side. None is nowhere.
"""

import dataclasses
from collections.abc import Callable

from unclip_jax.configs import (
  ArPriorConfig,
  ClipConfig,
  DecoderConfig,
  PriorConfig,
  TextConfig,
  UNetConfig,
  UpsamplerConfig,
  ViTConfig,
)

Tiled = Callable[[int, int, int], int]
_SUFFIX = 3  # what the prior runs at each step: the timestep, the noised z_i, the query


def prior_flops(
  config: PriorConfig, batch: int, num_steps: int, is_guided: bool, num_candidates: int = 1
) -> float:
  """Of drawing `num_candidates` z_i for each of `batch` captions."""
  width, length = config.width, config.context_length + 1
  pair = 2 if is_guided else 1
  once = batch * pair * (_dense(config.context_length, config.text_width, width))
  once += batch * pair * _dense(1, config.embed_dim, width)
  # Of the last block only keys and values are kept: what else it computes is dropped, but for the
  # queries, which one product gives with them.
  blocks = (config.depth - 1) * _block(length, length, width, 4 * width)
  once += batch * pair * (blocks + _dense(length, width, 3 * width))
  once += 2 * _dense(num_steps, width, width)
  step = _dense(1, config.embed_dim, width) + _dense(1, width, config.embed_dim)
  step += config.depth * _block(_SUFFIX, length + _SUFFIX, width, 4 * width)
  rows = batch * num_candidates
  rerank = rows * _dense(1, config.embed_dim, 1) if num_candidates > 1 else 0
  return once + num_steps * rows * pair * step + rerank


def decoder_flops(
  config: DecoderConfig,
  batch: int,
  num_steps: int,
  is_guided: bool,
  text_length: int | None = None,
  tiled: Tiled | None = None,
) -> float:
  """Of drawing `batch` images from their z_i and captions.

  Args:
    config: the decoder's.
    batch: b.
    num_steps: evaluations of the U-Net.
    is_guided: whether each is of a pair.
    text_length: positions of a caption; None takes those of the decoder's own text encoder, which
      a config without one has to be told.
    tiled: see above.

  Raises:
    ValueError: there is neither.
  """
  unet = config.unet
  length = text_length if config.text is None else config.text.context_length
  if length is None:
    raise ValueError('a decoder that reads the states of CLIP needs their text_length')
  pair = 2 if is_guided else 1
  given = _decoder_given(config, length)
  step = _unet_flops(unet, config.image_size, config.num_image_tokens + length, batch * pair, tiled)
  return _time_flops(unet, num_steps) + batch * pair * given + num_steps * step


def upsampler_flops(
  config: UpsamplerConfig, batch: int, num_steps: int, tiled: Tiled | None = None
) -> float:
  """Of drawing `batch` large images."""
  unet = config.unet
  side = config.image_size // unet.patch_size
  condition = _conv(side, 3, unet.condition_channels * unet.patch_size**2, unet.channels)
  networks = 2 if config.final_unet else 1
  once = networks * (_time_flops(unet, num_steps) + batch * condition)
  # The small image is resized by products with matrices of weights, rows first.
  small, large = config.low_size, config.image_size
  once += batch * unet.in_channels * (_dense(large, small, small) + _dense(large, small, large))
  return once + num_steps * _unet_flops(unet, config.image_size, 0, batch, tiled)


def training_flops(
  config: ClipConfig | PriorConfig | ArPriorConfig | DecoderConfig | UpsamplerConfig,
  batch: int,
  text_length: int | None = None,
  passes: int = 3,
) -> float | None:
  """Of an update: the evaluations of the loss that its gradient takes the time of.

  Args:
    config: of a stage.
    batch: b.
    text_length: of `decoder_flops`.
    passes: three, as a gradient takes two; four at most where activations are computed again, all
      but the last of each block. SAM takes five evaluations and three gradients, eleven passes.

  Returns:
    None of a CLIP with an image tower that nobody has counted.
  """
  match config:
    case ClipConfig():
      if config.text is None or not isinstance(config.vision, ViTConfig):
        return None
      one = _clip_flops(config, batch)
    case PriorConfig():
      t, width = config.context_length, config.width
      one = _dense(t, config.text_width, width) + 2 * _dense(1, config.embed_dim, width)
      one += 2 * _dense(1, width, width) + _dense(1, width, config.embed_dim)
      one += _one_pass(t + 1 + _SUFFIX, 1, width, config.depth)
    case ArPriorConfig():
      t, k, width = config.context_length, config.num_components, config.width
      text_width = config.text_width if config.text is None else config.text.width
      one = 0.0 if config.text is None else _text_flops(config.text)
      one += _dense(t, text_width, width) + _dense(1, config.embed_dim, width)
      one += _one_pass(t + 1 + k, k, width, config.depth) + _dense(k, width, config.num_buckets)
    case DecoderConfig():
      one = decoder_flops(config, 1, 1, False, text_length)
    case UpsamplerConfig():
      side = round(config.image_size * config.crop_fraction)
      low = side * config.low_size // config.image_size
      one = upsampler_flops(dataclasses.replace(config, image_size=side, low_size=low), 1, 1)
      one *= 2 if config.final_unet else 1
  return passes * batch * one


def _clip_flops(config: ClipConfig, batch: int) -> float:
  """Of a pair, its part of the logits of all included."""
  text, vision = config.text, config.vision
  patches = (vision.image_size // vision.patch_size) ** 2
  mlp_width = vision.mlp_width or 4 * vision.width
  flops = _text_flops(text) + _dense(1, text.width, config.embed_dim)
  flops += _dense(patches, 3 * vision.patch_size**2, vision.width)
  flops += vision.depth * _block(patches + 1, patches + 1, vision.width, mlp_width)
  return flops + _dense(1, vision.width, config.embed_dim) + 2 * _dense(1, config.embed_dim, batch)


def _one_pass(length: int, wanted: int, width: int, depth: int) -> float:
  """A Transformer whose last block gives all but those that are wanted keys and values alone."""
  blocks = (depth - 1) * _block(length, length, width, 4 * width)
  blocks += _block(wanted, length, width, 4 * width)
  return blocks + _dense(length - wanted, width, 3 * width)


def _decoder_given(config: DecoderConfig, length: int) -> float:
  """What a decoder does once with a z_i and a caption."""
  unet, text = config.unet, config.text
  given = _dense(1, config.embed_dim, unet.emb_dim + config.num_image_tokens * unet.context_dim)
  if text is None:
    given += _dense(1, config.embed_dim, unet.emb_dim)
    given += _dense(length, config.clip_text_width, unet.context_dim)
    pooled = config.embed_dim
  else:
    given += _text_flops(text) + _dense(1, text.width, unet.emb_dim)
    given += _dense(length, text.width, unet.context_dim) if text.width != unet.context_dim else 0
    pooled = text.width
  if config.draft_size:
    hidden, pixels = config.draft_width, config.draft_size**2 * unet.in_channels
    given += _dense(1, config.embed_dim + pooled, hidden) + _dense(1, hidden, hidden + pixels)
    given += _conv(config.image_size, 3, unet.condition_channels, unet.channels)
  context = config.num_image_tokens + length
  for width in _attention_widths(unet):
    given += _dense(context, unet.context_dim, 2 * width)
  return given


def _dense(rows: int, width: int, out: int) -> float:
  return 2.0 * rows * width * out


def _conv(side: int, kernel: int, channels: int, out: int) -> float:
  """A square one of stride 1 that keeps the size."""
  reach = kernel // 2
  taps = sum(max(0, side - abs(i)) for i in range(-reach, reach + 1))
  return 2.0 * taps**2 * channels * out


def _winograd(side: int, tile: int, channels: int, out: int) -> float:
  """A 3x3 one: a tile of m x m outputs takes (m + 2)^2 products."""
  return 2.0 * (tile + 2) ** 2 * (-(-side // tile)) ** 2 * channels * out


def _attend(t: int, s: int, width: int) -> float:
  """Queries times keys, and their softmax times values, all heads together."""
  return 2 * _dense(t, width, s)


def _block(t: int, s: int, width: int, mlp_width: int) -> float:
  """A block of a Transformer at t positions that see s."""
  return _dense(t, width, 4 * width + 2 * mlp_width) + _attend(t, s, width)


def _text_flops(text: TextConfig) -> float:
  t = text.context_length
  return text.depth * _block(t, t, text.width, text.mlp_width or 4 * text.width)


def _time_flops(unet: UNetConfig, num_steps: int) -> float:
  return _dense(num_steps, unet.channels + unet.emb_dim, unet.emb_dim)


def _widths(unet: UNetConfig) -> list[int]:
  return [unet.channels * m for m in unet.multipliers]


def _attention_widths(unet: UNetConfig) -> list[int]:
  """The channels of each attention layer: on the way down, on the way up, and in the middle."""
  widths = _widths(unet)
  layers = [widths[i] for i in unet.attention_levels for _ in range(2 * unet.num_res_blocks + 1)]
  return [*layers, widths[-1]] if layers else []


def _unet_flops(
  unet: UNetConfig, image_size: int, context: int, rows: int, tiled: Tiled | None
) -> float:
  """One evaluation for so many images."""
  widths, n = _widths(unet), unet.num_res_blocks
  sides = [image_size // unet.patch_size // 2**i for i in range(len(widths))]
  emb_parts = 2 if unet.scale_shift else 1

  def block(side: int, channels: int, out: int) -> float:
    flops = 0.0
    for c in (channels, out):
      tile = 0 if tiled is None else tiled(rows * side**2, c, out)
      flops += _winograd(side, tile, c, out) if tile else _conv(side, 3, c, out)
    flops += _dense(1, unet.emb_dim, emb_parts * out)
    return flops + (_dense(side**2, channels, out) if channels != out else 0)

  def attention(level: int) -> float:
    pixels, width = sides[level] ** 2, widths[level]
    return _dense(pixels, width, 4 * width) + _attend(pixels, context + pixels, width)

  patch = unet.patch_size**2
  flops = _conv(sides[0], 3, unet.in_channels * patch, unet.channels)
  skips, channels = [unet.channels], unet.channels
  for i, width in enumerate(widths):
    for _ in range(n):
      flops += block(sides[i], channels, width)
      flops += attention(i) if i in unet.attention_levels else 0
      channels = width
      skips.append(channels)
    if i + 1 < len(widths):
      flops += block(sides[i + 1], channels, channels)
      skips.append(channels)
  flops += 2 * block(sides[-1], channels, channels)
  flops += attention(len(widths) - 1) if unet.attention_levels else 0
  for i in reversed(range(len(widths))):
    for _ in range(n + 1):
      flops += block(sides[i], channels + skips.pop(), widths[i])
      flops += attention(i) if i in unet.attention_levels else 0
      channels = widths[i]
    if i:
      flops += block(sides[i - 1], channels, channels)
  return rows * (flops + _conv(sides[0], 3, channels, unet.out_channels * patch))
