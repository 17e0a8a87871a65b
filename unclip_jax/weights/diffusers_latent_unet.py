"""Stable Diffusion's U-Net as diffusers saves it, a `UNet2DConditionModel`: config and tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.configs import LatentUNetConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.diffusers_unet import res_block
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.layouts import Layout
from unclip_jax.weights.rules import (
  Rule,
  conv,
  dense,
  group_norm,
  heads_in,
  heads_out,
  layer_norm,
  same,
)

_CLASS_NAME = 'UNet2DConditionModel'
_DOWN = {'CrossAttnDownBlock2D': True, 'DownBlock2D': False}  # with attention or without
_UP = {'CrossAttnUpBlock2D': True, 'UpBlock2D': False}
_PROJECTION_DIM = 'projection_class_embeddings_input_dim'
# What ours always does; each is also the default of diffusers.
_FIXED = {
  'center_input_sample': False,
  'flip_sin_to_cos': True,  # cosines first
  'freq_shift': 0,
  'mid_block_type': 'UNetMidBlock2DCrossAttn',
  'downsample_padding': 1,
  'mid_block_scale_factor': 1,
  'norm_eps': 1e-5,
  'reverse_transformer_layers_per_block': None,
  'encoder_hid_dim': None,
  'encoder_hid_dim_type': None,
  'dual_cross_attention': False,
  'addition_embed_type': None,
  'num_class_embeds': None,
  'resnet_time_scale_shift': 'default',
  'resnet_skip_time_act': False,
  'resnet_out_scale_factor': 1.0,
  'time_embedding_type': 'positional',
  'time_embedding_act_fn': None,
  'timestep_post_act': None,
  'time_cond_proj_dim': None,
  'conv_in_kernel': 3,
  'conv_out_kernel': 3,
  'attention_type': 'default',
  'class_embeddings_concat': False,
  'cross_attention_norm': None,
}
# To diffusers null is not the default of these, but leaves layers out.
_NOT_NULL = ('mid_block_type', 'norm_num_groups')
# Without an effect on what a network of these blocks computes. Products of attention are summed in
# float32 here whatever their type, which is what `upcast_attention` asks for.
_IGNORED = (
  'sample_size',
  'upcast_attention',
  'addition_embed_type_num_heads',
  'addition_time_embed_dim',
)
# A 1x1 convolution as a linear layer: the reshape fails unless height and width are of size 1.
_POINTWISE = Layout(
  lambda theirs: tuple(x.reshape(x.shape[:2]).T for x in theirs),
  lambda ours: tuple(x.T[:, :, None, None] for x in ours),
)


class _UNetFields(Fields):
  """Fields that diffusers has as one value for all levels of a U-Net, or as one for each."""

  def __init__(self, values: Mapping[str, Any], where: str):
    super().__init__(values, where)
    self.values = values
    self.widths = self.take_numbers('block_out_channels', (320, 640, 1280, 1280))
    for width in self.widths:
      self.check_positive('block_out_channels', width)

  def error(self, name: str, remark: str) -> UnclipError:
    return UnclipError(f'{self.where}: {name} is {self.values.get(name)!r}: {remark}')

  def check_positive(self, name: str, number: Any) -> int:
    if type(number) is not int or number < 1:
      raise self.error(name, 'only whole numbers above 0 can be opened')
    return number

  def take_positive(self, name: str, default: int | None = None) -> int:
    return self.check_positive(name, self.take(name, default))

  def take_levels(self, name: str, default: int) -> tuple[int, ...]:
    if not isinstance(self.values.get(name), list | tuple):
      return (self.take_positive(name, default),) * len(self.widths)
    numbers = self.take_numbers(name)
    self._check_levels(name, len(numbers))
    return tuple(self.check_positive(name, number) for number in numbers)

  def take_common(self, name: str, default: int) -> int:
    """A number that has to be the same at each level."""
    numbers = self.take_levels(name, default)
    if len(set(numbers)) > 1:
      raise self.error(name, 'only one number for all levels can be opened')
    return numbers[0]

  def take_blocks(
    self, name: str, known: Mapping[str, bool], default: Sequence[str]
  ) -> tuple[bool, ...]:
    """What the block of each level has, by its type."""
    words = self.values.get(name, default)
    if not isinstance(words, list | tuple) or any(word not in list(known) for word in words):
      raise self.error(name, f'only {" and ".join(known)} can be opened')
    self._check_levels(name, len(words))
    self.ignore((name,))
    return tuple(known[word] for word in words)

  def _check_levels(self, name: str, found: int) -> None:
    if found != len(self.widths):
      raise self.error(name, f'block_out_channels has {len(self.widths)} levels')


def read_config(values: Mapping[str, Any], where: str = 'unet/config.json') -> LatentUNetConfig:
  """The config of a `UNet2DConditionModel`; a field that is absent has diffusers' default.

  Args:
    values: of its `config.json`.
    where: what they are from, for messages.

  Raises:
    UnclipError: a field asks for what ours does not do; names it and its value.
  """
  if (name := values.get('_class_name', _CLASS_NAME)) != _CLASS_NAME:
    raise UnclipError(f'{where}: _class_name is {name!r}: only {_CLASS_NAME!r} can be opened')
  fields = _UNetFields(values, where)
  for name in _NOT_NULL:
    if name in values and values[name] is None:
      raise fields.error(name, 'a U-Net without these layers cannot be opened')
  widths = fields.widths
  levels, channels = len(widths), widths[0]
  if any(width % channels for width in widths):
    raise fields.error('block_out_channels', 'only multiples of the first can be opened')
  with_attention, without = _DOWN
  down = fields.take_blocks('down_block_types', _DOWN, [*[with_attention] * 3, without])
  with_attention, without = _UP
  up = fields.take_blocks('up_block_types', _UP, [without, *[with_attention] * 3])
  if up[::-1] != down:
    raise fields.error('up_block_types', 'only attention at the levels of down_block_types')
  # Numbers of heads go by the name of a width, a slip that diffusers cannot take back; a config
  # that names them rightly means the same.
  is_named = values.get('num_attention_heads') is not None
  heads_name = 'num_attention_heads' if is_named else 'attention_head_dim'
  num_heads = fields.take_levels(heads_name, 8)
  for level, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
    if (down[level] or level == levels - 1) and width % heads:
      raise fields.error(heads_name, f'{heads} heads do not divide {width} channels')
  num_groups = fields.take_positive('norm_num_groups', 32)
  if any(width % num_groups for width in widths):
    raise fields.error('norm_num_groups', f'it does not divide the channels {list(widths)}')
  dropout = fields.take('dropout', 0.0)
  if not 0 <= dropout < 1:
    raise fields.error('dropout', 'only a part of 1 can be opened')
  has_class = fields.choose('class_embed_type', {None: False, 'projection': True})
  config = LatentUNetConfig(
    in_channels=fields.take_positive('in_channels', 4),
    out_channels=fields.take_positive('out_channels', 4),
    channels=channels,
    multipliers=tuple(width // channels for width in widths),
    num_res_blocks=fields.take_common('layers_per_block', 2),
    attention_levels=tuple(level for level in range(levels) if down[level]),
    num_heads=num_heads,
    depths=fields.take_levels('transformer_layers_per_block', 1),
    context_dim=fields.take_common('cross_attention_dim', 1280),
    class_dim=fields.take_positive(_PROJECTION_DIM) if has_class else 0,
    linear_projection=fields.take('use_linear_projection', False),
    dropout=dropout,
    num_groups=num_groups,
  )
  fields.choose('act_fn', {'silu': None, 'swish': None}, 'silu')
  fields.choose('time_embedding_dim', {None: None, config.emb_dim: None})
  fields.choose('mid_block_only_cross_attention', {None: None, False: None})
  if values.get('only_cross_attention', False) not in (False, [False] * levels):
    raise fields.error('only_cross_attention', 'only False can be opened')
  fields.expect(**_FIXED)
  fields.ignore((*_IGNORED, 'only_cross_attention', 'attention_head_dim', 'num_attention_heads'))
  fields.ignore((_PROJECTION_DIM,))  # diffusers, too, looks at it beside a class_embed_type only
  fields.done()
  return config


def write_config(config: LatentUNetConfig) -> dict[str, Any]:
  """The inverse of `read_config`, but for `sample_size`, which no network depends on.

  Raises:
    UnclipError: the first level is wider than the first convolution, which diffusers cannot do.
  """
  if config.multipliers[0] != 1:
    raise UnclipError(
      f'multipliers are {config.multipliers}: in diffusers the first level is as wide as the first '
      'convolution, a multiplier of 1'
    )
  has_attention = [level in config.attention_levels for level in range(len(config.multipliers))]
  down = {has: name for name, has in _DOWN.items()}
  up = {has: name for name, has in _UP.items()}
  return {
    '_class_name': _CLASS_NAME,
    **_FIXED,
    'in_channels': config.in_channels,
    'out_channels': config.out_channels,
    'block_out_channels': [config.channels * m for m in config.multipliers],
    'layers_per_block': config.num_res_blocks,
    'down_block_types': [down[has] for has in has_attention],
    'up_block_types': [up[has] for has in reversed(has_attention)],
    'only_cross_attention': False,
    'attention_head_dim': list(config.num_heads),
    'transformer_layers_per_block': list(config.depths),
    'cross_attention_dim': config.context_dim,
    'class_embed_type': 'projection' if config.class_dim else None,
    _PROJECTION_DIM: config.class_dim or None,
    'use_linear_projection': config.linear_projection,
    'upcast_attention': True,  # Stable Diffusion 2.1 overflows float16 without it
    'act_fn': 'silu',
    'dropout': config.dropout,
    'norm_num_groups': config.num_groups,
  }


def rules(config: LatentUNetConfig) -> list[Rule]:
  """Of the tensors of a `UNet2DConditionModel`."""
  widths = [config.channels * m for m in config.multipliers]
  levels, n = len(widths), config.num_res_blocks
  result = [
    *dense('time_mlp.in_proj', 'time_embedding.linear_1'),
    *dense('time_mlp.out_proj', 'time_embedding.linear_2'),
    *conv('conv_in', 'conv_in'),
    *group_norm('norm_out', 'conv_norm_out'),
    *conv('conv_out', 'conv_out'),
  ]
  if config.class_dim:
    result += dense('class_in_proj', 'class_embedding.linear_1')
    result += dense('class_out_proj', 'class_embedding.linear_2')
  for level, width in enumerate(widths):
    down, up = f'down_blocks.{level}', f'up_blocks.{levels - 1 - level}'
    before = widths[level - 1] if level else config.channels
    has_attention = level in config.attention_levels
    for i in range(n):
      skip = i == 0 and before != width
      result += res_block(f'down_blocks_{level}_{i}', f'{down}.resnets.{i}', skip)
      if has_attention:
        ours = f'down_attention_{level}_{i}'
        result += _transformer(ours, f'{down}.attentions.{i}', config, level)
    for i in range(n + 1):
      result += res_block(f'up_blocks_{level}_{i}', f'{up}.resnets.{i}', has_skip=True)
      if has_attention:
        ours = f'up_attention_{level}_{i}'
        result += _transformer(ours, f'{up}.attentions.{i}', config, level)
    if level < levels - 1:
      result += conv(f'downsamplers_{level}', f'{down}.downsamplers.0.conv')
    if level > 0:
      result += conv(f'upsamplers_{level - 1}', f'{up}.upsamplers.0.conv')
  for i in range(2):
    result += res_block(f'middle_blocks_{i}', f'mid_block.resnets.{i}', has_skip=False)
  return result + _transformer('middle_attention', 'mid_block.attentions.0', config, levels - 1)


def _transformer(ours: str, theirs: str, config: LatentUNetConfig, level: int) -> list[Rule]:
  head_dim = config.channels * config.multipliers[level] // config.num_heads[level]
  projection = dense if config.linear_projection else _pointwise
  result = [
    *group_norm(f'{ours}.norm', f'{theirs}.norm'),
    *projection(f'{ours}.in_proj', f'{theirs}.proj_in'),
    *projection(f'{ours}.out_proj', f'{theirs}.proj_out'),
  ]
  for i in range(config.depths[level]):
    block, layer = f'{ours}.blocks_{i}', f'{theirs}.transformer_blocks.{i}'
    qkv, kv = [f'{layer}.attn1.to_{x}' for x in 'qkv'], [f'{layer}.attn2.to_{x}' for x in 'kv']
    result += [
      *layer_norm(f'{block}.self_norm', f'{layer}.norm1'),
      *heads_in(f'{block}.self_qkv', qkv, head_dim, bias=False),
      *heads_out(f'{block}.self_out', f'{layer}.attn1.to_out.0', head_dim),
      *layer_norm(f'{block}.context_norm', f'{layer}.norm2'),
      *dense(f'{block}.context_q', f'{layer}.attn2.to_q', bias=False),
      *heads_in(f'{block}.context_kv', kv, head_dim, bias=False),
      *heads_out(f'{block}.context_out', f'{layer}.attn2.to_out.0', head_dim),
      *layer_norm(f'{block}.mlp_norm', f'{layer}.norm3'),
      *dense(f'{block}.mlp_in', f'{layer}.ff.net.0.proj'),
      *dense(f'{block}.mlp_out', f'{layer}.ff.net.2'),
    ]
  return result


def _pointwise(ours: str, theirs: str) -> list[Rule]:
  """A 1x1 convolution that is a linear layer of ours."""
  kernel = Rule((f'{ours}.kernel',), (f'{theirs}.weight',), _POINTWISE)
  return [kernel, same(f'{ours}.bias', f'{theirs}.bias')]
