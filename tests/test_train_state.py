"""The state of a run: its updates against hand-written ones, and exact continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unclip_jax.train.state import (
  OptimizerConfig,
  accumulate_gradients,
  check_finite,
  ema_rate,
  epoch_indices,
  init_state,
  make_learning_rate,
  make_multi_step,
  make_optimizer,
  make_train_step,
  uniform_indices,
)
from unclip_jax.types import UnclipError

POOL = {'x': np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)}
CONFIG = OptimizerConfig(learning_rate=0.02, weight_decay=0.1, warmup_steps=3, decay='cosine')


def make_params() -> dict:
  draw = np.random.default_rng(1)
  return {
    'w': jnp.asarray(draw.normal(size=(4, 4)), jnp.float32),
    'b': jnp.asarray(draw.normal(size=4), jnp.float32),
  }


def loss_fn(params, batch, key):
  """Denoising by a linear map: random, so that keys matter."""
  x = batch['x']
  noise = jax.random.normal(key, x.shape)
  error = (x + noise) @ params['w'] + params['b'][None] - x
  return jnp.mean(error**2), {'error_max': jnp.max(jnp.abs(error))}


def make_step(total_steps=20, config=CONFIG):
  optimizer = make_optimizer(config, total_steps)
  return make_train_step(loss_fn, optimizer, 0.9), init_state(make_params(), optimizer)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_update_is_adamw_written_out():
  config = OptimizerConfig(learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.5, eps=1e-3)
  step, state = make_step(config=config)
  key = jax.random.key(0)
  batch = {'x': jnp.asarray(POOL['x'][:4])}
  after, metrics = jax.jit(step)(state, batch, key)
  grads = jax.grad(lambda p: loss_fn(p, batch, jax.random.fold_in(key, 0))[0])(state.params)
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
  assert norm > 0.5
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  for name, decayed in (('w', 1.0), ('b', 0.0)):
    g = np.asarray(grads[name], np.float64) * 0.5 / norm
    m, v = (1 - 0.9) * g / (1 - 0.9), (1 - 0.999) * g**2 / (1 - 0.999)
    p = np.asarray(state.params[name], np.float64)
    wanted = p - 0.02 * (m / (np.sqrt(v) + 1e-3) + 0.1 * decayed * p)
    np.testing.assert_allclose(after.params[name], wanted, rtol=1e-5)
    average = 0.1 * p + 0.9 * wanted  # The rate at step 0 is (1 + 0) / (10 + 0).
    np.testing.assert_allclose(after.ema_params[name], average, rtol=1e-5)
  assert int(after.step) == 1
  assert set(metrics) == {'loss', 'grad_norm', 'error_max'}


@pytest.mark.parametrize('unroll', [False, True])
def test_parts_of_a_batch_give_the_mean_of_their_gradients(unroll):
  """Rows i, i + 3, i + 6, ... with a key of their own, which the loss draws noise from."""
  x, key = POOL['x'][:9], jax.random.key(3)
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  accumulated = jax.jit(accumulate_gradients(grad_fn, 3, unroll))
  (loss, metrics), grads = accumulated(make_params(), {'x': x}, key)
  each = [
    grad_fn(make_params(), {'x': jnp.asarray(x[i::3])}, jax.random.fold_in(key, i))
    for i in range(3)
  ]
  wanted = jax.tree.map(lambda *parts: np.mean(parts, axis=0, dtype=np.float64), *each)
  np.testing.assert_allclose(loss, wanted[0][0], rtol=1e-6)
  np.testing.assert_allclose(metrics['error_max'], wanted[0][1]['error_max'], rtol=1e-6)
  for name, grad in grads.items():
    np.testing.assert_allclose(grad, wanted[1][name], rtol=1e-5, atol=1e-6)


def test_a_step_in_parts_is_that_of_the_whole_batch_where_the_loss_is_a_mean():
  def mean_loss(params, batch, key):
    del key
    return jnp.mean((jnp.tanh(batch['x'] @ params['w']) + params['b'][None]) ** 2), {}

  optimizer = make_optimizer(CONFIG, 20)
  state, batch = init_state(make_params(), optimizer), {'x': jnp.asarray(POOL['x'][:10])}
  steps = [make_train_step(mean_loss, optimizer, 0.9, n) for n in (1, 5)]
  (whole, metrics), (parts, same) = (jax.jit(s)(state, batch, jax.random.key(0)) for s in steps)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts, whole)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), same, metrics)


def test_gradients_may_come_from_elsewhere_and_are_accumulated_too():
  """A step against the sum of the rows: what is made of them is the optimiser's."""

  def grad_fn(params, batch, key):
    total = batch['x'].sum()
    return (total, {'rows': jnp.float32(len(batch['x']))}), {'w': jnp.full((2, 2), total)}

  x = jnp.arange(6.0)[:, None]
  state = init_state({'w': jnp.zeros((2, 2))}, optax.sgd(1.0))
  step = make_train_step(None, optax.sgd(1.0), 0.9, grad_fn=grad_fn)
  after, metrics = step(state, {'x': x}, jax.random.key(0))
  assert float(metrics['loss']) == 15 and float(metrics['rows']) == 6
  np.testing.assert_array_equal(after.params['w'], np.full((2, 2), -15.0))
  step = make_train_step(None, optax.sgd(1.0), 0.9, accumulate=3, grad_fn=grad_fn)
  after, metrics = step(state, {'x': x}, jax.random.key(0))
  assert float(metrics['loss']) == 5 and float(metrics['rows']) == 2
  np.testing.assert_allclose(after.params['w'], np.full((2, 2), -5.0), rtol=1e-6)


