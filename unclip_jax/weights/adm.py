"""ADM's U-Net and GLIDE's Transformer as OpenAI's code names their tensors; Karlo's does the same.

The names of the U-Net (Dhariwal & Nichol 2021): `input_blocks` are the first convolution, then the
blocks of each level, then what halves it; in `output_blocks` what doubles a level comes behind its
last block, in the same entry. Heads are 64 wide. The projections to them lie head by head, queries,
keys and values of one after the other.
"""

import dataclasses
import re
from collections.abc import Callable

from unclip_jax.configs import UNetConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights import layouts
from unclip_jax.weights.layouts import Layout
from unclip_jax.weights.rules import (
  Rule,
  Tensors,
  conv,
  dense,
  group_norm,
  heads_out,
  layer_norm,
  same,
)

HEAD_DIM = 64  # of all networks


class Network:
  """Names and shapes of the tensors of one network.

  Args:
    tensors: of the file.
    prefix: what its names begin with.
    what: the network is said to be, where a tensor is missing.
    where: it is from, for messages; `prefix` follows it.
  """

  def __init__(self, tensors: Tensors, prefix: str, what: str, where: str) -> None:
    self._tensors, self._prefix, self._what = tensors, prefix, what
    self._names = set(tensors.names())
    self._where = f'{where}{prefix}'

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """Of a tensor of so many axes.

    Raises:
      UnclipError: it is missing, or has others.
    """
    if self._prefix + name not in self._names:
      raise self.error(f'{name} is missing: it is no {self._what}, or was cut short')
    shape = tuple(self._tensors.shape(self._prefix + name))
    if len(shape) != rank or 0 in shape:
      raise self.error(f'{name} is of shape {list(shape)}: it must have {rank} axes')
    return shape

  def count(self, pattern: str) -> int:
    """How many numbers are in the pattern's group, in names that begin with the pattern."""
    pattern = re.escape(self._prefix) + pattern
    return len({match[1] for name in self._names if (match := re.match(pattern, name))})

  def error(self, what: str) -> UnclipError:
    """An error that names the network."""
    return UnclipError(self._where + what)


