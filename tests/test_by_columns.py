"""Kernels by columns: the same numbers in the same memory, and no copy of them in a loop."""

import re

import jax
import numpy as np
import pytest
from tiny_model import CONFIG, TEXTS, levels_apart, make_params, write_tiny_model
from tiny_stages import CONFIG as STAGES
from tiny_stages import STATISTICS, keys, make_text, random_params

import unclip_jax
from unclip_jax import Sampling
from unclip_jax.config_json import override
from unclip_jax.nn import columns
from unclip_jax.nn.columns import ByColumns
from unclip_jax.stages import ar_prior, diffusion_prior
from unclip_jax.stages.common import make_plan
from unclip_jax.systems import by_columns, programs
from unclip_jax.systems.exported import load_exported, write_exported
from unclip_jax.systems.loading import expected_params


@pytest.fixture(autouse=True)
def _small_kernels(monkeypatch):
  monkeypatch.setattr(by_columns, 'MIN_SIZE', 256)


def is_by_columns(leaf):
  return isinstance(leaf, ByColumns)


def kernels(params):
  return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_by_columns) if is_by_columns(leaf)]


def test_views_share_the_memory_of_kernels_that_keep_their_shapes():
  params = jax.device_put(make_params(CONFIG)['prior'])
  laid_out = by_columns.lay_out(params)
  jax.tree.map(np.testing.assert_array_equal, params, laid_out)
  seen = by_columns.view(laid_out)
  assert len(kernels(seen)) == 4 * CONFIG.prior.depth
  jax.tree.map(np.testing.assert_array_equal, params, columns.plain(seen))
  block = laid_out['network']['blocks']['block_0']
  twins = seen['network']['blocks']['block_0']
  for name in ('qkv', 'attention_out', 'mlp_in', 'mlp_out'):
    kernel, twin = block[name]['kernel'], twins[name]['kernel']
    assert twin.columns.unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    assert twin.shape == kernel.shape and twin.columns.ndim == 2
  again = by_columns.view(seen)
  assert kernels(again)[0] is kernels(seen)[0]
  assert not kernels(by_columns.view(params))


def test_views_outlive_what_they_are_of():
  block = {'qkv': {'kernel': jax.device_put(np.arange(2048, dtype='f').reshape(32, 1, 1, 64))}}
  expected = np.asarray(block['qkv']['kernel']).reshape(32, 64).T
  seen = by_columns.view(by_columns.lay_out(block))
  del block
  filler = [jax.device_put(np.full((32, 1, 1, 64), i, np.float32)) for i in range(8)]
  np.testing.assert_array_equal(seen['qkv']['kernel'].columns, expected)
  del filler


def test_only_large_float32_kernels_of_blocks_are_laid_out(monkeypatch):
  monkeypatch.setattr(by_columns, 'MIN_SIZE', 2**20)
  params = jax.device_put(make_params(CONFIG)['prior'])
  assert not kernels(by_columns.view(by_columns.lay_out(params)))
  monkeypatch.setattr(by_columns, 'MIN_SIZE', 1)
  half = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), params)
  assert not kernels(by_columns.view(by_columns.lay_out(half)))


def sample_diffusion(params, text, plan):
  sampler = diffusion_prior.samplers.ddim()
  return diffusion_prior.sample(
    STAGES.prior, params, STATISTICS, text, text, keys(3), plan, sampler, np.float32(2.0)
  )[0]


def test_the_prior_draws_the_same_and_copies_no_kernel():
  params = jax.device_put(random_params(diffusion_prior, STAGES.prior))
  text = make_text(3)
  plan = make_plan(STAGES.prior.diffusion, STAGES.prior.sampling)
  expected = jax.jit(sample_diffusion)(params, text, plan)
  seen = by_columns.view(by_columns.lay_out(params))
  program = jax.jit(sample_diffusion).lower(seen, text, plan).compile()
  np.testing.assert_allclose(program(seen, text, plan), expected, atol=1e-5)
  shapes = {','.join(map(str, kernel.shape)) for kernel in kernels(seen)}
  shapes |= {','.join(map(str, kernel.columns.shape)) for kernel in kernels(seen)}
  moved = re.findall(r'f32\[([\d,]+)\]\S* (?:copy|transpose)\(', program.as_text())
  assert not shapes & set(moved)


def test_the_autoregressive_prior_draws_the_same(tmp_path):
  config = override(unclip_jax.presets.preset('tiny_ar'), ['clip.vision.depth=1'])
  params = jax.device_put(make_params(config)['prior'])
  text = make_text(2)

  @jax.jit
  def sample(params):
    quantiser = ar_prior.Quantiser(**params['quantiser'])
    given = (config.prior, params['network'], quantiser, text, text, keys(2))
    return ar_prior.sample(*given, np.float32(2.0))

  seen = by_columns.view(by_columns.lay_out(params))
  assert kernels(seen)
  np.testing.assert_allclose(sample(seen), sample(params), atol=1e-5)


def test_a_model_is_laid_out_and_its_parameters_are_arrays(tmp_path, monkeypatch):
  few = Sampling(num_steps=2)
  settings = {'prior': few, 'decoder': few, 'size': 16}
  folder = write_tiny_model(tmp_path / 'model')
  model = unclip_jax.load(folder)
  drawn = model.generate(TEXTS[:2], **settings)
  leaves = jax.tree.leaves(model.params)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert kernels(by_columns.view(model.params['prior']))
  fused = unclip_jax.fuse(model, 2, **settings)
  assert levels_apart(fused.generate(TEXTS[:2]), drawn) <= 1
  write_exported(fused, tmp_path / 'exported')
  assert levels_apart(load_exported(tmp_path / 'exported').generate(TEXTS[:2]), drawn) <= 1
  monkeypatch.setattr(by_columns, 'MIN_SIZE', 2**20)
  other = unclip_jax.load(folder)
  assert not kernels(by_columns.view(other.params['prior']))
  assert levels_apart(other.generate(TEXTS[:2], **settings), drawn) <= 1


def test_what_is_described_is_seen_as_what_is_there():
  described = by_columns.view(by_columns.lay_out(expected_params(CONFIG)['prior']))
  there = by_columns.view(by_columns.lay_out(jax.device_put(make_params(CONFIG)['prior'])))
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), there)
  assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), described)
  assert isinstance(programs.sample_prior, by_columns.Program)