def test_parts_that_do_not_divide_a_batch_are_an_error():
  step = make_train_step(loss_fn, optax.sgd(0.1), 0.9, accumulate=4)
  state = init_state(make_params(), optax.sgd(0.1))
  with pytest.raises(ValueError, match='a batch of 11 does not divide into 4 parts'):
    step(state, POOL, jax.random.key(0))
  with pytest.raises(ValueError, match='a batch in 0 parts'):
    make_train_step(loss_fn, optax.sgd(0.1), 0.9, accumulate=0)


def test_overfits_one_batch():
  def plain_loss(params, batch, key):
    del key
    return jnp.mean((batch['x'] @ params['w'] + params['b'][None] - batch['y']) ** 2), {}

  x = POOL['x']
  pool = {'x': x, 'y': x @ np.full((4, 4), 0.5, np.float32)}
  optimizer = make_optimizer(OptimizerConfig(learning_rate=0.05), 300)
  step = make_train_step(plain_loss, optimizer, 0.9)
  many = jax.jit(make_multi_step(step, 300, 11), donate_argnums=0)
  state, metrics = many(init_state(make_params(), optimizer), pool, jax.random.key(0))
  assert metrics['loss'][0] > 1.0
  assert metrics['loss'][-1] < 1e-4
  np.testing.assert_allclose(state.ema_params['w'], np.full((4, 4), 0.5), atol=0.02)


@pytest.mark.parametrize('draw_indices', [epoch_indices, uniform_indices])
def test_many_steps_are_the_single_ones(draw_indices):
  step, state = make_step()
  key = jax.random.key(5)
  whole = jax.jit(make_multi_step(step, 8, 3, draw_indices=draw_indices))
  parts = jax.jit(make_multi_step(step, 2, 3, draw_indices=draw_indices))
  wanted, metrics = whole(state, POOL, key)
  losses = []
  for _ in range(4):
    state, part = parts(state, POOL, key)
    losses.extend(part['loss'])
  np.testing.assert_array_equal(metrics['loss'], losses)
  assert_equal(state, wanted)
  assert len(set(map(float, losses))) == 8


def test_batches_can_be_composed_on_the_device():
  step, state = make_step()

  def shifted(pool, indices, key):
    return {'x': pool['x'][indices] + jax.random.normal(key, (3, 4))}

  many = jax.jit(make_multi_step(step, 6, 3, make_batch=shifted))
  plain = jax.jit(make_multi_step(step, 6, 3))
  key = jax.random.key(5)
  assert np.all(many(state, POOL, key)[1]['loss'] != plain(state, POOL, key)[1]['loss'])


