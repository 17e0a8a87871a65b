"""Kandinsky 2.1's text encoder as diffusers saves it: `MultilingualCLIP`, by M-CLIP."""

from collections.abc import Mapping
from typing import Any

from unclip_jax.configs import XlmRobertaConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.rules import Rule, dense, heads_in, heads_out, layer_norm, same

CONTEXT_LENGTH = 77  # of Kandinsky's pipelines; the model itself has 512 positions for tokens
IGNORED = ('embeddings.position_ids',)  # a counter, in files of transformers before 4.31
# Without an effect on what is computed.
_IGNORED_FIELDS = (
  'architectures', 'torch_dtype', 'dtype', 'transformers_version', 'initializer_range',
  'attention_probs_dropout_prob', 'hidden_dropout_prob', 'classifier_dropout',
  'bos_token_id', 'eos_token_id', 'chunk_size_feed_forward', 'gradient_checkpointing',
  'id2label', 'label2id', 'modelBase', 'output_past', 'problem_type', 'return_dict',
  'tie_word_embeddings', 'use_cache',
)  # fmt: skip


def read_config(values: Mapping[str, Any], where: str) -> XlmRobertaConfig:
  """The config of an `MCLIPConfig`.

  Defaults of fields are those of diffusers and transformers, which may leave out what has its
  default.

  Args:
    values: of the text encoder's config.json.
    where: what they are from, for messages.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields = Fields(values, where)
  width = fields.take('hidden_size', 768)
  embed_dim = fields.take('numDims', 768)
  config = XlmRobertaConfig(
    vocab_size=fields.take('vocab_size', 30522),
    context_length=CONTEXT_LENGTH,
    width=width,
    depth=fields.take('num_hidden_layers', 12),
    num_heads=fields.take('num_attention_heads', 12),
    mlp_width=fields.take('intermediate_size', 3072),
    num_positions=fields.take('max_position_embeddings', 512),
    pad_id=fields.take('pad_token_id', 1),
    embed_dim=embed_dim,
    num_token_types=fields.take('type_vocab_size', 2),
    epsilon=fields.take('layer_norm_eps', 1e-12),
  )
  fields.expect(
    model_type='M-CLIP',
    transformerDimensions=width,
    imageDimensions=embed_dim,
    hidden_act='gelu',
    position_embedding_type='absolute',
  )
  fields.ignore(_IGNORED_FIELDS)
  fields.done()
  if config.width % config.num_heads:
    raise UnclipError(f'{where}: {config.num_heads} heads do not divide a width of {config.width}')
  if config.num_positions < config.pad_id + 1 + config.context_length:
    raise UnclipError(
      f'{where}: {config.num_positions} positions, the first {config.pad_id + 1} without a token, '
      f'are too few for a context of {config.context_length}'
    )
  return config


def write_config(config: XlmRobertaConfig) -> dict[str, Any]:
  """An `MCLIPConfig`.

  Raises:
    UnclipError: its context is not of the length that Kandinsky's pipelines have.
  """
  if config.context_length != CONTEXT_LENGTH:
    raise UnclipError(
      f'diffusers reads captions of {CONTEXT_LENGTH} tokens, not of {config.context_length}'
    )
  return {
    'architectures': ['MultilingualCLIP'],
    'model_type': 'M-CLIP',
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.num_heads,
    'intermediate_size': config.mlp_width,
    'hidden_act': 'gelu',
    'max_position_embeddings': config.num_positions,
    'type_vocab_size': config.num_token_types,
    'layer_norm_eps': config.epsilon,
    'pad_token_id': config.pad_id,
    'bos_token_id': 0,
    'eos_token_id': 2,
    'transformerDimensions': config.width,
    'numDims': config.embed_dim,
  }


def rules(config: XlmRobertaConfig, ours: str = '', theirs: str = '') -> list[Rule]:
  """A `MultilingualCLIP`, its unused pooler included; the prefixes go before all names."""
  head_dim = config.width // config.num_heads
  embeddings = f'{theirs}transformer.embeddings'
  result = [
    same(f'{ours}tokens.embedding', f'{embeddings}.word_embeddings.weight'),
    same(f'{ours}positions', f'{embeddings}.position_embeddings.weight'),
    same(f'{ours}token_types', f'{embeddings}.token_type_embeddings.weight'),
    *layer_norm(f'{ours}norm', f'{embeddings}.LayerNorm'),
    *dense(f'{ours}pooler', f'{theirs}transformer.pooler.dense'),
    *dense(f'{ours}projection', f'{theirs}LinearTransformation'),
  ]
  for i in range(config.depth):
    block, layer = f'{ours}block_{i}', f'{theirs}transformer.encoder.layer.{i}'
    names = [f'{layer}.attention.self.{name}' for name in ('query', 'key', 'value')]
    result += [
      *heads_in(f'{block}.qkv', names, head_dim),
      *heads_out(f'{block}.attention_out', f'{layer}.attention.output.dense', head_dim),
      *layer_norm(f'{block}.attention_norm', f'{layer}.attention.output.LayerNorm'),
      *dense(f'{block}.mlp_in', f'{layer}.intermediate.dense'),
      *dense(f'{block}.mlp_out', f'{layer}.output.dense'),
      *layer_norm(f'{block}.mlp_norm', f'{layer}.output.LayerNorm'),
    ]
  return result
