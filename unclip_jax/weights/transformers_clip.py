"""CLIP as transformers saves it: configs and tensors, of both towers or of one."""

import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from unclip_jax.configs import ClipConfig, TextConfig, ViTConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights import layouts
from unclip_jax.weights.foreign_config import PRETRAINED_FIELDS, Fields, read_json
from unclip_jax.weights.preprocessor import (
  OPENAI_MEAN,
  OPENAI_STD,
  PREPROCESSOR_NAME,
  read_pixel_statistics,
  write_preprocessor_config,
)
from unclip_jax.weights.rules import (
  Rule,
  conv,
  dense,
  heads_in,
  heads_out,
  layer_norm,
  same,
)

CONFIG_NAME = 'config.json'
IGNORED = ('embeddings.position_ids',)  # a counter, in files of transformers before 4.31
MAX_LOG_SCALE = math.log(100)  # what OpenAI's models are clipped at (section 2.5 of Radford et al.)
# Without an effect on what the towers compute.
_IGNORED_FIELDS = (
  'architectures', 'torch_dtype', 'dtype', 'transformers_version',
  'attention_dropout', 'dropout', 'initializer_factor', 'initializer_range',
  'bos_token_id', 'eos_token_id', 'pad_token_id',
)  # fmt: skip
_ACTIVATIONS = {'quick_gelu': 'quick_gelu', 'gelu': 'gelu'}


def read_text_config(values: Mapping[str, Any], where: str) -> tuple[TextConfig, int]:
  """The text tower of a `CLIPTextConfig`, and the width of the embedding.

  Defaults of fields are those of transformers, which leaves out what has its default.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields = Fields(values, where)
  config = TextConfig(
    vocab_size=fields.take('vocab_size', 49408),
    context_length=fields.take('max_position_embeddings', 77),
    **_read_tower(fields, width=512, num_heads=8),
  )
  embed_dim = fields.take('projection_dim', 512)
  _finish(fields)
  return config, embed_dim


def read_vision_config(values: Mapping[str, Any], where: str) -> tuple[ViTConfig, int]:
  """The image tower of a `CLIPVisionConfig`, and the width of the embedding.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields = Fields(values, where)
  config = ViTConfig(
    image_size=fields.take('image_size', 224),
    patch_size=fields.take('patch_size', 32),
    **_read_tower(fields, width=768, num_heads=12),
  )
  embed_dim = fields.take('projection_dim', 512)
  fields.expect(num_channels=3)
  _finish(fields)
  return config, embed_dim


