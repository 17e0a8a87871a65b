"""Low-rank adapters: what they change, what is trained, and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file
from tiny_model import TWO_LEVELS, make_params

from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.prior import PriorNetwork
from unclip_jax.train.lora import init_lora, merge_lora
from unclip_jax.types import UnclipError
from unclip_jax.weights.lora import load_lora, save_lora

PRIOR = TWO_LEVELS.prior


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(jnp.asarray, make_params(TWO_LEVELS)['prior']['network'])


def draw(adapters, seed=0):
  """Adapters that do something."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapters)


def test_adapters_are_of_the_attention_and_change_nothing_at_first(params):
  adapters = init_lora(params, 3, jax.random.key(0))
  layers = {
    f'blocks.block_{i}.{name}' for i in range(PRIOR.depth) for name in ('qkv', 'attention_out')
  }
  assert set(adapters) == layers
  assert adapters['blocks.block_0.qkv']['a'].shape == (PRIOR.width, 3)
  assert adapters['blocks.block_0.qkv']['b'].shape == (3, 3 * PRIOR.width)
  jax.tree.map(np.testing.assert_array_equal, merge_lora(params, adapters), params)
  decoder = init_lora(make_params(TWO_LEVELS)['decoder'], 2, jax.random.key(0))
  assert {name.rpartition('.')[2] for name in decoder} == {
    'qkv', 'context_kv', 'out_proj', 'attention_out',
  }  # fmt: skip
  assert all('time_mlp' not in name for name in decoder)


def test_a_merged_layer_is_the_layer_plus_two_thin_ones(params):
  adapters = draw(init_lora(params, 2, jax.random.key(0)))
  merged = merge_lora(params, adapters, 0.5)
  x = np.random.default_rng(1).normal(size=(5, PRIOR.width)).astype('f')
  block, thin = params['blocks']['block_1'], adapters['blocks.block_1.qkv']
  kernel = block['qkv']['kernel'].reshape(PRIOR.width, -1)
  expected = x @ kernel + 0.5 * (x @ thin['a']) @ thin['b']
  ours = x @ merged['blocks']['block_1']['qkv']['kernel'].reshape(PRIOR.width, -1)
  np.testing.assert_allclose(ours, expected, atol=1e-4)
  out, thin = block['attention_out']['kernel'], adapters['blocks.block_1.attention_out']
  heads = x.reshape(5, *out.shape[:2])
  expected = np.einsum('bnd,ndo->bo', heads, out) + 0.5 * (x @ thin['a']) @ thin['b']
  ours = np.einsum('bnd,ndo->bo', heads, merged['blocks']['block_1']['attention_out']['kernel'])
  np.testing.assert_allclose(ours, expected, atol=1e-4)
  # All else is as it was.
  for name in ('mlp_in', 'mlp_norm'):
    jax.tree.map(np.testing.assert_array_equal, merged['blocks']['block_1'][name], block[name])
  half = merge_lora(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), adapters)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {'bfloat16'}


def test_adapters_alone_are_trained_and_lower_the_loss(params):
  rng = np.random.default_rng(0)
  z, target = rng.normal(size=(2, 8, PRIOR.embed_dim)).astype('f')
  t = PRIOR.context_length
  text = TextFeatures(
    jnp.zeros((8, t), jnp.int32),
    jnp.ones((8, t), bool),
    jnp.asarray(rng.normal(size=(8, t, PRIOR.text_width)), jnp.float32),
    jnp.asarray(rng.normal(size=(8, PRIOR.embed_dim)), jnp.float32),
  )

  @jax.jit
  def loss(adapters):
    merged = {'params': merge_lora(params, adapters)}
    steps = jnp.arange(8) * 100
    out = PriorNetwork(PRIOR).apply(merged, z, steps, text, method='predict')
    return ((out - target) ** 2).mean()

  adapters = init_lora(params, 4, jax.random.key(1))
  optimizer = optax.adam(1e-2)
  state, first = optimizer.init(adapters), loss(adapters)
  for _ in range(30):
    updates, state = optimizer.update(jax.grad(loss)(adapters), state)
    adapters = optax.apply_updates(adapters, updates)
  assert loss(adapters) < 0.8 * first


def test_files_come_back_with_what_they_are_for(params, tmp_path):
  adapters = draw(init_lora(params, 2, jax.random.key(0)))
  save_lora(tmp_path / 'x.safetensors', adapters, 0.25, 'prior')
  stage, scale, again = load_lora(tmp_path / 'x.safetensors')
  assert (stage, scale) == ('prior', 0.25)
  jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_what_does_not_fit_is_named(params, tmp_path):
  with pytest.raises(UnclipError, match='a rank of 0'):
    init_lora(params, 0, jax.random.key(0))
  with pytest.raises(UnclipError, match='no attention'):
    init_lora({'dense': {'kernel': jnp.ones((2, 2))}}, 1, jax.random.key(0))
  adapters = init_lora(params, 2, jax.random.key(0))
  with pytest.raises(UnclipError, match=r'no layer blocks\.block_9\.qkv'):
    merge_lora(params, {'blocks.block_9.qkv': adapters['blocks.block_0.qkv']})
  wrong = {'blocks.block_0.qkv': {'a': jnp.ones((3, 2)), 'b': jnp.ones((2, 9))}}
  with pytest.raises(UnclipError, match=r'adapter of blocks\.block_0\.qkv is \[3, 2\]'):
    merge_lora(params, wrong)
  with pytest.raises(UnclipError, match='there are no adapters'):
    load_lora(tmp_path / 'none.safetensors')
  save_file({'x': np.ones(2, 'f')}, tmp_path / 'other.safetensors')
  with pytest.raises(UnclipError, match='holds no adapters'):
    load_lora(tmp_path / 'other.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes(b'123')
  with pytest.raises(UnclipError, match='holds no adapters'):
    load_lora(tmp_path / 'cut.safetensors')
