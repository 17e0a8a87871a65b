"""A folder of open_clip: its config, in `open_clip_config.json`, and where its tensors are.

The tensors are named as OpenAI's (`openai_clip`); what shapes do not tell is taken from the config,
and what they do tell must agree with it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etils import epath

from unclip_jax.configs import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.openai_clip import HEAD_DIM, attention_width, read_shapes
from unclip_jax.weights.preprocessor import OPENAI_MEAN, OPENAI_STD, read_pixel_statistics
from unclip_jax.weights.rules import Tensors

CONFIG_NAME = 'open_clip_config.json'
# The first that is there is read.
WEIGHTS_NAMES = (
  'open_clip_model.safetensors',
  'open_clip_pytorch_model.safetensors',
  'open_clip_pytorch_model.bin',
)


def find_weights(folder: epath.Path) -> epath.Path | None:
  """The file that holds the tensors of a folder, None where there is none."""
  paths = (folder / name for name in WEIGHTS_NAMES)
  return next((path for path in paths if path.exists()), None)


def read_config(
  values: Mapping[str, Any], values_where: str, tensors: Tensors, where: str
) -> ClipConfig:
  """The config of a model of open_clip, by the shapes of its tensors and what they do not tell.

  Args:
    values: of `open_clip_config.json`.
    values_where: where that is, for messages.
    tensors: of the model.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor is missing, a field contradicts the shapes, or asks for what ours does not
      do; names it.
  """
  config = read_shapes(tensors, where)
  top = Fields(values, values_where)
  model, pixels = (
    Fields(top.take(name, {}), f'{values_where}: {name}')
    for name in ('model_cfg', 'preprocess_cfg')
  )
  top.done()
  activation = 'quick_gelu' if model.take('quick_gelu', False) else 'gelu'
  vision, text = (
    Fields(model.take(name, {}), f'{model.where}.{name}') for name in ('vision_cfg', 'text_cfg')
  )
  model.expect(embed_dim=config.embed_dim)
  model.ignore(('init_logit_scale', 'output_dict'))
  model.done()
  statistics = {
    f'image_{name}': pixels.take_numbers(name, default)
    for name, default in (('mean', OPENAI_MEAN), ('std', OPENAI_STD))
  }
  mean, std = read_pixel_statistics(statistics, pixels.where)
  pixels.expect(mode='RGB', interpolation='bicubic', resize_mode='shortest')
  pixels.ignore(('size', 'fill_color'))
  pixels.done()
  return replace(
    config,
    text=_read_text(text, config.text, activation),
    vision=_read_vision(vision, config.vision, activation),
    pixel_mean=mean,
    pixel_std=std,
  )


def _read_text(fields: Fields, text: TextConfig, mlp_activation: str) -> TextConfig:
  fields.expect(context_length=text.context_length, vocab_size=text.vocab_size)
  fields.expect(width=text.width, layers=text.depth)
  fields.expect(pool_type='argmax', proj_type='linear', pad_id=0)
  num_heads = fields.take('heads')
  _check_mlp(fields, text)
  fields.ignore(('output_tokens',))
  fields.done()
  return replace(text, num_heads=num_heads, mlp_activation=mlp_activation)


def _read_vision(
  fields: Fields, vision: ViTConfig | ResNetConfig, mlp_activation: str
) -> ViTConfig | ResNetConfig:
  fields.expect(image_size=vision.image_size, width=vision.width, pool_type='tok')
  if isinstance(vision, ViTConfig):
    vision = replace(vision, mlp_activation=mlp_activation)
    fields.expect(layers=vision.depth, patch_size=vision.patch_size, pos_embed_type='learnable')
    _check_mlp(fields, vision)
  else:
    fields.expect(layers=list(vision.depths))
    fields.ignore(('patch_size', 'mlp_ratio'))
  head_dim, width = fields.take('head_width', HEAD_DIM), attention_width(vision)
  if head_dim < 1 or width % head_dim:
    raise UnclipError(f'{fields.where}: head_width is {head_dim}: it must divide {width}')
  # Of training, or of a pool that is off.
  fields.ignore(('patch_dropout', 'output_tokens', 'attn_pooler_queries', 'attn_pooler_heads'))
  fields.done()
  return replace(vision, num_heads=width // head_dim)


def _check_mlp(fields: Fields, tower: TextConfig | ViTConfig) -> None:
  width = 4 * tower.width if tower.mlp_width is None else tower.mlp_width
  ratio = fields.take('mlp_ratio', width / tower.width)
  if not abs(tower.width * ratio - width) < 1:  # theirs is cut to a whole number
    raise UnclipError(
      f'{fields.where}: mlp_ratio is {ratio:g}, but the hidden layers are {width} wide over '
      f'{tower.width}: it is the config of another model'
    )
