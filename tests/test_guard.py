"""Bad losses: what counts as one, and that nothing of such a step gets into the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.train.guard import FEWEST, guarded, spike_threshold, why_bad
from unclip_jax.train.state import (
  RECENT,
  draw_batch,
  init_state,
  make_multi_step,
  make_train_step,
)

KEY, SIZE, BATCH = jax.random.key(3), 24, 2
OPTIMIZER = optax.adamw(1e-3)
WILD, HOLE = 5, 6  # examples: one that is far off, one with a NaN


def loss_fn(params, batch, key):
  noise = 0.1 * jax.random.normal(key, batch['x'].shape)
  return jnp.mean(((batch['x'] + noise) @ params['w'] - 1) ** 2), {}


def pool(**rows):
  x = np.random.default_rng(0).normal(size=(SIZE, 4)).astype(np.float32)
  for row, value in rows.items():
    x[{'wild': WILD, 'hole': HOLE}[row], 0] = value
  return {'x': x}


@functools.cache
def program(num_steps, stops, factor):
  step = make_train_step(loss_fn, OPTIMIZER, 0.9)
  step = step if stops is None else guarded(step, stops, factor)
  return jax.jit(make_multi_step(step, num_steps, BATCH))


def run(data, num_steps, stops, factor=None, at_once=1):
  """The state after so many steps, and their metrics; `stops` None has no guard."""
  state, rows = init_state({'w': jnp.ones((4, 1))}, OPTIMIZER), []
  for _ in range(0, num_steps, at_once):
    state, metrics = program(at_once, stops, factor)(state, data, KEY)
    rows.append(metrics)
  return state, jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def steps_with(example, num_steps):
  draw = jax.jit(lambda step: draw_batch({'x': jnp.zeros(SIZE)}, KEY, step, BATCH).indices)
  return [step for step in range(num_steps) if example in draw(step)]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_without_bad_losses_it_is_the_plain_step():
  state, metrics = run(pool(), 20, stops=True, factor=100.0)
  wanted, plain_metrics = run(pool(), 20, stops=None)
  assert not metrics['bad'].any()
  np.testing.assert_allclose(metrics['loss'], plain_metrics['loss'], rtol=1e-6)
  np.testing.assert_allclose(state.ema_params['w'], wanted.ema_params['w'], rtol=1e-6)
  np.testing.assert_array_equal(state.recent_losses[:20], metrics['loss'][::-1])
  assert np.isnan(state.recent_losses[20:]).all()


def test_a_skipped_step_leaves_all_but_its_number():
  data, bad = pool(hole=np.nan), steps_with(HOLE, 24)
  state, metrics = run(data, 24, stops=False)
  assert list(np.flatnonzero(metrics['bad'])) == bad and len(bad) == 2
  assert np.isnan(metrics['loss'][bad[0]]) and int(state.step) == 24
  for stop in bad:
    before, _ = run(data, stop, stops=False)
    after, _ = run(data, stop + 1, stops=False)
    assert int(after.step) == int(before.step) + 1
    assert_equal(after._replace(step=before.step), before)
  assert np.isfinite(state.params['w']).all() and np.isfinite(state.recent_losses[:22]).all()
  assert np.isnan(state.recent_losses[22:]).all()


def test_a_run_that_stops_gives_back_the_state_before_and_the_step_again():
  data, (first, *_) = pool(hole=np.inf), steps_with(HOLE, 24)
  state, metrics = run(data, 24, stops=True, at_once=24)
  before, _ = run(data, first, stops=True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, before)
  assert_equal(run(data, first + 3, stops=True)[0], before)
  assert int(state.step) == first
  np.testing.assert_array_equal(metrics['bad'], np.arange(24) >= first)
  again = np.asarray(metrics['grad_norm'][first:])
  np.testing.assert_array_equal(again, np.full_like(again, again[0]))


def test_a_spike_is_a_loss_far_above_the_median_of_the_last_good_ones():
  num_steps = 4 * SIZE // BATCH
  data, wild = pool(wild=300.0), steps_with(WILD, num_steps)
  state, metrics = run(data, num_steps, stops=False, factor=100.0)
  loss, taken = np.asarray(metrics['loss']), []
  for step in range(num_steps):
    enough = len(taken) >= FEWEST
    limit = 100 * np.median(taken[-RECENT:]) if enough else np.inf
    np.testing.assert_allclose(metrics['loss_limit'][step], limit, rtol=1e-5)
    assert metrics['bad'][step] == (loss[step] > limit)
    if loss[step] <= limit:
      taken.append(loss[step])
  found = list(np.flatnonzero(metrics['bad']))
  assert found == [step for step in wild if step >= FEWEST] and len(found) >= 2
  assert loss[found].min() > 1000
  np.testing.assert_array_equal(state.recent_losses[: len(taken)], taken[::-1])


def test_the_median_is_of_the_last_ones_only():
  recent = jnp.arange(RECENT, dtype=jnp.float32)
  assert float(spike_threshold(recent, 2.0)) == RECENT - 1
  few = jnp.where(jnp.arange(RECENT) < FEWEST - 1, recent, jnp.nan)
  assert float(spike_threshold(few, 2.0)) == np.inf
  enough = jnp.where(jnp.arange(RECENT) < FEWEST, recent, jnp.nan)
  assert float(spike_threshold(enough, 2.0)) == FEWEST - 1


def test_what_is_wrong_is_told_in_words():
  metrics = {'loss': np.float32(2.5), 'grad_norm': np.float32(1), 'loss_limit': np.float32(2)}
  assert why_bad(metrics) == 'loss is 2.5, a spike above the limit of 2'
  assert why_bad(metrics | {'grad_norm': np.inf}) == 'grad_norm is inf'
  assert why_bad({'loss': np.nan, 'grad_norm': np.nan}) == 'loss is nan'


def test_reserved_metrics_are_refused():
  step = guarded(
    make_train_step(lambda p, b, k: (p['w'].sum(), {'bad': 1.0}), OPTIMIZER, 0.9), True
  )
  with pytest.raises(ValueError, match=r"reserved names: \['bad'\]"):
    step(init_state({'w': jnp.ones((2, 2))}, OPTIMIZER), {}, KEY)