def test_an_epoch_shows_each_example_once_and_the_next_in_another_order():
  draw = jax.jit(lambda step: epoch_indices(jax.random.key(2), step, 12, 4))
  epochs = [np.concatenate([draw(3 * e + i) for i in range(3)]) for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(12))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_examples_left_over_take_turns():
  draw = jax.jit(lambda step: epoch_indices(jax.random.key(2), step, 11, 4))
  seen = {int(i) for step in range(20) for i in draw(step)}
  assert seen == set(range(11))


def test_a_batch_larger_than_the_pool_is_an_error():
  with pytest.raises(ValueError, match='12 cannot be drawn from 11'):
    epoch_indices(jax.random.key(0), jnp.int32(0), 11, 12)


def test_average_warms_up():
  steps = np.arange(0, 100_000, 37)
  wanted = np.minimum(0.999, (1 + steps) / (10 + steps))
  np.testing.assert_allclose(ema_rate(jnp.asarray(steps), 0.999), wanted, rtol=1e-6)


def test_learning_rate_rises_then_falls():
  rate = make_learning_rate(
    OptimizerConfig(learning_rate=0.4, warmup_steps=4, decay='cosine', final_scale=0.25), 24
  )
  steps = np.arange(25)
  cosine = 0.4 * (0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * (steps - 4) / 20)))
  wanted = np.where(steps < 4, 0.4 * (steps + 1) / 4, cosine)
  np.testing.assert_allclose([rate(s) for s in steps], wanted, rtol=1e-5)


def test_a_decay_may_take_the_last_updates_only():
  config = OptimizerConfig(
    learning_rate=0.4, warmup_steps=4, decay='cosine', decay_steps=10, final_scale=0.25
  )
  rate, steps = make_learning_rate(config, 24), np.arange(25)
  cosine = 0.4 * (0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * (steps - 14) / 10)))
  wanted = np.where(steps < 4, 0.4 * (steps + 1) / 4, np.where(steps < 14, 0.4, cosine))
  np.testing.assert_allclose([float(rate(i)) for i in steps], wanted, rtol=1e-5)
  with pytest.raises(UnclipError, match='a decay of 10 steps does not fit the 9 after'):
    make_learning_rate(config, 13)


def test_learning_rate_without_warmup_is_constant():
  rate = make_learning_rate(OptimizerConfig(learning_rate=0.4), 24)
  assert [float(rate(s)) for s in (0, 23)] == [pytest.approx(0.4)] * 2


def test_wrong_schedules_are_named():
  with pytest.raises(UnclipError, match="unknown decay 'linear'"):
    make_optimizer(OptimizerConfig(decay='linear'), 10)
  with pytest.raises(UnclipError, match='warm-up of 11 steps does not fit a run of 10'):
    make_optimizer(OptimizerConfig(warmup_steps=11), 10)


def test_state_can_be_donated():
  step, state = make_step()
  state, _ = jax.jit(step, donate_argnums=0)(state, {'x': POOL['x']}, jax.random.key(0))
  assert int(state.step) == 1


def test_reserved_metrics_are_refused():
  step = make_train_step(lambda p, b, k: (p['w'].sum(), {'loss': 1.0}), optax.sgd(0.1), 0.9)
  with pytest.raises(ValueError, match='reserved'):
    step(init_state({'w': jnp.ones((2, 2))}, optax.sgd(0.1)), {}, jax.random.key(0))


def test_the_first_bad_step_is_named():
  good = {'loss': np.ones(3), 'grad_norm': np.ones(3)}
  check_finite(good, 40)
  with pytest.raises(UnclipError, match='loss is nan at step 42'):
    check_finite(good | {'loss': np.array([1, 1, np.nan])}, 40)
  with pytest.raises(UnclipError, match='grad_norm is inf at step 40'):
    check_finite({'loss': jnp.float32(1), 'grad_norm': jnp.float32(np.inf)}, 40)
