"""The prior, which runs on a cached prefix, against diffusers' PriorTransformer, which does not."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
import twins

from unclip_jax.configs import DiffusionConfig, PriorConfig, SamplingConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.prior import PriorNetwork
from unclip_jax.stages import diffusion_prior
from unclip_jax.weights import diffusers_prior

TOLERANCE = 1e-5


def make_config(embed_dim, context_length, num_heads, head_dim, depth):
  return PriorConfig(
    embed_dim=embed_dim,
    text_width=embed_dim,  # diffusers knows one width for both
    context_length=context_length,
    width=num_heads * head_dim,
    depth=depth,
    num_heads=num_heads,
    diffusion=DiffusionConfig(prediction='x_0', clip_x_0=5.0),
    sampling=SamplingConfig(num_steps=25, spacing='karlo', guidance_scale=4.0),
    unit_norm=False,
    num_candidates=1,
  )


def make_twin(config, seed):
  twin = diffusers.PriorTransformer(
    num_attention_heads=config.num_heads,
    attention_head_dim=config.width // config.num_heads,
    num_layers=config.depth,
    embedding_dim=config.embed_dim,
    num_embeddings=config.context_length,
    additional_embeddings=4,
  )
  return twins.randomise(twin, seed)


def make_inputs(config, batch):
  """Captions of odd lengths, the longest one without padding; other timesteps for each."""
  rng = np.random.default_rng(batch)
  length = config.context_length
  ends = np.array([length, 3, length - 2, 1, 5])[:batch]
  text = TextFeatures(
    ids=np.zeros((batch, length), np.int32),
    mask=np.arange(length)[None] < ends[:, None],
    states=rng.normal(size=(batch, length, config.text_width)).astype('f'),
    z_t=rng.normal(size=(batch, config.embed_dim)).astype('f'),
  )
  z_i_t = rng.normal(size=(batch, config.embed_dim)).astype('f')
  return z_i_t, np.array([999, 0, 417, 38, 666][:batch]), text


def run_twin(twin, z_i_t, t, text):
  """The embedding, in CLIP's space, and the keys that each block gives to the prefix."""
  keys = []
  hooks = [
    block.attn1.to_k.register_forward_hook(lambda module, x, y: keys.append(y))
    for block in twin.transformer_blocks
  ]
  output = twin(
    hidden_states=torch.from_numpy(z_i_t),
    timestep=torch.from_numpy(t),
    proj_embedding=torch.from_numpy(text.z_t),
    encoder_hidden_states=torch.from_numpy(text.states),
    attention_mask=torch.from_numpy(text.mask),
  ).predicted_image_embedding
  for hook in hooks:
    hook.remove()
  return [twin.post_process_latents(output), *(k[:, :-3] for k in keys)]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, z_i_t, t, text):
  network, variables = PriorNetwork(config), {'params': params['network']}
  statistics = diffusion_prior.Statistics(**params['statistics'])
  prefix = network.apply(variables, text, method='encode_prefix')
  time_emb = network.apply(variables, t, method='encode_time')
  output = network.apply(variables, z_i_t, time_emb, prefix)
  z_i = output * statistics.std[None] + statistics.mean[None]
  # No output depends on the bias of the keys, which softmax cancels: the keys are compared too.
  return [z_i, *(k.reshape(*k.shape[:2], -1) for k, _ in prefix.caches)]


@functools.cache
def expected_shapes(config):
  network = jax.eval_shape(lambda key: diffusion_prior.init(config, key), jax.random.key(0))
  row = jax.ShapeDtypeStruct((config.embed_dim,), 'float32')
  return {'network': network, 'statistics': {'mean': row, 'std': row}}


def convert(tensors, config):
  return twins.convert(tensors, diffusers_prior.rules(config), expected_shapes(config))


CONFIGS = {
  'odd': make_config(embed_dim=13, context_length=7, num_heads=3, head_dim=10, depth=3),
  'karlo': make_config(embed_dim=24, context_length=77, num_heads=5, head_dim=64, depth=1),
}


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('batch', [1, 5])
def test_cached_prior_agrees_with_uncached_diffusers(name, batch):
  config = CONFIGS[name]
  twin = make_twin(config, seed=batch)
  params = convert(twins.tensors_of(twin), config)
  inputs = make_inputs(config, batch)
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twin(twin, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


def test_prior_uses_every_tensor_of_diffusers():
  config = CONFIGS['odd']
  twin = make_twin(config, seed=0)
  inputs, rules = make_inputs(config, 3), diffusers_prior.rules(config)

  def run(tensors):
    return run_ours(config, twins.lay_out(tensors, rules, expected_shapes(config)), *inputs)

  expected = run_twin(twin, *inputs)
  twins.check_each_tensor_matters(twins.tensors_of(twin), run, expected, TOLERANCE)
