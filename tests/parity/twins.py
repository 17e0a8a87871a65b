"""Tiny torch twins with random weights, and the way of their tensors into our parameter trees.

The classes of diffusers and transformers are the oracle. Names are theirs; each tensor is taken
exactly once, so that one which nobody reads, or which two places share, is an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from unclip_jax.configs import ClipConfig, DecoderConfig, PriorConfig, UNetConfig, UpsamplerConfig
from unclip_jax.stages import diffusion_prior

Tensors = Mapping[str, np.ndarray]
Tree = dict[str, Any]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws every parameter anew: none is left at zero or at its initial constant."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for module in model.modules():
      for name, p in module.named_parameters(recurse=False):
        noise = torch.randn(p.shape, generator=generator)
        match module:
          case torch.nn.Linear() | torch.nn.Conv2d() if name == 'weight':
            p.copy_(noise / p[0].numel() ** 0.5)
          case torch.nn.LayerNorm() | torch.nn.GroupNorm() if name == 'weight':
            p.copy_(1 + 0.3 * noise)
          case torch.nn.Linear() | torch.nn.Conv2d() | torch.nn.LayerNorm() | torch.nn.GroupNorm():
            p.copy_(0.3 * noise)
          case _:  # embeddings, positions, statistics, learned tokens
            p.copy_(0.8 * noise + 0.2)
  return model.eval().requires_grad_(False)


def tensors_of(*models: torch.nn.Module) -> dict[str, np.ndarray]:
  """The parameters of models whose names do not collide."""
  tensors: dict[str, np.ndarray] = {}
  for model in models:
    named = {k: v.numpy().copy() for k, v in model.named_parameters()}
    assert not set(named) & set(tensors)
    tensors |= named
  return tensors


def deviation(actual: Any, expected: torch.Tensor) -> float:
  """The largest difference over the standard deviation of what is expected."""
  expected = expected.numpy()
  assert actual.shape == expected.shape
  assert 0.3 < expected.std() < 3, (
    f'a twin with outputs of deviation {expected.std()} proves little'
  )
  return float(np.abs(np.asarray(actual, np.float64) - expected).max() / expected.std())


def worst_deviation(actual: Any, expected: Any) -> float:
  """`deviation`, the largest of those of a list of arrays."""
  return max(deviation(a, e) for a, e in zip(actual, expected, strict=True))


class Source:
  """The tensors of a twin, each to be taken once."""

  def __init__(self, tensors: Tensors):
    self.left = dict(tensors)

  def take(self, name: str) -> np.ndarray:
    """A tensor, no longer there afterwards."""
    return self.left.pop(name)

  def dense(self, name: str) -> Tree:
    """A linear layer, [out, in] -> [in, out]."""
    return {'kernel': self.take(f'{name}.weight').T, 'bias': self.take(f'{name}.bias')}

  def conv(self, name: str) -> Tree:
    """A convolution, [out, in, h, w] -> [h, w, in, out]."""
    return {
      'kernel': self.take(f'{name}.weight').transpose(2, 3, 1, 0),
      'bias': self.take(f'{name}.bias'),
    }

  def group_norm(self, name: str) -> Tree:
    """A group norm."""
    return {'scale': self.take(f'{name}.weight'), 'bias': self.take(f'{name}.bias')}

  def layer_norm(self, name: str) -> Tree:
    """A layer norm, which is one module deeper in ours."""
    return {'norm': self.group_norm(name)}

  def heads_in(self, names: list[str], head_dim: int) -> Tree:
    """Projections to heads side by side: kernel [in, n, heads, head_dim]."""
    layers = [self.dense(name) for name in names]
    kernel = np.stack([x['kernel'] for x in layers], axis=1)
    bias = np.stack([x['bias'] for x in layers], axis=0)
    return {
      'kernel': kernel.reshape(*kernel.shape[:2], -1, head_dim),
      'bias': bias.reshape(len(names), -1, head_dim),
    }

  def heads_out(self, name: str, head_dim: int) -> Tree:
    """The projection of heads: kernel [heads, head_dim, out]."""
    layer = self.dense(name)
    kernel = layer['kernel']
    return {'kernel': kernel.reshape(-1, head_dim, kernel.shape[-1]), 'bias': layer['bias']}

  def done(self, params: Tree, expected: Any) -> Tree:
    """`params`, if nothing is left over and they are what `expected` has, shape by shape."""
    assert not self.left, f'nobody takes {sorted(self.left)}'
    shapes = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(expected)}
    filled = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(params)}
    assert filled == shapes, sorted(set(filled.items()) ^ set(shapes.items()))
    return params


def check_each_tensor_matters(
  tensors: Tensors, run: Callable[[Tensors], Any], expected: Any, tolerance: float
) -> None:
  """A change of any one source tensor, of its own size, is felt: ten times the tolerance."""
  rng = np.random.default_rng(0)
  for name, value in tensors.items():
    changed = value + np.abs(value).mean() * rng.normal(size=value.shape).astype('f')
    worst = worst_deviation(run({**tensors, name: changed}), expected)
    assert worst > 10 * tolerance, f'{name} changes the outputs by {worst:.1e} only'


def convert_prior(tensors: Tensors, config: PriorConfig, expected: Any):
  """diffusers' PriorTransformer -> our prior's parameters and Statistics."""
  source = Source(tensors)
  head_dim = config.width // config.num_heads
  blocks = {}
  for i in range(config.depth):
    name = f'transformer_blocks.{i}'
    qkv = [f'{name}.attn1.to_{x}' for x in 'qkv']
    blocks[f'block_{i}'] = {
      'attention_norm': source.layer_norm(f'{name}.norm1'),
      'qkv': source.heads_in(qkv, head_dim),
      'attention_out': source.heads_out(f'{name}.attn1.to_out.0', head_dim),
      'mlp_norm': source.layer_norm(f'{name}.norm3'),
      'mlp_in': source.dense(f'{name}.ff.net.0.proj'),
      'mlp_out': source.dense(f'{name}.ff.net.2'),
    }
  params = {
    'text_proj': source.dense('encoder_hidden_states_proj'),
    'z_t_proj': source.dense('embedding_proj'),
    'z_i_proj': source.dense('proj_in'),
    'time_mlp': {
      'in_proj': source.dense('time_embedding.linear_1'),
      'out_proj': source.dense('time_embedding.linear_2'),
    },
    'positions': source.take('positional_embedding')[0],
    'query': source.take('prd_embedding')[0, 0],
    'blocks': blocks,
    'norm': source.layer_norm('norm_out'),
    'out_proj': source.dense('proj_to_clip_embeddings'),
  }
  statistics = diffusion_prior.Statistics(source.take('clip_mean')[0], source.take('clip_std')[0])
  return source.done(params, expected), statistics


def _res_block(source: Source, name: str, skip: bool) -> Tree:
  block = {
    'norm_in': source.group_norm(f'{name}.norm1'),
    'conv_in': source.conv(f'{name}.conv1'),
    'emb_proj': source.dense(f'{name}.time_emb_proj'),
    'norm_out': source.group_norm(f'{name}.norm2'),
    'conv_out': source.conv(f'{name}.conv2'),
  }
  return {**block, 'skip': source.conv(f'{name}.conv_shortcut')} if skip else block


def _attention(source: Source, name: str, config: UNetConfig) -> Tree:
  return {
    'norm': source.group_norm(f'{name}.group_norm'),
    'qkv': source.heads_in([f'{name}.to_{x}' for x in 'qkv'], config.head_dim),
    'context_kv': source.heads_in([f'{name}.add_{x}_proj' for x in 'kv'], config.head_dim),
    'out_proj': source.heads_out(f'{name}.to_out.0', config.head_dim),
  }


def take_unet(source: Source, config: UNetConfig) -> Tree:
  """diffusers' UNet2DModel or UNet2DConditionModel with residual resampling -> our U-Net."""
  params: Tree = {
    'time_mlp': {
      'in_proj': source.dense('time_embedding.linear_1'),
      'out_proj': source.dense('time_embedding.linear_2'),
    },
    'norm_out': source.group_norm('conv_norm_out'),
    'conv_out': source.conv('conv_out'),
  }
  conv_in = source.conv('conv_in')
  if config.condition_channels:  # a convolution of [x_t, low] is one of each
    x_t, low = np.split(conv_in['kernel'], [config.in_channels], axis=2)
    params['conv_in'] = {'kernel': x_t, 'bias': conv_in['bias']}
    params['conv_condition'] = {'kernel': low}
  else:
    params['conv_in'] = conv_in
  levels, n = len(config.multipliers), config.num_res_blocks
  widths = [config.channels * m for m in config.multipliers]
  for level in range(levels):
    down, up = f'down_blocks.{level}', f'up_blocks.{levels - 1 - level}'
    for i in range(n):
      skip = i == 0 and level > 0 and widths[level] != widths[level - 1]
      params[f'down_blocks_{level}_{i}'] = _res_block(source, f'{down}.resnets.{i}', skip)
    for i in range(n + 1):
      params[f'up_blocks_{level}_{i}'] = _res_block(source, f'{up}.resnets.{i}', True)
    if level in config.attention_levels:
      for i in range(n):
        name = f'{down}.attentions.{i}'
        params[f'down_attention_{level}_{i}'] = _attention(source, name, config)
      for i in range(n + 1):
        name = f'{up}.attentions.{i}'
        params[f'up_attention_{level}_{i}'] = _attention(source, name, config)
    if level < levels - 1:
      params[f'downsamplers_{level}'] = _res_block(source, f'{down}.downsamplers.0', False)
    if level > 0:
      params[f'upsamplers_{level - 1}'] = _res_block(source, f'{up}.upsamplers.0', False)
  for i in range(2):
    params[f'middle_blocks_{i}'] = _res_block(source, f'mid_block.resnets.{i}', False)
  if config.attention_levels:
    params['middle_attention'] = _attention(source, 'mid_block.attentions.0', config)
  return params


