"""Stable Diffusion's U-Net: sizes, what depends on what, and configs that cannot be expressed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.config_json import from_json, to_json
from unclip_jax.configs import LatentUNetConfig
from unclip_jax.nn.latent_unet import CrossAttentionBlock, LatentUNet
from unclip_jax.types import UnclipError
from unclip_jax.weights.diffusers_latent_unet import read_config, rules, write_config
from unclip_jax.weights.safetensors import named_leaves

CONFIG = LatentUNetConfig(
  in_channels=4,
  out_channels=3,
  channels=8,
  multipliers=(1, 2),
  num_res_blocks=1,
  attention_levels=(0,),
  num_heads=(2, 4),
  depths=(1, 1),
  context_dim=6,
  class_dim=5,
  num_groups=4,
)
STABLE_DIFFUSION_1 = LatentUNetConfig(
  in_channels=4,
  out_channels=4,
  channels=320,
  multipliers=(1, 2, 4, 4),
  num_res_blocks=2,
  attention_levels=(0, 1, 2),
  num_heads=(8, 8, 8, 8),
  depths=(1, 1, 1, 1),
  context_dim=768,
  linear_projection=False,
)
STABLE_UNCLIP = dataclasses.replace(
  STABLE_DIFFUSION_1,
  num_heads=(5, 10, 20, 20),
  context_dim=1024,
  class_dim=2048,
  linear_projection=True,
)
# Their configs, without the fields that have the value of diffusers' default.
STABLE_DIFFUSION_1_VALUES = {'cross_attention_dim': 768}
STABLE_UNCLIP_VALUES = {
  '_class_name': 'UNet2DConditionModel',
  '_diffusers_version': '0.15.0',
  'attention_head_dim': [5, 10, 20, 20],
  'block_out_channels': [320, 640, 1280, 1280],
  'class_embed_type': 'projection',
  'cross_attention_dim': 1024,
  'projection_class_embeddings_input_dim': 2048,
  'sample_size': 96,
  'upcast_attention': True,
  'use_linear_projection': True,
}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


INPUTS = {
  'x': normal(2, 4, 6, 4),
  't': np.array([999, 3]),
  'context': normal(2, 3, 6, seed=1),
  'class_embedding': normal(2, 5, seed=2),
}


@functools.cache
def shapes(config):
  size = {'context': (2, 3, config.context_dim), 'x': (2, 4, 6, config.in_channels)}
  inputs = INPUTS | {name: np.zeros(shape, 'f') for name, shape in size.items()}
  inputs['class_embedding'] = np.zeros((2, config.class_dim), 'f') if config.class_dim else None
  init = functools.partial(LatentUNet(config).init, method='predict')
  return jax.eval_shape(lambda key: init(key, **inputs), jax.random.key(0))['params']


@functools.partial(jax.jit, static_argnums=0, static_argnames='dtype')
def predict(config, params, x, t, context, class_embedding, rng=None, dtype=jnp.float32):
  rngs = None if rng is None else {'dropout': rng}
  return LatentUNet(config, dtype).apply(
    {'params': params}, x, t, context, class_embedding, rng is None, method='predict', rngs=rngs
  )


@pytest.fixture(scope='module')
def params():
  return randomised(shapes(CONFIG))


@pytest.fixture(scope='module')
def output(params):
  return predict(CONFIG, params, **INPUTS)


def test_fresh_network_returns_zero_of_the_right_shape():
  # One level, with attention in the middle alone: drawing first parameters compiles faster.
  config = dataclasses.replace(CONFIG, multipliers=(1,), attention_levels=(), class_dim=0)
  init = functools.partial(LatentUNet(config).init_with_output, method='predict')
  inputs = INPUTS | {'class_embedding': None}
  output, _ = jax.jit(lambda key: init(key, **inputs))(jax.random.key(0))
  assert output.shape == (2, 4, 6, 3)
  assert output.dtype == jnp.float32
  np.testing.assert_array_equal(output, 0)


def test_network_feels_each_of_its_inputs(params, output):
  changed = {
    'x': normal(2, 4, 6, 4, seed=9),
    't': np.array([500, 700]),
    'context': INPUTS['context'] + np.array([0.0, 0.0, 0.5], 'f')[None, :, None],
    'class_embedding': -INPUTS['class_embedding'],
  }
  for name, value in changed.items():
    other = predict(CONFIG, params, **INPUTS | {name: value})
    assert (np.abs(other - output).max(axis=(1, 2, 3)) > 1e-3).all(), name


def test_what_is_encoded_outside_of_a_loop_is_what_each_step_would_encode(params, output):
  network, variables = LatentUNet(CONFIG), {'params': params}

  @jax.jit
  def sample(x, t, context, class_embedding):
    embs = network.apply(variables, t, method='encode_time')
    embs = embs + network.apply(variables, class_embedding, method='encode_class')
    context = network.apply(variables, context, method='encode_context')

    # Each "step" is one of the two timesteps, over the whole batch.
    def step(_, emb):
      emb = jnp.broadcast_to(emb[None], (x.shape[0], emb.shape[0]))
      return None, network.apply(variables, x, emb, context)

    return jax.lax.scan(step, None, embs)[1]

  steps = sample(**INPUTS)
  for i in range(2):
    np.testing.assert_allclose(steps[i, i], output[i], atol=1e-5)


def test_context_is_encoded_for_each_block_of_each_layer():
  config = dataclasses.replace(CONFIG, depths=(2, 1))
  encode = functools.partial(LatentUNet(config).apply, method='encode_context')
  context = jax.eval_shape(encode, {'params': shapes(config)}, INPUTS['context'])
  # One layer down, the middle, two layers up.
  assert [len(layer) for layer in context] == [2, 1, 2, 2]
  assert [layer[0][0].shape for layer in context] == [
    (2, 3, 2, 4),
    (2, 3, 4, 4),
    (2, 3, 2, 4),
    (2, 3, 2, 4),
  ]


def test_bfloat16_is_finite_and_near_float32(params, output):
  rounded = predict(CONFIG, params, **INPUTS, dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.float32
  assert np.isfinite(rounded).all()
  assert 0 < np.abs(rounded - output).mean() < 0.05 * output.std()


def test_gradient_reaches_every_parameter_and_dropout_draws():
  config = dataclasses.replace(CONFIG, multipliers=(1,), dropout=0.5)
  params = randomised(shapes(config))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def grad(params, rng):
    output = predict(config, params, **INPUTS, rng=rng)
    return (output**2).mean(), output

  dropped = []
  for seed in (0, 1):
    (_, output), grads = grad(params, jax.random.key(seed))
    dropped.append(output)
  assert np.abs(dropped[0] - dropped[1]).max() > 1e-2
  for name, g in named_leaves(grads).items():
    assert np.isfinite(g).all(), name
    assert np.abs(g).max() > 0, name


def test_odd_sizes_come_back(params):
  run = functools.partial(predict, CONFIG, params)
  shape = jax.eval_shape(run, **INPUTS | {'x': normal(2, 5, 7, 4)}).shape
  assert shape == (2, 5, 7, 3)


def test_class_embedding_is_asked_for_exactly_where_there_is_one(params):
  with pytest.raises(ValueError, match='no class_embedding, but a class_dim of 5'):
    predict(CONFIG, params, **INPUTS | {'class_embedding': None})
  with pytest.raises(ValueError, match='a class_embedding, but a class_dim of 0'):
    predict(dataclasses.replace(CONFIG, class_dim=0), params, **INPUTS)


def test_heads_that_do_not_divide_the_channels_are_refused():
  block = CrossAttentionBlock(width=8, num_heads=3)
  with pytest.raises(ValueError, match='3 heads do not divide 8 channels'):
    block.init(jax.random.key(0), normal(1, 4, 8), (normal(1, 2, 2, 4), normal(1, 2, 2, 4)))


# --- Configs and names of diffusers.


@pytest.mark.parametrize(
  ('values', 'config'),
  [(STABLE_DIFFUSION_1_VALUES, STABLE_DIFFUSION_1), (STABLE_UNCLIP_VALUES, STABLE_UNCLIP)],
  ids=['stable diffusion 1', 'stable unclip'],
)
def test_public_configs_are_read_and_written(values, config):
  assert read_config(values) == config
  assert read_config(write_config(config)) == config
  assert from_json(LatentUNetConfig, to_json(config)) == config


def test_config_of_every_field_is_read_again():
  config = dataclasses.replace(CONFIG, dropout=0.25, linear_projection=False, depths=(1, 3))
  assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('num_attention_heads', [5, 10, 20, 20]),
    ('attention_head_dim', (5, 10, 20, 20)),
    ('layers_per_block', [2, 2, 2, 2]),
    ('transformer_layers_per_block', [1, 1, 1, 1]),
    ('cross_attention_dim', [1024] * 4),
    ('only_cross_attention', [False] * 4),
    ('time_embedding_dim', 1280),
    ('act_fn', 'swish'),
    ('addition_time_embed_dim', None),
    ('a_field_of_a_later_version', None),
  ],
)
def test_other_spellings_of_the_same_config(name, value):
  assert read_config(STABLE_UNCLIP_VALUES | {name: value}) == STABLE_UNCLIP


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('_class_name', 'UNet2DModel'),
    ('act_fn', 'mish'),
    ('addition_embed_type', 'text_time'),
    ('attention_head_dim', 7),
    ('attention_head_dim', [5, 10, 20]),
    ('attention_head_dim', [5, 10, 20, 3]),  # of the middle
    ('attention_head_dim', [5, 10, 20, 0]),
    ('attention_type', 'gated'),
    ('block_out_channels', [320, 480, 1280, 1280]),
    ('block_out_channels', []),
    ('block_out_channels', [320.5, 641]),
    ('center_input_sample', True),
    ('class_embed_type', 'simple_projection'),
    ('class_embeddings_concat', True),
    ('conv_in_kernel', 1),
    ('conv_out_kernel', 5),
    ('cross_attention_dim', [1024, 1024, 512, 1024]),
    ('cross_attention_norm', 'layer_norm'),
    ('down_block_types', ['DownBlock2D'] * 3),
    ('down_block_types', [*['SimpleCrossAttnDownBlock2D'] * 3, 'DownBlock2D']),
    ('downsample_padding', 0),
    ('dropout', 1.0),
    ('dual_cross_attention', True),
    ('encoder_hid_dim', 1024),
    ('encoder_hid_dim_type', 'text_proj'),
    ('flip_sin_to_cos', False),
    ('freq_shift', 1),
    ('in_channels', 0),
    ('in_channels', True),
    ('layers_per_block', [2, 2, 1, 2]),
    ('mid_block_only_cross_attention', True),
    ('mid_block_scale_factor', 2),
    ('mid_block_type', None),
    ('mid_block_type', 'UNetMidBlock2DSimpleCrossAttn'),
    ('norm_eps', 1e-6),
    ('norm_num_groups', None),
    ('norm_num_groups', 3),
    ('num_attention_heads', [5, 10]),
    ('num_class_embeds', 10),
    ('only_cross_attention', True),
    ('only_cross_attention', [False, True, False, False]),
    ('projection_class_embeddings_input_dim', None),
    ('resnet_out_scale_factor', 0.5),
    ('resnet_skip_time_act', True),
    ('resnet_time_scale_shift', 'scale_shift'),
    ('reverse_transformer_layers_per_block', [1, 1, 1, 1]),
    ('time_cond_proj_dim', 256),
    ('time_embedding_act_fn', 'silu'),
    ('time_embedding_dim', 640),
    ('time_embedding_type', 'fourier'),
    ('timestep_post_act', 'silu'),
    ('transformer_layers_per_block', [[1, 1], 1, 1, 1]),
    ('up_block_types', [*['CrossAttnUpBlock2D'] * 3, 'UpBlock2D']),
    ('up_block_types', 'UpBlock2D'),
    ('use_linear_projection', 'yes'),
    ('a_field_of_a_later_version', 3),
  ],
)
def test_value_that_cannot_be_expressed_is_named(name, value):
  with pytest.raises(UnclipError) as error:
    read_config(STABLE_UNCLIP_VALUES | {name: value}, 'some/config.json')
  message = str(error.value)
  assert message.startswith('some/config.json: ')
  assert name in message
  assert value is None or repr(value) in message or str(tuple(value)) in message


def test_first_level_wider_than_the_first_convolution_cannot_be_written():
  with pytest.raises(UnclipError, match=r'multipliers are \(2, 4\)'):
    write_config(dataclasses.replace(CONFIG, multipliers=(2, 4)))


@pytest.mark.parametrize('changed', [{}, {'class_dim': 0, 'linear_projection': False}])
def test_rules_name_each_parameter_once(changed):
  config = dataclasses.replace(CONFIG, **changed)
  for names in zip(*((rule.ours, rule.theirs) for rule in rules(config)), strict=True):
    flat = [name for group in names for name in group]
    assert len(flat) == len(set(flat))
  ours = {name for rule in rules(config) for name in rule.ours}
  assert ours == set(named_leaves(shapes(config)))
