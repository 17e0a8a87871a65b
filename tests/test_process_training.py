"""Training by several processes: the losses of one, and each reads its own rows of a batch.

The processes call functions of this module, which must not wake JAX as it is imported.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import environment, free_address, start_function

from unclip_jax import processes, sharding
from unclip_jax.sharding import (
  constrain_state,
  fetch,
  make_mesh,
  make_state,
  place_rows,
  place_state,
  place_whole,
  process_rows,
)
from unclip_jax.systems.bad_step import read_bad_step, write_bad_step
from unclip_jax.train.state import (
  OptimizerConfig,
  epoch_indices,
  init_state,
  make_optimizer,
  make_train_step,
)
from unclip_jax.weights.checkpoint import Checkpoints

NUM_STEPS, BATCH, POOL = 3, 8, 20


def train_on_rows(mesh):
  """Of a run whose process reads its own rows alone: losses, state, rows, and a next step."""
  pool = {'x': np.random.default_rng(0).normal(size=(POOL, 16)).astype(np.float32)}
  optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, eps=1e-3), NUM_STEPS)
  seen = []

  def loss_fn(params, batch, key):
    noise = jax.random.normal(key, batch['x'].shape)
    return jnp.mean(((batch['x'] + noise) @ params['w'] - batch['x']) ** 2), {}

  step = make_train_step(loss_fn, optimizer, 0.9)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    state, metrics = step(state, batch, jax.random.key(0))
    return constrain_state(state, mesh, fsdp=True), metrics

  start = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
  state, losses = place_state(init_state({'w': start}, optimizer), mesh, fsdp=True), []
  for i in range(NUM_STEPS):
    order = np.asarray(epoch_indices(jax.random.key(7), i, POOL, BATCH))
    mine = order[process_rows(BATCH, mesh)]
    seen.append(mine.tolist())
    batch = place_rows({'x': pool['x'][mine]}, BATCH, mesh)
    state, metrics = update(state, batch)
    losses.append(float(metrics['loss']))
  key = place_whole(np.asarray(jax.random.key_data(jax.random.key(0))), mesh)
  return losses, state, seen, (step, state, batch, jax.random.wrap_key_data(key))


def draw():
  return {'w': jax.random.normal(jax.random.key(3), (16, 16))}


def one_of_two(number, address, folder):
  sharding.FSDP_MIN_SIZE = 64  # nothing is large here
  processes.start_processes(address, 2, int(number))
  mesh = make_mesh(all_processes=True)
  losses, state, seen, following = train_on_rows(mesh)
  assert not state.params['w'].is_fully_addressable
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(NUM_STEPS, state)
  for _ in range(2):  # the second in place of the first
    write_bad_step(f'{folder}_bad', *following, {'step': NUM_STEPS})
  made = make_state(draw, mesh, fsdp=True)
  assert made['w'].addressable_data(0).size == made['w'].size // 4
  again = place_state(made, mesh)
  jax.tree.map(np.testing.assert_array_equal, fetch(made), fetch(again))
  assert place_whole(np.arange(3), mesh).is_fully_replicated
  # One of them says so, then none does.
  said = [processes.any_process(number == '1'), processes.any_process(False)]
  print(json.dumps([losses, seen, fetch(made)['w'].tolist(), said]))
  processes.wait_for_processes()


def test_two_processes_train_as_one_and_each_reads_its_own_rows(tmp_path):
  address, env = free_address(), environment(tmp_path / 'cache', 2)
  started = [
    start_function(one_of_two, number, address, tmp_path / 'run', env=env) for number in (0, 1)
  ]
  said = [process.communicate() for process in started]
  assert [process.returncode for process in started] == [0, 0], said
  (losses, seen, made, asked), (others_losses, others_seen, *others) = (
    json.loads(out.splitlines()[-1]) for out, _ in said
  )
  wanted_losses, wanted, all_rows, (step, *given) = train_on_rows(make_mesh(1))
  assert losses == others_losses and [made, asked] == others
  np.testing.assert_allclose(made, draw()['w'], atol=1e-6)
  assert asked == [True, False]
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
  assert [a + b for a, b in zip(seen, others_seen, strict=True)] == all_rows
  with Checkpoints(tmp_path / 'run') as checkpoints:
    opened = checkpoints.restore(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), opened, wanted)
  bad_step = read_bad_step(f'{tmp_path / "run"}_bad')
  assert bad_step.about == {'step': NUM_STEPS}
  assert bad_step.run()['loss'] == pytest.approx(float(step(*given)[1]['loss']), rel=1e-5)
