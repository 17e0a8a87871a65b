"""The ADM U-Net of Karlo and Kandinsky as diffusers saves it.

That is a `UNet2DConditionModel` or a `UNet2DModel` whose blocks resample within residuals.
"""

from collections.abc import Sequence
from typing import Any

from unclip_jax.configs import UNetConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights import layouts
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.rules import (
  Rule,
  conv,
  dense,
  group_norm,
  heads_in,
  heads_out,
  same,
)

_PLAIN, _ATTENTION = (
  ('ResnetDownsampleBlock2D', 'ResnetUpsampleBlock2D'),
  (
    'SimpleCrossAttnDownBlock2D',
    'SimpleCrossAttnUpBlock2D',
  ),
)
_SCALE_SHIFT = {'scale_shift': True, 'default': False}
# Of both classes.
_EXPECTED = {
  'center_input_sample': False,
  'flip_sin_to_cos': True,
  'freq_shift': 0,
  'mid_block_scale_factor': 1,
  'act_fn': 'silu',
  'norm_eps': 1e-5,
  'time_embedding_type': 'positional',
  'time_embedding_dim': None,
  'num_class_embeds': None,
}
# Of `UNet2DConditionModel`; those that say nothing there are refused by `Fields.done`.
_CONDITION_EXPECTED = {
  'only_cross_attention': False,
  'conv_in_kernel': 3,
  'conv_out_kernel': 3,
  'resnet_out_scale_factor': 1.0,
  'attention_type': 'default',
}
# Of blocks and embeddings that these networks have not, or of a precision that ours has anyway.
_IGNORED = (
  'downsample_padding',
  'downsample_type',
  'upsample_type',
  'upcast_attention',
  'addition_embed_type_num_heads',
  'transformer_layers_per_block',
  'num_train_timesteps',
  'use_linear_projection',
)


def read_condition_config(
  fields: Fields, default_size: int | None = None
) -> tuple[UNetConfig, int]:
  """The U-Net of a `UNet2DConditionModel`, and its size in pixels; leaves what embeds to others.

  Args:
    fields: of its config.json, without those that say what is projected and embedded.
    default_size: where the file tells none; None: it has to.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields.expect(
    **_EXPECTED,
    **_CONDITION_EXPECTED,
    mid_block_type='UNetMidBlock2DSimpleCrossAttn',
  )
  levels = _attention_levels(fields)
  if not levels:
    raise UnclipError(f'{fields.where}: no level of its U-Net has attention: it cannot be opened')
  config = _read_unet(
    fields,
    levels,
    head_dim=fields.take('attention_head_dim'),
    context_dim=fields.take('cross_attention_dim'),
  )
  return config, fields.take('sample_size', default_size)


def read_unconditional_config(fields: Fields, condition_channels: int) -> tuple[UNetConfig, int]:
  """The U-Net of a `UNet2DModel` that is given an image, and its size in pixels.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields.expect(
    **_EXPECTED,
    mid_block_type='UNetMidBlock2D',
    add_attention=False,
    class_embed_type=None,
  )
  fields.ignore(('attention_head_dim', 'attn_norm_num_groups'))
  if _attention_levels(fields):
    raise UnclipError(f'{fields.where}: an upsampler with attention cannot be opened')
  config = _read_unet(fields, (), condition_channels=condition_channels)
  return config, fields.take('sample_size')


def write_config(config: UNetConfig, image_size: int) -> dict[str, Any]:
  """The fields of `UNet2DModel`, or of `UNet2DConditionModel` where there is a context.

  Raises:
    UnclipError: diffusers has no such network.
  """
  if config.patch_size != 1:
    raise UnclipError(
      f'diffusers has no U-Net that folds {config.patch_size} x {config.patch_size} pixels into '
      'channels (patch_size): train one with a patch_size of 1'
    )
  if config.multipliers[0] != 1:
    raise UnclipError(
      f'diffusers has no U-Net whose multipliers begin with {config.multipliers[0]}: with 1 alone'
    )
  has_attention = [level in config.attention_levels for level in range(len(config.multipliers))]
  channels = [config.channels * m for m in config.multipliers]
  values = {
    'sample_size': image_size,
    'in_channels': config.in_channels + config.condition_channels,
    'out_channels': config.out_channels,
    'block_out_channels': channels,
    'layers_per_block': config.num_res_blocks,
    'down_block_types': [(_ATTENTION if a else _PLAIN)[0] for a in has_attention],
    'up_block_types': [(_ATTENTION if a else _PLAIN)[1] for a in reversed(has_attention)],
    'resnet_time_scale_shift': 'scale_shift' if config.scale_shift else 'default',
    'norm_num_groups': config.num_groups,
    'norm_eps': 1e-5,
    'act_fn': 'silu',
    'dropout': config.dropout,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
  }
  if config.context_dim is None:
    if any(has_attention):
      raise UnclipError('diffusers has no U-Net whose attention sees no context')
    return {'_class_name': 'UNet2DModel', **values, 'add_attention': False}
  return {
    '_class_name': 'UNet2DConditionModel',
    **values,
    'mid_block_type': 'UNetMidBlock2DSimpleCrossAttn',
    'attention_head_dim': config.head_dim,
    'cross_attention_dim': config.context_dim,
  }