def read_unet(net: Network, known: UNetConfig) -> UNetConfig:
  """The sizes of a U-Net by the shapes of its tensors; what these do not tell is as in `known`.

  Raises:
    UnclipError: a tensor that tells a size is missing, or is of a shape that it cannot have.
  """
  emb_dim, channels = net.shape('time_embed.0.weight', 2)
  if emb_dim != 4 * channels:
    raise net.error(f'time_embed.0.weight has {emb_dim} rows, not 4 times its {channels} columns')
  num_blocks = net.count(r'output_blocks\.(\d+)\.')
  # All levels but the first are doubled behind their last block, and behind its attention.
  num_levels = 1 + net.count(r'output_blocks\.(\d+)\.[12]\.(?:in|emb|out)_layers\.')
  entries, rest = divmod(num_blocks, num_levels)
  if rest or entries < 2:
    raise net.error(
      f'output_blocks has {num_blocks} entries, which do not make {num_levels} levels'
    )
  # Behind the first convolution, an entry for each block and one that halves the level.
  firsts = [f'input_blocks.{1 + level * entries}' for level in range(num_levels)]
  widths = [net.shape(f'{name}.0.in_layers.2.weight', 4)[0] for name in firsts]
  emb_rows = net.shape(f'{firsts[0]}.0.emb_layers.1.weight', 2)[0]
  return dataclasses.replace(
    known,
    in_channels=net.shape('input_blocks.0.0.weight', 4)[1] - known.condition_channels,
    out_channels=net.shape('out.2.weight', 4)[0],
    channels=channels,
    multipliers=tuple(width // channels for width in widths),
    num_res_blocks=entries - 1,
    attention_levels=tuple(
      level for level, name in enumerate(firsts) if net.count(rf'({re.escape(name)})\.1\.')
    ),
    scale_shift=emb_rows == 2 * widths[0],
  )


def unet_rules(config: UNetConfig, ours: str, theirs: str) -> list[Rule]:
  """A U-Net; `ours` and `theirs` are put before each name."""
  result = [
    *dense(f'{ours}time_mlp.in_proj', f'{theirs}time_embed.0'),
    *dense(f'{ours}time_mlp.out_proj', f'{theirs}time_embed.2'),
    *group_norm(f'{ours}norm_out', f'{theirs}out.0'),
    *conv(f'{ours}conv_out', f'{theirs}out.2'),
  ]
  first = f'{theirs}input_blocks.0.0'
  if config.condition_channels:  # a convolution of [x_t, image] is one of each
    kernels = (f'{ours}conv_in.kernel', f'{ours}conv_condition.kernel')
    result += [
      Rule(kernels, (f'{first}.weight',), layouts.split_inputs(config.in_channels)),
      same(f'{ours}conv_in.bias', f'{first}.bias'),
    ]
  else:
    result += conv(f'{ours}conv_in', first)
  levels, n = len(config.multipliers), config.num_res_blocks
  for level in range(levels):
    has_attention = level in config.attention_levels
    widens = level > 0 and config.multipliers[level] != config.multipliers[level - 1]
    for i in range(n):
      entry = f'{theirs}input_blocks.{1 + level * (n + 1) + i}'
      result += _res_block(f'{ours}down_blocks_{level}_{i}', f'{entry}.0', i == 0 and widens)
      if has_attention:
        result += _attention(f'{ours}down_attention_{level}_{i}', f'{entry}.1')
    if level < levels - 1:
      entry = f'{theirs}input_blocks.{(level + 1) * (n + 1)}'
      result += _res_block(f'{ours}downsamplers_{level}', f'{entry}.0', False)
    for i in range(n + 1):
      entry = f'{theirs}output_blocks.{(levels - 1 - level) * (n + 1) + i}'
      result += _res_block(f'{ours}up_blocks_{level}_{i}', f'{entry}.0', True)
      if has_attention:
        result += _attention(f'{ours}up_attention_{level}_{i}', f'{entry}.1')
    if level > 0:  # in the entry of the last block
      result += _res_block(f'{ours}upsamplers_{level - 1}', f'{entry}.{1 + has_attention}', False)
  has_attention = bool(config.attention_levels)
  for i in range(2):
    name = f'{theirs}middle_block.{i * (1 + has_attention)}'
    result += _res_block(f'{ours}middle_blocks_{i}', name, False)
  if has_attention:
    result += _attention(f'{ours}middle_attention', f'{theirs}middle_block.1')
  return result


def transformer_rules(depth: int, ours: str, theirs: str) -> list[Rule]:
  """The blocks of a Transformer; `ours` and `theirs` are put before each name."""
  result = []
  for i in range(depth):
    block, layer = f'{ours}blocks.block_{i}', f'{theirs}transformer.resblocks.{i}'
    result += [
      *layer_norm(f'{block}.attention_norm', f'{layer}.ln_1'),
      *_fused(f'{block}.qkv', f'{layer}.attn.c_qkv', 3),
      *heads_out(f'{block}.attention_out', f'{layer}.attn.c_proj', HEAD_DIM),
      *layer_norm(f'{block}.mlp_norm', f'{layer}.ln_2'),
      *dense(f'{block}.mlp_in', f'{layer}.mlp.c_fc'),
      *dense(f'{block}.mlp_out', f'{layer}.mlp.c_proj'),
    ]
  return result


def _res_block(ours: str, theirs: str, has_skip: bool) -> list[Rule]:
  return [
    *group_norm(f'{ours}.norm_in', f'{theirs}.in_layers.0'),
    *conv(f'{ours}.conv_in', f'{theirs}.in_layers.2'),
    *dense(f'{ours}.emb_proj', f'{theirs}.emb_layers.1'),
    *group_norm(f'{ours}.norm_out', f'{theirs}.out_layers.0'),
    *conv(f'{ours}.conv_out', f'{theirs}.out_layers.3'),
    *(conv(f'{ours}.skip', f'{theirs}.skip_connection') if has_skip else []),
  ]


def _attention(ours: str, theirs: str) -> list[Rule]:
  out = layouts.pointwise(layouts.heads_out(HEAD_DIM))
  return [
    *group_norm(f'{ours}.norm', f'{theirs}.norm'),
    *_fused(f'{ours}.qkv', f'{theirs}.qkv', 3, layouts.pointwise),
    *_fused(f'{ours}.context_kv', f'{theirs}.encoder_kv', 2, layouts.pointwise),
    Rule((f'{ours}.out_proj.kernel',), (f'{theirs}.proj_out.weight',), out),
    same(f'{ours}.out_proj.bias', f'{theirs}.proj_out.bias'),
  ]


def _fused(
  ours: str, theirs: str, num: int, of_matrix: Callable[[Layout], Layout] = lambda x: x
) -> list[Rule]:
  layout = layouts.interleaved_heads(num, HEAD_DIM)
  return [
    Rule((f'{ours}.kernel',), (f'{theirs}.weight',), of_matrix(layout)),
    Rule((f'{ours}.bias',), (f'{theirs}.bias',), layout),
  ]