def convert_decoder(tensors: Tensors, config: DecoderConfig, expected: Any) -> Tree:
  """UnCLIPTextProjModel and the decoder's UNet2DConditionModel -> our decoder's parameters."""
  source = Source(tensors)
  null_z_i = source.take('learned_classifier_free_guidance_embeddings')
  tokens = source.dense('clip_extra_context_tokens_proj')
  # Karlo's reshape (B, 1536, 4) makes the token the fastest axis of the output.
  shape = (config.unet.context_dim, config.num_image_tokens)
  params = {
    'null_z_i': null_z_i,
    'z_i_to_emb': source.dense('clip_image_embeddings_project_to_time_embeddings'),
    'z_i_to_tokens': {
      'kernel': tokens['kernel'].reshape(-1, *shape).swapaxes(1, 2),
      'bias': tokens['bias'].reshape(shape).T,
    },
    # The text projection has the only `embedding_proj` here: the U-Net's is `time_embedding`.
    'text_to_emb': source.dense('embedding_proj'),
    'text_to_context': source.dense('encoder_hidden_states_proj'),
    'context_norm': source.layer_norm('text_encoder_hidden_states_norm'),
    'unet': take_unet(source, config.unet),
  }
  return source.done(params, expected)


def convert_upsampler(tensors: Tensors, config: UpsamplerConfig, expected: Any) -> Tree:
  """One of Karlo's super-resolution nets, UNet2DModel -> one network of our upsampler."""
  source = Source(tensors)
  return source.done(take_unet(source, config.unet), expected)


