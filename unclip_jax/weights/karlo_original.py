"""Karlo (kakaobrain) as its own code saves it: files of tensors, and no config beside them.

The prior, the decoder and the pair of upsamplers are checkpoints with a `state_dict`, CLIP is
OpenAI's archive, and the statistics of its embeddings are two tensors without names. Sizes are read
from names and shapes. What these do not tell is as in `presets.KARLO`, but for the range that the
original clips the prior's x_0 at.

The U-Nets have the names of ADM (Dhariwal & Nichol 2021): `input_blocks` are the first convolution,
then the blocks of each level, then what halves it; in `output_blocks` what doubles a level comes
behind its last block, in the same entry.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig, UNetConfig
from unclip_jax.presets import KARLO
from unclip_jax.types import UnclipError
from unclip_jax.weights import layouts, openai_clip
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

CLIP, PRIOR, STATISTICS, DECODER, SUPER_RES = 'clip', 'prior', 'statistics', 'decoder', 'super_res'
# The files that hold each stage.
STAGE_PARTS: Mapping[str, tuple[str, ...]] = {
  'clip': (CLIP,),
  'prior': (PRIOR, STATISTICS),
  'decoder': (DECODER,),
  'upsampler_0': (SUPER_RES,),
}
# Masks and the empty caption: the original computes them, and keeps them out of its files.
IGNORED = (*openai_clip.IGNORED, 'causal_mask', 'cf_token', 'cf_mask')
_NETWORK = 'model.'  # the attribute of the module around it
_NETWORKS = {'unet.': 'model_first_steps.', 'final_unet.': 'model_last_step.'}
_HEAD_DIM = 64  # of all networks
_EXTRA_TOKENS = 4  # of the prior, behind the text: z_t, time, z_i_t, query
_CLIP_X_0 = 10.0  # karlo/models/prior_model.py; diffusers has 5


def read_config(parts: Mapping[str, Tensors], where: str) -> UnclipConfig:
  """The config of a release, by the names and shapes of its tensors.

  Args:
    parts: the tensors of 'clip', 'prior', 'statistics', 'decoder' and 'super_res'.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor that tells a size is missing, or is of a shape that it cannot have.
  """
  clip, upsampler = openai_clip.read_config(parts[CLIP], f'{where}: {CLIP}'), KARLO.upsamplers[0]
  # The second of the two has the sizes of the first, or its tensors do not fit.
  super_res = _Network(parts, SUPER_RES, _NETWORKS['unet.'], where)
  return UnclipConfig(
    clip=dataclasses.replace(clip, unit_norm=False),
    prior=_read_prior(_Network(parts, PRIOR, _NETWORK, where)),
    decoder=_read_decoder(_Network(parts, DECODER, _NETWORK, where)),
    upsamplers=(dataclasses.replace(upsampler, unet=_read_unet(super_res, upsampler.unet)),),
  )


def rules(config: UnclipConfig) -> dict[str, list[Rule]]:
  """The rules of each stage; the names of tensors are after those of their part and a slash."""
  clip_rules = [
    rule._replace(theirs=tuple(f'{CLIP}/{name}' for name in rule.theirs))
    for rule in openai_clip.rules(config.clip)
  ]
  upsampler_rules = [
    rule
    for ours, theirs in _NETWORKS.items()
    for rule in _unet_rules(config.upsamplers[0].unet, ours, f'{SUPER_RES}/{theirs}')
  ]
  return {
    'clip': clip_rules,
    'prior': _prior_rules(config.prior),
    'decoder': _decoder_rules(config.decoder),
    'upsampler_0': upsampler_rules,
  }


# --- Sizes.


class _Network:
  """Names and shapes of the tensors of one network."""

  def __init__(self, parts: Mapping[str, Tensors], part: str, prefix: str, where: str) -> None:
    self._tensors, self._prefix = parts[part], prefix
    self._names = set(self._tensors.names())
    self._where = f'{where}: {part}/{prefix}'

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """Of a tensor of so many axes."""
    if self._prefix + name not in self._names:
      raise self.error(f'{name} is missing: it is no Karlo, or was cut short')
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


def _read_prior(net: _Network) -> PriorConfig:
  width, text_width = net.shape('text_enc_proj.weight', 2)
  return dataclasses.replace(
    KARLO.prior,
    embed_dim=net.shape('clip_img_proj.weight', 2)[1],
    text_width=text_width,
    context_length=net.shape('positional_embedding', 3)[1] - _EXTRA_TOKENS,
    width=width,
    depth=net.count(r'transformer\.resblocks\.(\d+)\.'),
    num_heads=width // _HEAD_DIM,
    diffusion=dataclasses.replace(KARLO.prior.diffusion, clip_x_0=_CLIP_X_0),
  )


def _read_decoder(net: _Network) -> DecoderConfig:
  unet = _read_unet(net, KARLO.decoder.unet)
  rows, embed_dim = net.shape('clip_tok_proj.weight', 2)
  context_dim, text_width = net.shape('text_seq_proj.0.weight', 2)
  return dataclasses.replace(
    KARLO.decoder,
    embed_dim=embed_dim,
    unet=dataclasses.replace(unet, context_dim=context_dim),
    clip_text_width=text_width,
    num_image_tokens=rows // context_dim,
  )


def _read_unet(net: _Network, karlo: UNetConfig) -> UNetConfig:
  """The U-Net; what shapes do not tell, its context among it, is Karlo's."""
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
    karlo,
    in_channels=net.shape('input_blocks.0.0.weight', 4)[1] - karlo.condition_channels,
    out_channels=net.shape('out.2.weight', 4)[0],
    channels=channels,
    multipliers=tuple(width // channels for width in widths),
    num_res_blocks=entries - 1,
    attention_levels=tuple(
      level for level, name in enumerate(firsts) if net.count(rf'({re.escape(name)})\.1\.')
    ),
    scale_shift=emb_rows == 2 * widths[0],
  )


