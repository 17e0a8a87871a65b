"""Checkpoints: a run continued from one equals a run that was never stopped."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers
from processes import start_function

from unclip_jax.train.state import init_state, make_multi_step, make_train_step
from unclip_jax.types import UnclipError
from unclip_jax.weights.checkpoint import Checkpoints

KEY = jax.random.key(3)
POOL = {'x': np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)}
OPTIMIZER = optax.adamw(1e-2)


def loss_fn(params, batch, key):
  noise = jax.random.normal(key, batch['x'].shape)
  return jnp.mean(((batch['x'] + noise) @ params['w'] - batch['x']) ** 2), {}


def make_state():
  return init_state({'w': jnp.ones((4, 4)), 'b': jnp.zeros(4)}, OPTIMIZER)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
  with Checkpoints(tmp_path / 'run') as checkpoints:
    checkpoints.save(5, make_state())
  return tmp_path / 'run'


def test_a_continued_run_equals_an_uninterrupted_one(tmp_path):
  step = jax.jit(make_multi_step(make_train_step(loss_fn, OPTIMIZER, 0.99), 3, 4))
  state, losses = make_state(), []
  for _ in range(4):
    state, metrics = step(state, POOL, KEY)
    losses.extend(map(float, metrics['loss']))
  wanted = state

  state, again = make_state(), []
  for _ in range(2):
    state, metrics = step(state, POOL, KEY)
    again.extend(map(float, metrics['loss']))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(int(state.step), state)
  del state
  with Checkpoints(tmp_path) as checkpoints:
    state = checkpoints.restore(jax.eval_shape(make_state))
  for _ in range(2):
    state, metrics = step(state, POOL, KEY)
    again.extend(map(float, metrics['loss']))
  assert again == losses
  assert_equal(state, wanted)


def test_only_the_latest_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step() is None
    for step in (1, 2, 10):
      checkpoints.save(step, make_state()._replace(step=jnp.int32(step)))
    assert checkpoints.latest_step() == 10
    assert int(checkpoints.restore(make_state(), 2).step) == 2
    with pytest.raises(UnclipError, match='no checkpoint of step 1 in'):
      checkpoints.restore(make_state(), 1)
  assert {path.name for path in tmp_path.iterdir()} == {'2', '10'}


def test_a_step_that_is_there_is_left_alone(saved):
  with Checkpoints(saved) as checkpoints:
    checkpoints.save(5, make_state()._replace(step=jnp.int32(99)))
    assert int(checkpoints.restore(make_state()).step) == 0


def test_no_checkpoint_is_named(tmp_path):
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UnclipError, match='there is no checkpoint in'),
  ):
    checkpoints.restore(make_state())


def test_a_killed_write_does_not_count(saved):
  # What a kill leaves: a folder without the marks of completion, or one of Orbax's temporary names.
  shutil.copytree(saved / '5', saved / '6.orbax-checkpoint-tmp')
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.latest_step() == 5
    assert_equal(checkpoints.restore(make_state()), make_state())
  assert {path.name for path in saved.iterdir()} == {'5'}


def test_a_process_killed_while_saving_leaves_whole_checkpoints(tmp_path):
  script = f"""
import jax.numpy as jnp
from unclip_jax.weights.checkpoint import Checkpoints
with Checkpoints({str(tmp_path)!r}, keep=3) as checkpoints:
  for step in range(1, 10_000):
    checkpoints.save(step, {{'w': jnp.full((400, 400), float(step))}})
    print(step, flush=True)
