"""Autoencoders as diffusers saves them: `AutoencoderKL` (Stable unCLIP), `VQModel` (Kandinsky).

Sizes that only diffusers' own tiling reads (`sample_size`) are neither kept nor written.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from unclip_jax.configs import AutoencoderConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.rules import Rule, conv, group_norm, heads_in, heads_out, same

_CLASSES = {'kl': 'AutoencoderKL', 'vq': 'VQModel'}
_DOWN_BLOCKS = ('DownEncoderBlock2D', 'AttnDownEncoderBlock2D')  # without and with attention
_UP_BLOCKS = ('UpDecoderBlock2D', 'AttnUpDecoderBlock2D')
_ATTENTION = ('to_q', 'to_k', 'to_v', 'to_out.0')
_OLD_ATTENTION = ('query', 'key', 'value', 'proj_attn')  # of diffusers before 0.17


def read_config(
  values: Mapping[str, Any], where: str = "the autoencoder's config.json"
) -> AutoencoderConfig:
  """An autoencoder's config.json.

  Defaults of fields are those of diffusers, whose older files leave out what came later.

  Args:
    values: of the file.
    where: what they are from, for messages.

  Raises:
    UnclipError: a field asks for what ours does not do; names it.
  """
  kinds = {name: kind for kind, name in _CLASSES.items()}
  name = values.get('_class_name')
  if not isinstance(name, str) or name not in kinds:
    raise UnclipError(f'{where}: _class_name is {name!r}: only {", ".join(kinds)} can be opened')
  is_vq = kinds[name] == 'vq'
  fields = Fields(values, where)
  widths = fields.take_numbers('block_out_channels', (64,))
  if any(type(width) is not int or width < 1 for width in widths):
    raise UnclipError(f'{where}: block_out_channels is {list(widths)}, not a list of widths')
  channels = math.gcd(*widths)
  latent_channels = fields.take('latent_channels', 3 if is_vq else 4)
  image_channels = fields.take('in_channels', 3)
  fields.expect(out_channels=image_channels, act_fn='silu', mid_block_add_attention=True)
  codebook_size, spatial_norm = 0, False
  if is_vq:
    codebook_size = fields.take('num_vq_embeddings', 256)
    fields.choose('vq_embed_dim', {None: None, latent_channels: None})
    spatial_norm = fields.choose('norm_type', {'group': False, 'spatial': True}, 'group')
    fields.expect(lookup_from_codebook=False)
  else:
    fields.expect(use_quant_conv=True, use_post_quant_conv=True)
    fields.expect(shift_factor=None, latents_mean=None, latents_std=None)
  config = AutoencoderConfig(
    channels=channels,
    multipliers=tuple(width // channels for width in widths),
    num_res_blocks=fields.take('layers_per_block', 1),
    latent_channels=latent_channels,
    kind=kinds[name],
    scaling=fields.take('scaling_factor', 0.18215),
    image_channels=image_channels,
    attention_levels=_read_attention_levels(fields, len(widths)),
    num_groups=fields.take('norm_num_groups', 32),
    codebook_size=codebook_size,
    spatial_norm=spatial_norm,
  )
  fields.ignore(('sample_size', 'force_upcast'))
  fields.done()
  return config


def write_config(config: AutoencoderConfig) -> dict[str, Any]:
  """The inverse of `read_config`.

  Raises:
    UnclipError: diffusers has no such autoencoder.
  """
  if config.kind not in _CLASSES or (config.kind == 'kl' and config.spatial_norm):
    norm = 'spatial norm' if config.spatial_norm else 'group norm'
    raise UnclipError(f'diffusers has no autoencoder of kind {config.kind!r} with {norm}')
  has_attention = [i in config.attention_levels for i in range(len(config.multipliers))]
  values = {
    '_class_name': _CLASSES[config.kind],
    'in_channels': config.image_channels,
    'out_channels': config.image_channels,
    'down_block_types': [_DOWN_BLOCKS[a] for a in has_attention],
    'up_block_types': [_UP_BLOCKS[a] for a in reversed(has_attention)],
    'block_out_channels': [config.channels * m for m in config.multipliers],
    'layers_per_block': config.num_res_blocks,
    'act_fn': 'silu',
    'latent_channels': config.latent_channels,
    'norm_num_groups': config.num_groups,
    'scaling_factor': config.scaling,
  }
  if config.kind == 'vq':
    values |= {
      'num_vq_embeddings': config.codebook_size,
      'vq_embed_dim': config.latent_channels,
      'norm_type': 'spatial' if config.spatial_norm else 'group',
    }
  return values


def rules(config: AutoencoderConfig, names: Collection[str] = ()) -> list[Rule]:
  """An `AutoencoderKL` or a `VQModel`.

  Args:
    config: of the autoencoder.
    names: of the tensors to be read. Where they call an attention layer's projections query, key,
      value and proj_attn, as diffusers did before 0.17 (Stable Diffusion 2.1's own files), so do
      the rules; elsewhere they take the names of today.
  """
  widths = [config.channels * m for m in config.multipliers]
  last, n = len(widths) - 1, config.num_res_blocks
  result = [*conv('to_latent', 'quant_conv'), *conv('from_latent', 'post_quant_conv')]
  if config.kind == 'vq':
    result.append(same('codebook', 'quantize.embedding.weight'))
  for side in ('encoder', 'decoder'):
    spatial = config.spatial_norm and side == 'decoder'
    result += [
      *conv(f'{side}.conv_in', f'{side}.conv_in'),
      *_block(f'{side}.middle.block_0', f'{side}.mid_block.resnets.0', spatial),
      *_attention(
        f'{side}.middle.attention', f'{side}.mid_block.attentions.0', widths[last], spatial, names
      ),
      *_block(f'{side}.middle.block_1', f'{side}.mid_block.resnets.1', spatial),
      *_norm(f'{side}.norm_out', f'{side}.conv_norm_out', spatial),
      *conv(f'{side}.conv_out', f'{side}.conv_out'),
    ]
  for i, width in enumerate(widths):
    down, up = f'encoder.down_blocks.{i}', f'decoder.up_blocks.{last - i}'
    for ours, theirs, count, before, spatial in (
      (f'encoder.level_{i}', down, n, widths[max(i - 1, 0)], False),
      (f'decoder.level_{i}', up, n + 1, widths[min(i + 1, last)], config.spatial_norm),
    ):
      for j in range(count):
        block, skip = f'{theirs}.resnets.{j}', j == 0 and before != width
        result += _block(f'{ours}.block_{j}', block, spatial, skip)
        if i in config.attention_levels:
          layer = f'{theirs}.attentions.{j}'
          result += _attention(f'{ours}.attention_{j}', layer, width, spatial, names)
    if i < last:
      result += conv(f'encoder.downsampler_{i}', f'{down}.downsamplers.0.conv')
    if i:
      result += conv(f'decoder.upsampler_{i - 1}', f'{up}.upsamplers.0.conv')
  return result


def _read_attention_levels(fields: Fields, num_levels: int) -> tuple[int, ...]:
  """The levels whose blocks have attention; those of the decoder have to be those of the encoder.

  Raises:
    UnclipError: blocks are of another type, too many or too few, or differ from side to side.
  """
  levels: list[tuple[int, ...]] = []
  for name, known in (('down_block_types', _DOWN_BLOCKS), ('up_block_types', _UP_BLOCKS)):
    types = fields.take(name, [known[0]])
    if len(types) != num_levels or any(word not in known for word in types):
      raise UnclipError(
        f'{fields.where}: {name} is {types}: only {num_levels} of {" or ".join(known)} can be '
        'opened, one for each of block_out_channels'
      )
    # Those of the decoder run from the lowest resolution to the highest.
    by_level = types if name == 'down_block_types' else types[::-1]
    levels.append(tuple(i for i, word in enumerate(by_level) if word == known[1]))
  if levels[0] != levels[1]:
    raise UnclipError(
      f'{fields.where}: up_block_types has attention at the levels {list(levels[1])}, and '
      f'down_block_types at {list(levels[0])}: only the same can be opened'
    )
  return levels[0]


def _norm(ours: str, theirs: str, spatial: bool) -> list[Rule]:
  if not spatial:
    return group_norm(f'{ours}.norm', theirs)
  return [
    *group_norm(f'{ours}.norm', f'{theirs}.norm_layer'),
    *conv(f'{ours}.scale', f'{theirs}.conv_y'),
    *conv(f'{ours}.shift', f'{theirs}.conv_b'),
  ]


def _block(ours: str, theirs: str, spatial: bool, skip: bool = False) -> list[Rule]:
  return [
    *_norm(f'{ours}.norm_in', f'{theirs}.norm1', spatial),
    *conv(f'{ours}.conv_in', f'{theirs}.conv1'),
    *_norm(f'{ours}.norm_out', f'{theirs}.norm2', spatial),
    *conv(f'{ours}.conv_out', f'{theirs}.conv2'),
    *(conv(f'{ours}.skip', f'{theirs}.conv_shortcut') if skip else []),
  ]


def _attention(
  ours: str, theirs: str, channels: int, spatial: bool, names: Collection[str]
) -> list[Rule]:
  is_old = f'{theirs}.{_OLD_ATTENTION[0]}.weight' in names
  *qkv, out = (f'{theirs}.{word}' for word in (_OLD_ATTENTION if is_old else _ATTENTION))
  norm = 'spatial_norm' if spatial else 'group_norm'
  return [
    *_norm(f'{ours}.norm', f'{theirs}.{norm}', spatial),
    *heads_in(f'{ours}.qkv', qkv, channels),
    *heads_out(f'{ours}.out_proj', out, channels),
  ]