# --- Names.


def _prior_rules(config: PriorConfig) -> list[Rule]:
  theirs = f'{PRIOR}/{_NETWORK}'
  result = [
    *dense('network.text_proj', f'{theirs}text_enc_proj'),
    *dense('network.z_t_proj', f'{theirs}text_emb_proj'),
    *dense('network.z_i_proj', f'{theirs}clip_img_proj'),
    *dense('network.time_mlp.in_proj', f'{theirs}time_embed.0'),
    *dense('network.time_mlp.out_proj', f'{theirs}time_embed.2'),
    Rule(('network.positions',), (f'{theirs}positional_embedding',), layouts.first_row()),
    Rule(('network.query',), (f'{theirs}prd_emb',), layouts.first_row(2)),
    *layer_norm('network.norm', f'{theirs}final_ln'),
    *dense('network.out_proj', f'{theirs}out_proj'),
    same('statistics.mean', f'{STATISTICS}/mean'),
    same('statistics.std', f'{STATISTICS}/std'),
  ]
  for i in range(config.depth):
    ours, block = f'network.blocks.block_{i}', f'{theirs}transformer.resblocks.{i}'
    result += [
      *layer_norm(f'{ours}.attention_norm', f'{block}.ln_1'),
      *_fused(f'{ours}.qkv', f'{block}.attn.c_qkv', 3),
      *heads_out(f'{ours}.attention_out', f'{block}.attn.c_proj', _HEAD_DIM),
      *layer_norm(f'{ours}.mlp_norm', f'{block}.ln_2'),
      *dense(f'{ours}.mlp_in', f'{block}.mlp.c_fc'),
      *dense(f'{ours}.mlp_out', f'{block}.mlp.c_proj'),
    ]
  return result


def _decoder_rules(config: DecoderConfig) -> list[Rule]:
  theirs = f'{DECODER}/{_NETWORK}'
  # The reshape to (b, 1536, 4) makes the token the fastest axis of the output.
  tokens = layouts.tokens_out(config.num_image_tokens, token_major=False)
  return [
    same('null_z_i', f'{theirs}cf_param'),
    *dense('z_i_to_emb', f'{theirs}clip_emb'),
    Rule(('z_i_to_tokens.kernel',), (f'{theirs}clip_tok_proj.weight',), tokens),
    Rule(('z_i_to_tokens.bias',), (f'{theirs}clip_tok_proj.bias',), tokens),
    *dense('text_to_emb', f'{theirs}text_feat_proj'),
    *dense('text_to_context', f'{theirs}text_seq_proj.0'),
    *layer_norm('context_norm', f'{theirs}text_seq_proj.1'),
    *_unet_rules(config.unet, 'unet.', theirs),
  ]


def _unet_rules(config: UNetConfig, ours: str, theirs: str) -> list[Rule]:
  """An ADM U-Net; `ours` and `theirs` are put before each name."""
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
  out = layouts.pointwise(layouts.heads_out(_HEAD_DIM))
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
  layout = layouts.interleaved_heads(num, _HEAD_DIM)
  return [
    Rule((f'{ours}.kernel',), (f'{theirs}.weight',), of_matrix(layout)),
    Rule((f'{ours}.bias',), (f'{theirs}.bias',), layout),
  ]
