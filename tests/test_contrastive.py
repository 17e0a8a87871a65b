"""CLIP's loss over large batches: block by block, and over eight virtual CPU devices."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.stages.clip import contrastive_loss
from unclip_jax.types import UnclipError

WRT = (0, 1, 2)  # z_i, z_t and log_scale, by which gradients are taken

ON_EIGHT_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from unclip_jax.measure.collectives import program_collectives
from unclip_jax.sharding import make_mesh, place_batch, replicated
from unclip_jax.stages.clip import contrastive_loss
from unclip_jax.systems.apart import make_apart
from unclip_jax.train.gradient_cache import make_cached_grad
from unclip_jax.train.sam import make_sam_grad

assert len(jax.devices()) == 8
mesh = make_mesh()
draw = np.random.default_rng(0)


def rows(n, d=16):
  return draw.normal(size=(n, d)).astype('f')


def embed(params, batch, key):
  keep = jax.random.bernoulli(key, 0.8, batch['x'].shape)
  z_i = jnp.tanh(batch['x'] * keep) @ params['image']
  z_t = jnp.tanh(batch['y']) @ params['text']
  return tuple(z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (z_i, z_t))


def loss_of_embeddings(params, z):
  return contrastive_loss(*z, params['log_scale'], None, 16)


def whole(params, batch):
  return loss_of_embeddings(params, embed_plainly(params, batch))


def embed_plainly(params, batch):
  return tuple(z / jnp.linalg.norm(z, axis=1, keepdims=True)
               for z in (batch['x'] @ params['image'], batch['y'] @ params['text']))


def over_devices(params, batch):
  z = embed_plainly(params, batch)
  return jax.lax.pmean(contrastive_loss(*z, params['log_scale'], 'data', 16), 'data')


params = {'image': rows(16, 5), 'text': rows(16, 5), 'log_scale': np.float32(1.2)}
batch = {'x': rows(64), 'y': rows(64)}
placed = jax.device_put(params, replicated(mesh)), place_batch(batch, mesh)
key = jax.random.key(5)


def assert_close(found, wanted):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, wanted)
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(wanted[1]))


grad_fn = jax.jit(jax.value_and_grad(whole, has_aux=True))
wanted = grad_fn(params, batch)
assert_close(grad_fn(*placed), wanted)
by_hand = jax.shard_map(over_devices, mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
assert_close(jax.jit(jax.value_and_grad(by_hand, has_aux=True))(*placed), wanted)

grad_fn = jax.jit(make_cached_grad(embed, loss_of_embeddings, 16))
wanted, found = grad_fn(params, batch, key), grad_fn(*placed, key)
assert len(found[1]['image'].sharding.device_set) == 8
assert_close(found, wanted)

# Two groups a device, one, and four groups that are each spread over all devices.
# What is sent does not depend on how many groups a device has.
sent = {}
for size in 4, 8, 16:
  wanted = jax.jit(make_sam_grad(embed, loss_of_embeddings, 0.3, size))(params, batch, key)
  there = make_apart(mesh, False)
  program = jax.jit(make_sam_grad(embed, loss_of_embeddings, 0.3, size, apart=there))
  program = program.lower(*placed, key).compile()
  found = program(*placed, key)
  assert len(found[1]['image'].sharding.device_set) == 8
  assert_close(found, wanted)
  sent[size] = program_collectives(program.as_text(), 8)
assert sent[4] == sent[8] and {*sent[4]} == {'all-gather', 'all-reduce'}, sent


def bytes_of_a_device(n):
  shapes = [jax.ShapeDtypeStruct((n, 16), jnp.float32, sharding=placed[1]['x'].sharding)] * 2
  shapes.append(jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)))
  loss = functools.partial(contrastive_loss, chunk_size=64)
  program = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*shapes).compile()
  return program.memory_analysis().temp_size_in_bytes


small, large = bytes_of_a_device(2048), bytes_of_a_device(4096)
assert large < 2.2 * small, (small, large)
# A device's rows of logits alone, at the whole width of the batch.
assert large < 4096 // 8 * 4096 * 4, large
print('done')
"""


