"""CLIP as OpenAI's archives and the files of open_clip name its tensors.

OpenAI's archives come without a config: the shapes tell all but the heads, which are 64 wide. What
they do not tell of a model of open_clip is in its folder (`open_clip`).
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import replace

from unclip_jax.configs import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.layouts import Arrays, Layout
from unclip_jax.weights.preprocessor import OPENAI_MEAN, OPENAI_STD
from unclip_jax.weights.rules import (
  Rule,
  Tensors,
  conv,
  dense,
  group_norm,
  heads_in,
  heads_out,
  layer_norm,
  same,
)

LINEAR_PROJECTION = 'text_projection.weight'  # in place of the matrix `text_projection`
# Numbers that OpenAI's archives alone hold, as tensors.
_ARCHIVE_MARKS = ('input_resolution', 'context_length', 'vocab_size')
IGNORED = (*_ARCHIVE_MARKS, 'attn_mask', 'num_batches_tracked')
HEAD_DIM = 64  # of all of OpenAI's towers
_BLOCK = r'resblocks\.(\d+)\.ln_1\.weight'


def is_clip(names: Iterable[str]) -> bool:
  """Whether tensors of these names are of this family."""
  return {'visual.conv1.weight', 'token_embedding.weight', 'ln_final.weight'} <= set(names)


def is_openai(names: Iterable[str]) -> bool:
  """Whether tensors of these names are of an archive of OpenAI, and not of open_clip."""
  return not set(_ARCHIVE_MARKS).isdisjoint(names)


def read_shapes(tensors: Tensors, where: str) -> ClipConfig:
  """What the shapes tell of a CLIP; its heads and activation are OpenAI's.

  Args:
    tensors: of the model.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor is missing, or its shape is none that it can have.
  """
  names = set(tensors.names())

  def shape(name: str, rank: int) -> tuple[int, ...]:
    if name not in names:
      raise UnclipError(f'{where}: {name} is missing: it is no CLIP of this kind, or was cut short')
    found = tuple(tensors.shape(name))
    if len(found) != rank or 0 in found:
      raise UnclipError(f'{where}: {name} is of shape {list(found)}: it must have {rank} axes')
    return found

  def count(pattern: str) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})

  def grid(name: str) -> int:
    positions = shape(name, 2)[0]
    side = math.isqrt(positions - 1)
    if side < 1 or side * side != positions - 1:
      raise UnclipError(f'{where}: {name} has {positions} rows: it must have a square and 1 more')
    return side

  def mlp_width(tower: str, width: int) -> int | None:
    found = shape(f'{tower}.resblocks.0.mlp.c_fc.weight', 2)[0]
    return None if found == 4 * width else found

  vocab_size, width = shape('token_embedding.weight', 2)
  text = TextConfig(
    vocab_size=vocab_size,
    context_length=shape('positional_embedding', 2)[0],
    width=width,
    depth=count(rf'transformer\.{_BLOCK}'),
    num_heads=width // HEAD_DIM,
    mlp_activation='quick_gelu',
    mlp_width=mlp_width('transformer', width),
  )
  if LINEAR_PROJECTION in names:
    embed_dim = shape(LINEAR_PROJECTION, 2)[0]
  else:
    embed_dim = shape('text_projection', 2)[1]
  vision: ViTConfig | ResNetConfig
  if 'visual.layer1.0.conv1.weight' in names:
    width = shape('visual.layer1.0.conv1.weight', 4)[0]
    levels = range(1, 1 + count(r'visual\.layer(\d+)\.0\.conv1\.weight'))
    depths = tuple(count(rf'visual\.layer{i}\.(\d+)\.conv1\.weight') for i in levels)
    net = ResNetConfig(image_size=0, width=width, depths=depths, num_heads=0)
    size = net.factor * grid('visual.attnpool.positional_embedding')
    vision = replace(net, image_size=size, num_heads=net.pooled_width // HEAD_DIM)
  else:
    width, _, patch_size, _ = shape('visual.conv1.weight', 4)
    vision = ViTConfig(
      image_size=patch_size * grid('visual.positional_embedding'),
      patch_size=patch_size,
      width=width,
      depth=count(rf'visual\.transformer\.{_BLOCK}'),
      num_heads=width // HEAD_DIM,
      mlp_activation='quick_gelu',
      mlp_width=mlp_width('visual.transformer', width),
    )
  return ClipConfig(text, vision, embed_dim, pixel_mean=OPENAI_MEAN, pixel_std=OPENAI_STD)


def read_config(tensors: Tensors, where: str) -> ClipConfig:
  """The config of one of OpenAI's models, by the shapes of its tensors.

  Args:
    tensors: of an archive.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor is missing, or its shape is none that it can have.
  """
  config = read_shapes(tensors, where)
  towers = {'text': config.text.width, 'image': attention_width(config.vision)}
  for name, width in towers.items():
    if width % HEAD_DIM or not width:
      raise UnclipError(
        f'{where}: the {name} tower is {width} wide, no multiple of the {HEAD_DIM} that a head '
        "of OpenAI's has: give the folder of open_clip that it is from"
      )
  return config


def attention_width(vision: ViTConfig | ResNetConfig) -> int:
  """The width that the heads of an image tower share."""
  return vision.pooled_width if isinstance(vision, ResNetConfig) else vision.width


def rules(config: ClipConfig, linear_projection: bool = False) -> list[Rule]:
  """All tensors of a CLIP.

  Args:
    config: of the CLIP.
    linear_projection: whether the file has `LINEAR_PROJECTION`.
  """
  if linear_projection:
    projection = dense('text_projection', 'text_projection', bias=False)
  else:
    projection = [same('text_projection.kernel', 'text_projection')]
  is_resnet = isinstance(config.vision, ResNetConfig)
  return [
    same('log_scale', 'logit_scale'),
    same('text.tokens.embedding', 'token_embedding.weight'),
    same('text.positions', 'positional_embedding'),
    *_blocks('text.blocks', 'transformer', config.text),
    *layer_norm('text.norm', 'ln_final'),
    *projection,
    *(_resnet_rules(config.vision) if is_resnet else _vit_rules(config.vision)),
  ]


def _blocks(ours: str, theirs: str, tower: TextConfig | ViTConfig) -> list[Rule]:
  head_dim, result = tower.width // tower.num_heads, []
  for i in range(tower.depth):
    block, layer = f'{ours}.block_{i}', f'{theirs}.resblocks.{i}'
    result += [
      *layer_norm(f'{block}.attention_norm', f'{layer}.ln_1'),
      *(
        Rule((f'{block}.qkv.{mine}',), (f'{layer}.attn.in_proj_{its}',), _stacked_heads(head_dim))
        for mine, its in (('kernel', 'weight'), ('bias', 'bias'))
      ),
      *heads_out(f'{block}.attention_out', f'{layer}.attn.out_proj', head_dim),
      *layer_norm(f'{block}.mlp_norm', f'{layer}.ln_2'),
      *dense(f'{block}.mlp_in', f'{layer}.mlp.c_fc'),
      *dense(f'{block}.mlp_out', f'{layer}.mlp.c_proj'),
    ]
  return result


@functools.cache
def _stacked_heads(head_dim: int) -> Layout:
  """q, k and v under each other, [3 * heads * head_dim, in] -> [in, 3, heads, head_dim]; biases."""

  def read(theirs: Arrays) -> Arrays:
    (x,) = theirs
    x = x.reshape(3, -1, head_dim, *x.shape[1:])
    return (x if x.ndim == 3 else x.transpose(3, 0, 1, 2),)

  def write(ours: Arrays) -> Arrays:
    (x,) = ours
    return (x.reshape(-1) if x.ndim == 3 else x.transpose(1, 2, 3, 0).reshape(-1, x.shape[0]),)

  return Layout(read, write)


def _vit_rules(vision: ViTConfig) -> list[Rule]:
  return [
    *conv('vision.patch_embedding', 'visual.conv1', bias=False),
    same('vision.class_token', 'visual.class_embedding'),
    same('vision.positions', 'visual.positional_embedding'),
    *layer_norm('vision.norm_in', 'visual.ln_pre'),
    *_blocks('vision.blocks', 'visual.transformer', vision),
    *layer_norm('vision.norm_out', 'visual.ln_post'),
    same('image_projection.kernel', 'visual.proj'),
  ]


def _resnet_rules(vision: ResNetConfig) -> list[Rule]:
  result = []
  for i in range(3):
    result += conv(f'vision.stem_conv_{i}', f'visual.conv{i + 1}', bias=False)
    result += _batch_norm(f'vision.stem_norm_{i}', f'visual.bn{i + 1}')
  for level, depth in enumerate(vision.depths):
    for i in range(depth):
      block, layer = f'vision.level_{level}_block_{i}', f'visual.layer{level + 1}.{i}'
      for at, name in enumerate(('in', 'mid', 'out'), start=1):
        result += conv(f'{block}.conv_{name}', f'{layer}.conv{at}', bias=False)
        result += _batch_norm(f'{block}.norm_{name}', f'{layer}.bn{at}')
      if i == 0:  # a level's first widens, and has a projected shortcut
        result += conv(f'{block}.skip', f'{layer}.downsample.0', bias=False)
        result += _batch_norm(f'{block}.skip_norm', f'{layer}.downsample.1')
  head_dim, pool = vision.pooled_width // vision.num_heads, 'visual.attnpool'
  return [
    *result,
    same('vision.pool.positions', f'{pool}.positional_embedding'),
    *heads_in('vision.pool.q', [f'{pool}.q_proj'], head_dim),
    *heads_in('vision.pool.kv', [f'{pool}.k_proj', f'{pool}.v_proj'], head_dim),
    *heads_out('vision.pool.out', f'{pool}.c_proj', head_dim),
  ]


def _batch_norm(ours: str, theirs: str) -> list[Rule]:
  return [
    *group_norm(ours, theirs),
    same(f'{ours}.mean', f'{theirs}.running_mean'),
    same(f'{ours}.var', f'{theirs}.running_var'),
  ]