def rules(config: UNetConfig, ours: str, theirs: str = '') -> list[Rule]:
  """The tensors of either class; `ours` and `theirs` are put before each name."""
  result = [
    *dense(f'{ours}time_mlp.in_proj', f'{theirs}time_embedding.linear_1'),
    *dense(f'{ours}time_mlp.out_proj', f'{theirs}time_embedding.linear_2'),
    *group_norm(f'{ours}norm_out', f'{theirs}conv_norm_out'),
    *conv(f'{ours}conv_out', f'{theirs}conv_out'),
  ]
  if config.condition_channels:  # a convolution of [x_t, image] is one of each
    kernels = (f'{ours}conv_in.kernel', f'{ours}conv_condition.kernel')
    layout = layouts.split_inputs(config.in_channels)
    result += [
      Rule(kernels, (f'{theirs}conv_in.weight',), layout),
      same(f'{ours}conv_in.bias', f'{theirs}conv_in.bias'),
    ]
  else:
    result += conv(f'{ours}conv_in', f'{theirs}conv_in')
  levels, n = len(config.multipliers), config.num_res_blocks
  for level in range(levels):
    down, up = f'{theirs}down_blocks.{level}', f'{theirs}up_blocks.{levels - 1 - level}'
    widens = level > 0 and config.multipliers[level] != config.multipliers[level - 1]
    for i in range(n):
      result += res_block(
        f'{ours}down_blocks_{level}_{i}', f'{down}.resnets.{i}', i == 0 and widens
      )
    for i in range(n + 1):
      result += res_block(f'{ours}up_blocks_{level}_{i}', f'{up}.resnets.{i}', True)
    if level in config.attention_levels:
      for i in range(n):
        name = f'{ours}down_attention_{level}_{i}'
        result += _attention(name, f'{down}.attentions.{i}', config)
      for i in range(n + 1):
        result += _attention(f'{ours}up_attention_{level}_{i}', f'{up}.attentions.{i}', config)
    if level < levels - 1:
      result += res_block(f'{ours}downsamplers_{level}', f'{down}.downsamplers.0', False)
    if level > 0:
      result += res_block(f'{ours}upsamplers_{level - 1}', f'{up}.upsamplers.0', False)
  for i in range(2):
    result += res_block(f'{ours}middle_blocks_{i}', f'{theirs}mid_block.resnets.{i}', False)
  if config.attention_levels:
    result += _attention(f'{ours}middle_attention', f'{theirs}mid_block.attentions.0', config)
  return result


def res_block(ours: str, theirs: str, has_skip: bool) -> list[Rule]:
  """A `ResnetBlock2D` with a timestep; `has_skip` where it changes the channels."""
  return [
    *group_norm(f'{ours}.norm_in', f'{theirs}.norm1'),
    *conv(f'{ours}.conv_in', f'{theirs}.conv1'),
    *dense(f'{ours}.emb_proj', f'{theirs}.time_emb_proj'),
    *group_norm(f'{ours}.norm_out', f'{theirs}.norm2'),
    *conv(f'{ours}.conv_out', f'{theirs}.conv2'),
    *(conv(f'{ours}.skip', f'{theirs}.conv_shortcut') if has_skip else []),
  ]


def _read_unet(
  fields: Fields,
  attention_levels: tuple[int, ...],
  head_dim: int = 64,
  context_dim: int | None = None,
  condition_channels: int = 0,
) -> UNetConfig:
  channels = fields.take_numbers('block_out_channels')
  if channels[0] < 1 or any(width % channels[0] for width in channels):
    raise UnclipError(
      f'{fields.where}: block_out_channels {list(channels)} are no multiples of the first'
    )
  config = UNetConfig(
    in_channels=fields.take('in_channels') - condition_channels,
    out_channels=fields.take('out_channels'),
    channels=channels[0],
    multipliers=tuple(width // channels[0] for width in channels),
    num_res_blocks=fields.take('layers_per_block'),
    attention_levels=attention_levels,
    head_dim=head_dim,
    context_dim=context_dim,
    condition_channels=condition_channels,
    scale_shift=fields.choose('resnet_time_scale_shift', _SCALE_SHIFT, 'default'),
    dropout=fields.take('dropout', 0.0),
    num_groups=fields.take('norm_num_groups', 32),
  )
  fields.ignore(_IGNORED)
  return config


def _attention_levels(fields: Fields) -> tuple[int, ...]:
  """The levels with attention, the same on the way down and up."""
  down = fields.take('down_block_types', [])
  up = fields.take('up_block_types', [])
  for names, known in ((down, 0), (up, 1)):
    for name in names:
      if name not in (_PLAIN[known], _ATTENTION[known]):
        raise UnclipError(
          f'{fields.where}: a block {name!r}: only {_PLAIN[known]} and {_ATTENTION[known]} can be '
          'opened'
        )
  levels = [level for level, name in enumerate(down) if name == _ATTENTION[0]]
  if [len(up) - 1 - i for i, name in enumerate(up) if name == _ATTENTION[1]][::-1] != levels:
    raise UnclipError(f'{fields.where}: up_block_types {up} do not mirror down_block_types {down}')
  return tuple(levels)


def _attention(ours: str, theirs: str, config: UNetConfig) -> list[Rule]:
  def projections(names: Sequence[str]) -> list[str]:
    return [f'{theirs}.{name}' for name in names]

  head_dim = config.head_dim
  return [
    *group_norm(f'{ours}.norm', f'{theirs}.group_norm'),
    *heads_in(f'{ours}.qkv', projections(['to_q', 'to_k', 'to_v']), head_dim),
    *heads_in(f'{ours}.context_kv', projections(['add_k_proj', 'add_v_proj']), head_dim),
    *heads_out(f'{ours}.out_proj', f'{theirs}.to_out.0', head_dim),
  ]