def unit_rows(n, d, seed):
  z = np.random.default_rng(seed).normal(size=(n, d))
  return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def by_the_formula(z_i, z_t, log_scale):
  """Loss and gradients in float64, by the whole matrix of logits."""
  z_i, z_t = z_i.astype(np.float64), z_t.astype(np.float64)
  scale, n = np.exp(log_scale), len(z_i)
  logits = scale * z_i @ z_t.T
  shares = [np.exp(x - x.max(axis=1, keepdims=True)) for x in (logits, logits.T)]
  shares = [x / x.sum(axis=1, keepdims=True) for x in shares]
  loss = -sum(np.log(np.diag(x)).mean() for x in shares) / 2
  d_logits = (shares[0] + shares[1].T - 2 * np.eye(n)) / (2 * n)
  gradient = scale * d_logits @ z_t, scale * d_logits.T @ z_i, (d_logits * logits).sum()
  return loss, gradient, (logits.argmax(axis=1) == np.arange(n)).mean()


@pytest.mark.parametrize('chunk_size', [None, 12, 4, 1])
def test_loss_and_gradient_are_those_of_the_whole_matrix_in_chunks_of_any_size(chunk_size):
  z_i, z_t = unit_rows(12, 7, 0), unit_rows(12, 7, 1)
  z_t = 0.6 * z_t + 0.4 * z_i  # some captions come first
  grad_fn = jax.value_and_grad(contrastive_loss, WRT, has_aux=True)
  for log_scale in (0.5, 3.0):
    (loss, metrics), gradient = grad_fn(z_i, z_t, log_scale, None, chunk_size)
    wanted, wanted_gradient, accuracy = by_the_formula(z_i, z_t, log_scale)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for found, expected in zip(gradient, wanted_gradient, strict=True):
      np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.2 < accuracy < 1
    assert float(metrics['accuracy']) == pytest.approx(accuracy)


def test_logits_far_apart_neither_overflow_nor_vanish():
  """The highest logit stands in the last block, where the sum of the others is all but nothing."""
  z = np.eye(8, dtype=np.float32)
  order = np.roll(np.arange(8), 1)
  for chunk_size in (8, 2):
    loss, metrics = contrastive_loss(z, z[order], jnp.log(90.0), None, chunk_size)
    np.testing.assert_allclose(loss, 90, rtol=1e-5)
    assert float(metrics['accuracy']) == 0
    loss, metrics = contrastive_loss(z, z, jnp.log(90.0), None, chunk_size)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert float(metrics['accuracy']) == 1


def test_a_caption_that_is_there_twice_comes_first_for_neither_picture():
  z = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
  for chunk_size in (None, 2):
    assert float(contrastive_loss(z, z, 1.0, None, chunk_size)[1]['accuracy']) == 0.5


def bytes_of_temporaries(n, chunk_size):
  loss = functools.partial(contrastive_loss, chunk_size=chunk_size)
  z, log_scale = jax.ShapeDtypeStruct((n, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
  program = jax.jit(jax.value_and_grad(loss, WRT, has_aux=True)).lower(z, z, log_scale).compile()
  return program.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_batch_and_not_with_its_square():
  small, large = (bytes_of_temporaries(n, 64) for n in (1024, 2048))
  assert large < 2.2 * small
  assert large < 2048 * 2048 * 4 / 4
  assert bytes_of_temporaries(2048, None) > 2048 * 2048 * 4  # what it would be


@pytest.mark.parametrize('chunk_size', [5, 0, 24])
def test_chunks_that_do_not_divide_the_batch_are_refused(chunk_size):
  z = unit_rows(12, 7, 0)
  with pytest.raises(UnclipError, match=f'batch of 12 .* chunks of {chunk_size}: take a divisor'):
    contrastive_loss(z, z, 1.0, None, chunk_size)


def test_loss_cache_and_sam_on_eight_devices_are_those_of_one():
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, '-c', ON_EIGHT_DEVICES], env=env, capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == 'done', done.stderr