def read_model_config(folder: epath.Path) -> ClipConfig:
  """The config of a folder of a `CLIPModel`: `config.json`, and `preprocessor_config.json` if any.

  Embeddings are of unit norm, as those of its loss are.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  path = folder / CONFIG_NAME
  fields = Fields(read_json(path), str(path))
  embed_dim = fields.take('projection_dim', 512)
  towers = []
  for name in ('text_config', 'vision_config'):
    values, older = fields.take(name, {}), fields.take(f'{name}_dict', {})
    towers.append({**values, **older, 'projection_dim': embed_dim})
  fields.ignore(('logit_scale_init_value',))
  _finish(fields)
  preprocessor = folder / PREPROCESSOR_NAME
  pixels = read_json(preprocessor) if preprocessor.exists() else None
  return read_config(*towers, pixels, str(path), unit_norm=True)


def read_components_config(
  text: epath.Path | None, vision: epath.Path | None, preprocessor: epath.Path | None
) -> ClipConfig:
  """Both towers of a pipeline of diffusers, or one alone, from the folders of its components.

  Args:
    text: of a `CLIPTextModelWithProjection`.
    vision: of a `CLIPVisionModelWithProjection`.
    preprocessor: of what prepares its pictures; may lack its file.

  Raises:
    UnclipError: a file is missing, the towers do not meet, or a field asks for what ours does not.
  """
  towers = [folder and read_json(folder / CONFIG_NAME) for folder in (text, vision)]
  path = preprocessor and preprocessor / PREPROCESSOR_NAME
  pixels = read_json(path) if vision and path and path.exists() else None
  where = str((text or vision or epath.Path()).parent)
  return read_config(*towers, pixels, where, unit_norm=False)


def read_config(
  text: Mapping[str, Any] | None,
  vision: Mapping[str, Any] | None,
  preprocessor: Mapping[str, Any] | None,
  where: str,
  unit_norm: bool,
) -> ClipConfig:
  """Both towers, or one alone, as one CLIP.

  Args:
    text: a `CLIPTextConfig`.
    vision: a `CLIPVisionConfig`.
    preprocessor: `preprocessor_config.json`, for what pixels are standardised by.
    where: what they are from, for messages.
    unit_norm: whether embeddings are brought to unit norm.

  Raises:
    UnclipError: the towers do not meet, or a field asks for what ours does not do.
  """
  text_tower = vision_tower = None
  widths = set()
  if text is not None:
    text_tower, embed_dim = read_text_config(text, f'{where}: text tower')
    widths.add(embed_dim)
  if vision is not None:
    vision_tower, embed_dim = read_vision_config(vision, f'{where}: image tower')
    widths.add(embed_dim)
  if len(widths) != 1:
    given = ' and '.join(map(str, sorted(widths)))
    raise UnclipError(f'{where}: projection_dim of the towers differ: {given}')
  mean, std = OPENAI_MEAN, OPENAI_STD
  if preprocessor is not None:
    mean, std = read_pixel_statistics(preprocessor, f'{where}: {PREPROCESSOR_NAME}')
  return ClipConfig(text_tower, vision_tower, embed_dim, unit_norm, mean, std)


def text_rules(config: ClipConfig, theirs: str = '') -> list[Rule]:
  """The text tower and its projection; `theirs` is put before each of their names."""
  text = config.text
  tower = f'{theirs}text_model'
  return [
    same('text.tokens.embedding', f'{tower}.embeddings.token_embedding.weight'),
    same('text.positions', f'{tower}.embeddings.position_embedding.weight'),
    *_blocks('text.blocks', tower, text),
    *layer_norm('text.norm', f'{tower}.final_layer_norm'),
    *dense('text_projection', f'{theirs}text_projection', bias=False),
  ]


def vision_rules(config: ClipConfig, theirs: str = '') -> list[Rule]:
  """The image tower and its projection; `theirs` is put before each of their names."""
  tower = f'{theirs}vision_model'
  return [
    *conv('vision.patch_embedding', f'{tower}.embeddings.patch_embedding', bias=False),
    same('vision.class_token', f'{tower}.embeddings.class_embedding'),
    same('vision.positions', f'{tower}.embeddings.position_embedding.weight'),
    *layer_norm('vision.norm_in', f'{tower}.pre_layrnorm'),  # their spelling
    *_blocks('vision.blocks', tower, config.vision),
    *layer_norm('vision.norm_out', f'{tower}.post_layernorm'),
    *dense('image_projection', f'{theirs}visual_projection', bias=False),
  ]


def rules(config: ClipConfig) -> list[Rule]:
  """A `CLIPModel`."""
  return [same('log_scale', 'logit_scale'), *text_rules(config), *vision_rules(config)]


def no_log_scale() -> Rule:
  """For towers that come without the temperature: the largest that CLIP allows."""
  return Rule(('log_scale',), (), layouts.constant(MAX_LOG_SCALE))


def write_model_configs(config: ClipConfig, end_id: int) -> dict[str, dict[str, Any]]:
  """The JSON files of a folder of a `CLIPModel`, by their names.

  Raises:
    UnclipError: transformers has no such CLIP.
  """
  vision = write_vision_config(config)
  return {
    CONFIG_NAME: {
      'architectures': ['CLIPModel'],
      'model_type': 'clip',
      'projection_dim': config.embed_dim,
      'text_config': write_text_config(config, end_id),
      'vision_config': vision,
    },
    PREPROCESSOR_NAME: write_preprocessor_config(config),
  }


def write_text_config(config: ClipConfig, end_id: int) -> dict[str, Any]:
  """A `CLIPTextConfig` (of `CLIPTextModelWithProjection`).

  Args:
    config: of the CLIP.
    end_id: of the tokenizer's end of text, where transformers reads a caption's embedding.
  """
  text = config.text
  return {
    'architectures': ['CLIPTextModelWithProjection'],
    'model_type': 'clip_text_model',
    'vocab_size': text.vocab_size,
    'max_position_embeddings': text.context_length,
    'projection_dim': config.embed_dim,
    'eos_token_id': end_id,
    **_write_tower(text),
  }


def write_vision_config(config: ClipConfig) -> dict[str, Any]:
  """A `CLIPVisionConfig` (of `CLIPVisionModelWithProjection`).

  Raises:
    UnclipError: the image tower is no Vision Transformer.
  """
  vision = config.vision
  if not isinstance(vision, ViTConfig):
    what = 'no image tower' if vision is None else 'a convolutional image tower'
    raise UnclipError(f'the CLIP has {what}: transformers has no such CLIPModel')
  return {
    'architectures': ['CLIPVisionModelWithProjection'],
    'model_type': 'clip_vision_model',
    'image_size': vision.image_size,
    'patch_size': vision.patch_size,
    'projection_dim': config.embed_dim,
    **_write_tower(vision),
  }


def _write_tower(tower: TextConfig | ViTConfig) -> dict[str, Any]:
  return {
    'hidden_size': tower.width,
    'intermediate_size': 4 * tower.width if tower.mlp_width is None else tower.mlp_width,
    'num_hidden_layers': tower.depth,
    'num_attention_heads': tower.num_heads,
    'hidden_act': tower.mlp_activation,
    'layer_norm_eps': 1e-5,
  }


def _read_tower(fields: Fields, width: int, num_heads: int) -> dict[str, Any]:
  """What both towers have; the arguments are transformers' defaults."""
  default_mlp, width = 4 * width, fields.take('hidden_size', width)
  mlp_width = fields.take('intermediate_size', default_mlp)
  fields.expect(layer_norm_eps=1e-5)
  return {
    'width': width,
    'depth': fields.take('num_hidden_layers', 12),
    'num_heads': fields.take('num_attention_heads', num_heads),
    'mlp_activation': fields.choose('hidden_act', _ACTIVATIONS, 'quick_gelu'),
    'mlp_width': None if mlp_width == 4 * width else mlp_width,
  }


def _finish(fields: Fields) -> None:
  fields.choose('model_type', dict.fromkeys((None, 'clip', 'clip_text_model', 'clip_vision_model')))
  fields.ignore(_IGNORED_FIELDS)
  fields.ignore(PRETRAINED_FIELDS)
  fields.done()


def _blocks(ours: str, theirs: str, tower: TextConfig | ViTConfig) -> list[Rule]:
  head_dim, result = tower.width // tower.num_heads, []
  for i in range(tower.depth):
    block, layer = f'{ours}.block_{i}', f'{theirs}.encoder.layers.{i}'
    result += [
      *layer_norm(f'{block}.attention_norm', f'{layer}.layer_norm1'),
      *heads_in(f'{block}.qkv', [f'{layer}.self_attn.{x}_proj' for x in 'qkv'], head_dim),
      *heads_out(f'{block}.attention_out', f'{layer}.self_attn.out_proj', head_dim),
      *layer_norm(f'{block}.mlp_norm', f'{layer}.layer_norm2'),
      *dense(f'{block}.mlp_in', f'{layer}.mlp.fc1'),
      *dense(f'{block}.mlp_out', f'{layer}.mlp.fc2'),
    ]
  return result
