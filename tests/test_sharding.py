"""Many devices give what one gives. Eight virtual CPU devices, hence a process of its own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax.sharding import (
  batch_sharding,
  make_mesh,
  place_batch,
  pmapped,
  replicated,
  sharded,
)
from unclip_jax.types import UnclipError

SAMPLING = """
import jax, jax.numpy as jnp, numpy as np
from unclip_jax.diffusion.gaussian import predict
from unclip_jax.diffusion.samplers import ddpm, sample_loop, start_noise
from unclip_jax.diffusion.schedule import cosine_schedule, make_plan, strided_timesteps
from unclip_jax.sharding import make_mesh, place_batch, pmapped, replicated, sharded
from unclip_jax.types import UnclipError

plan = make_plan(cosine_schedule(), strided_timesteps(1000, 7))
weights = np.random.default_rng(0).normal(size=(3, 3, 5, 5)).astype(np.float32) / 3
params = {'conv': jnp.asarray(weights), 'scale': jnp.float32(1.5)}


def sample(params, key_b):
  def denoise(x_t, step):
    layers = ('NHWC', 'HWIO', 'NHWC')
    output = jax.lax.conv_general_dilated(
      x_t, params['conv'], (1, 1), 'SAME', dimension_numbers=layers
    )
    return predict(params['scale'] * jnp.tanh(output), x_t, step, 'x_0')

  return sample_loop(denoise, ddpm(), plan, start_noise(key_b, (6, 6, 5)), key_b)


assert len(jax.devices()) == 8
key_b = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(16))
wanted = np.asarray(sharded(sample, make_mesh(1))(params, key_b))
assert 0.3 < wanted.std() < 3
for wrap in (sharded, pmapped):
  for num_devices, size in ((8, 16), (8, 3), (2, 11)):
    mesh = make_mesh(num_devices)
    got = wrap(sample, mesh)(jax.device_put(params, replicated(mesh)), key_b[:size])
    assert got.shape == (size, 6, 6, 5)
    np.testing.assert_allclose(got, wanted[:size], atol=1e-5)

mesh = make_mesh()
out = sharded(sample, mesh)(params, key_b)
assert len(out.sharding.device_set) == 8 and not out.is_fully_replicated
placed = jax.device_put(params, replicated(mesh)), place_batch(key_b, mesh)
program = jax.jit(sample).lower(*placed).compile().as_text()
assert 'all-' not in program and 'collective-' not in program, 'devices wait for each other'
try:
  place_batch(key_b[:11], mesh)
except UnclipError as error:
  assert 'a batch of 11 cannot be split over 8 devices' in str(error)
else:
  raise SystemExit('an uneven batch was placed')
print('done')
"""


TRAINING = """
import jax, jax.numpy as jnp, numpy as np, optax
from unclip_jax.sharding import constrain_batch, make_mesh, replicated
from unclip_jax.train.state import init_state, make_multi_step, make_train_step
from unclip_jax.weights.checkpoint import Checkpoints
import sys

pool = {'x': np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)}
optimizer = optax.adamw(1e-2)


def loss_fn(params, batch, key):
  noise = jax.random.normal(key, batch['x'].shape)
  return jnp.mean(((batch['x'] + noise) @ params['w'] - batch['x']) ** 2), {}


def run(num_devices, steps, state=None):
  mesh = make_mesh(num_devices)

  def make_batch(pool, indices, key):
    return constrain_batch(jax.tree.map(lambda a: a[indices], pool), mesh)

  whole = replicated(mesh)
  step = make_train_step(loss_fn, optimizer, 0.9)
  many = jax.jit(make_multi_step(step, steps, 16, make_batch), out_shardings=whole)
  if state is None:
    state = jax.jit(lambda: init_state({'w': jnp.ones((4, 4))}, optimizer), out_shardings=whole)()
  return many(state, jax.device_put(pool, whole), jax.random.key(0))


one, metrics = run(1, 6)
eight, sharded_metrics = run(8, 3)
with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(3, eight)
  # Onto fewer devices than saved it.
  like = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(make_mesh(4))), eight
  )
  four = checkpoints.restore(like)
assert len(four.params['w'].sharding.device_set) == 4
four, more = run(4, 3, four)
losses = np.concatenate([sharded_metrics['loss'], more['loss']])
np.testing.assert_allclose(losses, metrics['loss'], rtol=1e-5)
np.testing.assert_allclose(four.params['w'], one.params['w'], rtol=1e-5)
print('done')
"""


def on_eight_devices(script: str, *arguments: str) -> None:
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, '-c', script, *arguments], env=env, capture_output=True, text=True, check=False
  )
  assert done.stdout.strip() == 'done', done.stderr


def test_samples_are_those_of_one_device_under_jit_and_pmap():
  on_eight_devices(SAMPLING)


def test_training_is_that_of_one_device_and_continues_on_another_number(tmp_path):
  on_eight_devices(TRAINING, str(tmp_path))


def test_mesh_has_the_devices_asked_for():
  mesh = make_mesh(1)
  assert dict(mesh.shape) == {'data': 1, 'model': 1}
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize('num_devices', [0, -1, 4096])
def test_more_devices_than_there_are_is_an_error(num_devices):
  with pytest.raises(UnclipError, match=f'{num_devices} devices were asked for'):
    make_mesh(num_devices)


def test_placement():
  mesh = make_mesh(1)
  batch = place_batch({'a': np.ones((3, 2)), 'key': jax.random.split(jax.random.key(0), 3)}, mesh)
  assert batch['a'].sharding == batch_sharding(mesh)
  assert batch['key'].shape == (3,)
  assert replicated(mesh).is_fully_replicated


def test_batches_of_two_sizes_are_refused():
  with pytest.raises(ValueError, match='differ in their first axis'):
    place_batch([np.ones(3), np.ones(4)], make_mesh(1))


@pytest.mark.parametrize('wrap', [sharded, pmapped])
def test_trees_go_in_and_out(wrap):
  def fn(params, batch):
    return {'sum': batch['x'] + params[None]}

  out = wrap(fn, make_mesh(1))(jnp.arange(2.0), {'x': jnp.ones((3, 2))})
  np.testing.assert_array_equal(out['sum'], np.ones((3, 2)) + np.arange(2.0))