def _clip_blocks(source: Source, name: str, depth: int, head_dim: int) -> Tree:
  blocks = {}
  for i in range(depth):
    layer = f'{name}.encoder.layers.{i}'
    qkv = [f'{layer}.self_attn.{x}_proj' for x in 'qkv']
    blocks[f'block_{i}'] = {
      'attention_norm': source.layer_norm(f'{layer}.layer_norm1'),
      'qkv': source.heads_in(qkv, head_dim),
      'attention_out': source.heads_out(f'{layer}.self_attn.out_proj', head_dim),
      'mlp_norm': source.layer_norm(f'{layer}.layer_norm2'),
      'mlp_in': source.dense(f'{layer}.mlp.fc1'),
      'mlp_out': source.dense(f'{layer}.mlp.fc2'),
    }
  return blocks


def convert_clip(tensors: Tensors, config: ClipConfig, expected: Any) -> Tree:
  """transformers' CLIPModel -> our CLIP's parameters."""
  source = Source(tensors)
  text, vision = config.text, config.vision
  patches = source.take('vision_model.embeddings.patch_embedding.weight')
  params = {
    'log_scale': source.take('logit_scale'),
    'text_projection': {'kernel': source.take('text_projection.weight').T},
    'image_projection': {'kernel': source.take('visual_projection.weight').T},
    'text': {
      'tokens': {'embedding': source.take('text_model.embeddings.token_embedding.weight')},
      'positions': source.take('text_model.embeddings.position_embedding.weight'),
      'blocks': _clip_blocks(source, 'text_model', text.depth, text.width // text.num_heads),
      'norm': source.layer_norm('text_model.final_layer_norm'),
    },
    'vision': {
      'patch_embedding': {'kernel': patches.transpose(2, 3, 1, 0)},
      'class_token': source.take('vision_model.embeddings.class_embedding'),
      'positions': source.take('vision_model.embeddings.position_embedding.weight'),
      'norm_in': source.layer_norm('vision_model.pre_layrnorm'),
      'blocks': _clip_blocks(
        source, 'vision_model', vision.depth, vision.width // vision.num_heads
      ),
      'norm_out': source.layer_norm('vision_model.post_layernorm'),
    },
  }
  return source.done(params, expected)