"""
  process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE, text=True)
  with process:
    for _ in range(4):
      last = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    step = checkpoints.latest_step()
    assert step >= last
    state = checkpoints.restore({'w': jax.ShapeDtypeStruct((400, 400), jnp.float32)})
  np.testing.assert_array_equal(state['w'], np.full((400, 400), step, np.float32))


@pytest.mark.parametrize('change, message', [
  ({'w': jnp.ones((4, 4))}, 'has a params.b that is not wanted'),
  ({'w': jnp.ones((4, 4)), 'b': jnp.ones(4), 'c': jnp.ones(4)}, 'has no params.c'),
  ({'w': jnp.ones((4, 5)), 'b': jnp.ones(4)}, r'params.w as float32\[4, 4\], wanted is .*\[4, 5\]'),
  ({'w': jnp.ones((4, 4)), 'b': jnp.ones(4, jnp.bfloat16)}, 'params.b as float32.*bfloat16'),
])  # fmt: skip
def test_another_architecture_is_named(saved, change, message):
  with Checkpoints(saved) as checkpoints, pytest.raises(UnclipError, match=message):
    checkpoints.restore(make_state()._replace(params=change))


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = [
  *((truncate, name) for name in ('_METADATA', 'manifest.ocdbt', 'd/*', '_sharding')),
  *((flip, name) for name in ('manifest.ocdbt', 'd/*')),
  *((Path.unlink, name) for name in ('_METADATA', 'manifest.ocdbt', 'd/*')),
]


def damage_and_restore(folder: str) -> None:
  """Says for each damage what comes back with the one before it, and without."""
  whole = Path(folder) / 'whole'
  for change, name in DAMAGES:
    paths = list((whole / '7' / 'state').glob(name))
    assert paths, name
    for path in paths:
      shutil.rmtree(run := Path(folder) / 'run', ignore_errors=True)
      shutil.copytree(whole, run)
      change(run / path.relative_to(whole))
      said = []
      with Checkpoints(run, say=said.append) as checkpoints:
        state = checkpoints.restore(make_state())
        assert int(state.step) == 5, (change, path)
        assert_equal(state, make_state()._replace(step=jnp.int32(5)))
        (line,) = said
        assert 'run/7 is damaged, and called damaged_7 from now on: step 5 is' in line
        assert {path.name for path in run.iterdir()} == {'5', 'damaged_7'}
        checkpoints.save(7, make_state()._replace(step=jnp.int32(77)))
        assert int(checkpoints.restore(make_state()).step) == 77
      shutil.rmtree(run)
      shutil.copytree(whole / '7', run / '7')
      change(run / path.relative_to(whole))
      with Checkpoints(run, say=said.append) as checkpoints:
        with pytest.raises(UnclipError, match=r'run/7 (is damaged|has)'):
          checkpoints.restore(make_state())
        assert checkpoints.latest_step() == 7 and len(said) == 1
    print(change.__name__, name)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
  with Checkpoints(tmp_path / 'whole') as checkpoints:
    for step in (5, 7):
      checkpoints.save(step, make_state()._replace(step=jnp.int32(step)))
  # In a process of its own: TensorStore calls back late into what it abandoned, which pytest would
  # hold against whichever test runs by then.
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_backend_optimization_level=0',
  }
  said, errors = start_function(damage_and_restore, tmp_path, env=env).communicate()
  assert said.split('\n')[:-1] == [f'{change.__name__} {name}' for change, name in DAMAGES], errors


def test_a_write_goes_on_while_the_state_is_given_away(tmp_path, monkeypatch):
  """The files are written once the state is gone, and many updates later."""
  may_write = threading.Event()
  step = jax.jit(make_multi_step(make_train_step(loss_fn, OPTIMIZER, 0.99), 1, 4), donate_argnums=0)
  state = step(make_state(), POOL, KEY)[0]
  wanted = jax.tree.map(np.array, state)
  begin = jax_array_handlers._async_serialize_replica_slices

  async def hold_back(*args, **kwargs):
    may_write.wait(60)
    return await begin(*args, **kwargs)

  monkeypatch.setattr(jax_array_handlers, '_async_serialize_replica_slices', hold_back)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save_async(1, state)
    for _ in range(5):
      state, _ = step(state, POOL, KEY)
      checkpoints.check()
    assert int(state.step) == 6 and not (tmp_path / '1').exists()
    may_write.set()
    assert checkpoints.latest_step() == 1
    assert_equal(checkpoints.restore(make_state()), wanted)


def test_unwritable_folder_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UnclipError, match=r'cannot use .*file/run for checkpoints'):
    Checkpoints(tmp_path / 'file' / 'run')


def fill_the_disk(folder: str) -> None:
  """A limit on the size of files stands for it."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
  noise = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(400, 400)))}
  with Checkpoints(folder, keep=1) as checkpoints:
    for save in (checkpoints.save, checkpoints.save_async):
      with pytest.raises(UnclipError, match=r'cannot write the checkpoint of step 6 .*: free'):
        save(6, noise)
        while True:  # the write of `save_async` fails on its own
          checkpoints.check()
          time.sleep(0.01)
      assert checkpoints.latest_step() == 5
      assert {path.name for path in Path(folder).iterdir()} == {'5'}
    with pytest.raises(KeyError), Checkpoints(folder) as again:
      again.save_async(6, noise)
      raise KeyError  # which is not hidden by what else goes wrong
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(6, noise)
    assert checkpoints.latest_step() == 6


def test_a_process_that_has_died_is_not_laid_on_the_disk(tmp_path, monkeypatch):
  """Which of them, the caller waits to be told."""

  def fail(*_, **__):
    raise ValueError('UNKNOWN: Gloo AllGather failed: Connection reset by peer')

  with Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save_async', fail)
    with pytest.raises(ValueError, match='Gloo') as raised:
      checkpoints.save(1, {'w': jnp.ones(2)})
    assert not isinstance(raised.value, UnclipError)
    assert checkpoints.latest_step() is None


def test_full_disk_is_named_and_earlier_checkpoints_stay(saved):
  process = start_function(fill_the_disk, saved, env=os.environ)
  _, said = process.communicate()
  assert process.returncode == 0, said
  assert said == ''  # no pages of what Orbax thinks of it
  assert {path.name for path in Path(saved).iterdir()} == {'6'}
