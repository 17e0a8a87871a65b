"""The diffusion prior as diffusers saves it: `PriorTransformer`, of Karlo and of Kandinsky."""

from typing import Any

from etils import epath

from unclip_jax.configs import DiffusionConfig, PriorConfig, SamplingConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights import layouts
from unclip_jax.weights.diffusers_schedulers import read_unclip_scheduler
from unclip_jax.weights.foreign_config import Fields
from unclip_jax.weights.foreign_folder import read_component_config
from unclip_jax.weights.rules import Rule, dense, heads_in, heads_out, layer_norm

# What all pipelines with such a prior default to.
NUM_STEPS, GUIDANCE_SCALE = 25, 4.0
# A mask that follows from the sequence.
IGNORED = ('causal_attention_mask',)


def read_config(folder: epath.Path, scheduler_folder: epath.Path) -> PriorConfig:
  """The config of a `PriorTransformer` with its scheduler, sampled as all pipelines default to.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  sampling = SamplingConfig(NUM_STEPS, spacing='karlo', guidance_scale=GUIDANCE_SCALE)
  return read_config_of(folder, read_unclip_scheduler(scheduler_folder), sampling)


def read_config_of(
  folder: epath.Path, diffusion: DiffusionConfig, sampling: SamplingConfig
) -> PriorConfig:
  """As `read_config`, of a prior whose scheduler was read.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  sizes = _read_sizes(read_component_config(folder, 'PriorTransformer'))
  return PriorConfig(
    **sizes, diffusion=diffusion, sampling=sampling, unit_norm=False, num_candidates=1
  )


def write_config(config: PriorConfig) -> dict[str, Any]:
  """The fields of a `PriorTransformer`.

  Raises:
    UnclipError: diffusers has no such prior.
  """
  if config.text_width != config.embed_dim:
    raise UnclipError(
      f'diffusers has no prior whose captions are of another width ({config.text_width}) than its '
      f'embeddings ({config.embed_dim})'
    )
  return {
    '_class_name': 'PriorTransformer',
    'num_attention_heads': config.num_heads,
    'attention_head_dim': config.width // config.num_heads,
    'num_layers': config.depth,
    'embedding_dim': config.embed_dim,
    'num_embeddings': config.context_length,
    'additional_embeddings': 4,
    'dropout': 0.0,
  }


def rules(config: PriorConfig, theirs: str = '') -> list[Rule]:
  """Network and statistics; `theirs` is put before each of their names."""
  head_dim = config.width // config.num_heads

  def row(ours: str, name: str, num_axes: int = 1) -> Rule:
    return Rule((ours,), (f'{theirs}{name}',), layouts.first_row(num_axes))

  result = [
    *dense('network.text_proj', f'{theirs}encoder_hidden_states_proj'),
    *dense('network.z_t_proj', f'{theirs}embedding_proj'),
    *dense('network.z_i_proj', f'{theirs}proj_in'),
    *dense('network.time_mlp.in_proj', f'{theirs}time_embedding.linear_1'),
    *dense('network.time_mlp.out_proj', f'{theirs}time_embedding.linear_2'),
    row('network.positions', 'positional_embedding'),
    row('network.query', 'prd_embedding', 2),
    *layer_norm('network.norm', f'{theirs}norm_out'),
    *dense('network.out_proj', f'{theirs}proj_to_clip_embeddings'),
    row('statistics.mean', 'clip_mean'),
    row('statistics.std', 'clip_std'),
  ]
  for i in range(config.depth):
    ours, block = f'network.blocks.block_{i}', f'{theirs}transformer_blocks.{i}'
    result += [
      *layer_norm(f'{ours}.attention_norm', f'{block}.norm1'),
      *heads_in(f'{ours}.qkv', [f'{block}.attn1.to_{x}' for x in 'qkv'], head_dim),
      *heads_out(f'{ours}.attention_out', f'{block}.attn1.to_out.0', head_dim),
      *layer_norm(f'{ours}.mlp_norm', f'{block}.norm3'),
      *dense(f'{ours}.mlp_in', f'{block}.ff.net.0.proj'),
      *dense(f'{ours}.mlp_out', f'{block}.ff.net.2'),
    ]
  return result


def _read_sizes(fields: Fields) -> dict[str, int]:
  """The sizes of a `PriorConfig` from those of a `PriorTransformer`."""
  num_heads, head_dim = (
    fields.take('num_attention_heads', 32),
    fields.take('attention_head_dim', 64),
  )
  embed_dim = fields.take('embedding_dim', 768)
  if num_heads < 1:
    raise UnclipError(f'{fields.where}: num_attention_heads is {num_heads}: it must be 1 or more')
  fields.expect(
    additional_embeddings=4,
    time_embed_act_fn='silu',
    encoder_hid_proj_type='linear',
    added_emb_type='prd',
    dropout=0.0,
    time_embed_dim=num_heads * head_dim,
    embedding_proj_dim=embed_dim,
    clip_embed_dim=embed_dim,
  )
  sizes = {
    'embed_dim': embed_dim,
    'text_width': embed_dim,  # diffusers has one width for both
    'context_length': fields.take('num_embeddings', 77),
    'width': num_heads * head_dim,
    'depth': fields.take('num_layers', 20),
    'num_heads': num_heads,
  }
  fields.done()
  return sizes
