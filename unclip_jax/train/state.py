"""The state of a training run and the functions that advance it.

A state holds arrays only and no key: what is random at a step follows from (key, step), so that a
killed run continues exactly. Optimiser settings are those of Table 3 of the paper (Adam with
decoupled weight decay); the EMA of the parameters is what is sampled from and shipped.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unclip_jax.types import Array, Params, UnclipError

Batch = Any  # A pytree of arrays, the leading axis of each is the batch.
Metrics = dict[str, Array]
LossFn = Callable[[Params, Batch, Array], tuple[Array, Metrics]]
GradFn = Callable[[Params, Batch, Array], tuple[tuple[Array, Metrics], Params]]
TrainStep = Callable[['TrainState', Batch, Array], tuple['TrainState', Metrics]]

RECENT = 64  # losses that a state has with it


class TrainState(NamedTuple):
  """Everything that a run needs to continue.

  Attributes:
    step: int32 [], the number of updates made.
    params: the trained parameters, float32.
    ema_params: their exponential moving average, float32.
    opt_state: the optimiser's state.
    recent_losses: float32 [RECENT], those of the last good steps, the latest first, for
      `train/guard.py`; NaN where there was none. Other steps leave them as they are.
  """

  step: Array
  params: Params
  ema_params: Params
  opt_state: optax.OptState
  recent_losses: Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam with decoupled weight decay. The defaults are the decoder's in Table 3.

  Attributes:
    learning_rate: the peak, reached at the end of the warm-up.
    b1, b2, eps: Adam's.
    weight_decay: decoupled; not applied to biases and norms.
    warmup_steps: steps over which the learning rate rises linearly from 0.
    decay: 'constant', or 'cosine' down to `final_scale` of the peak at the end of the run.
    decay_steps: the updates at the end of the run that the cosine takes; None, all after the
      warm-up. A run of constant rate can so be decayed at any of its checkpoints, and go on from
      there as if it had not been.
    final_scale: in [0, 1], the part of the peak left at the end of the cosine.
    max_grad_norm: gradients of a larger global norm are scaled down to it; None clips nothing.
  """

  learning_rate: float = 1.2e-4
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  warmup_steps: int = 0
  decay: str = 'constant'
  decay_steps: int | None = None
  final_scale: float = 0.0
  max_grad_norm: float | None = 1.0


def make_learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made.

  Raises:
    UnclipError: an unknown decay, or a warm-up or a decay that is longer than the run.
  """
  if config.decay not in ('constant', 'cosine'):
    raise UnclipError(f"unknown decay {config.decay!r}: choose 'constant' or 'cosine'")
  if not 0 <= config.warmup_steps <= total_steps:
    raise UnclipError(
      f'a warm-up of {config.warmup_steps} steps does not fit a run of {total_steps}: '
      'set warmup_steps between 0 and the number of steps'
    )
  peak, steps = config.learning_rate, total_steps - config.warmup_steps
  decay_steps = steps if config.decay_steps is None else config.decay_steps
  if not 0 <= decay_steps <= steps:
    raise UnclipError(
      f'a decay of {decay_steps} steps does not fit the {steps} after the warm-up: '
      'set decay_steps lower, or train more steps'
    )
  after = optax.constant_schedule(peak)
  if config.decay == 'cosine':
    decay = optax.cosine_decay_schedule(peak, max(1, decay_steps), alpha=config.final_scale)
    after = optax.join_schedules([after, decay], [steps - decay_steps])
  if config.warmup_steps == 0:
    return after
  # The first update is made at 1 / warmup_steps of the peak: at 0 it would be a step wasted.
  warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1))
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
  config: OptimizerConfig, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimiser of the paper: clipping of the global norm, then AdamW on a schedule."""
  adamw = optax.adamw(
    make_learning_rate(config, total_steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=_is_decayed,
  )
  if config.max_grad_norm is None:
    return optax.chain(adamw)
  return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _is_decayed(params: Params) -> Params:
  """Which arrays decay: no vectors (norms), and no biases (those of attention have three axes)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, p: p.ndim > 1 and getattr(path[-1], 'key', None) != 'bias', params
  )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update. Jit it with `out_shardings` to place it.

  The average starts as a copy: a state whose parts share buffers cannot be donated.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    recent_losses=jnp.full(RECENT, jnp.nan, jnp.float32),
  )


def ema_rate(step: Array, decay: float) -> Array:
  """Returns what the average keeps at an update: min(decay, (1 + step) / (10 + step)).

  The warm-up lets the average forget the initial parameters within tens of steps, where a
  constant 0.9999 would carry them for tens of thousands.
  """
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def accumulate_gradients(grad_fn: GradFn, num_parts: int, unroll: bool = False) -> GradFn:
  """Returns the gradients of a batch as the mean of those of its parts, one after the other.

  They are those of the whole batch where the loss is a mean over examples, and the activations of
  one part are in memory at a time. A contrastive loss is no such mean: it compares all examples of
  a batch (`train/gradient_cache.py`). Part i has the rows i, i + n, i + 2 n, ... of n parts: where
  a batch is split over devices, as many of each device's own, so that none of them moves.

  Args:
    grad_fn: (params, batch, key) -> ((loss, metrics of scalars), gradients).
    num_parts: n, divides the batch; of a batch on d devices, b / d.
    unroll: whether the parts are written out in place of a loop: XLA for CPUs runs the gradients of
      convolutions in loops tens of times slower than outside.

  Returns:
    A `grad_fn`: loss, metrics and gradients are means, summed in float32. Each part has a key of
    its own, the given one folded with i, so that what a loss draws is not what it would draw for
    the whole batch.

  Raises:
    ValueError: `num_parts` is below 1, or does not divide the batch.
  """
  if num_parts < 1:
    raise ValueError(f'a batch in {num_parts} parts: take 1 or more')

  def split(a: Array) -> Array:
    if a.shape[0] % num_parts:
      raise ValueError(f'a batch of {a.shape[0]} does not divide into {num_parts} parts')
    return jnp.moveaxis(a.reshape(-1, num_parts, *a.shape[1:]), 1, 0)

  def averaged(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Metrics], Params]:
    parts = jax.tree.map(split, batch)

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
      i, rows = part
      one = grad_fn(params, rows, jax.random.fold_in(key, i))
      return jax.tree.map(lambda t, x: t + x / num_parts, total, one), None

    first = jax.tree.map(lambda a: a[0], parts)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(grad_fn, params, first, key)
    )
    steps = num_parts if unroll else 1
    return jax.lax.scan(add, zeros, (jnp.arange(num_parts), parts), unroll=steps)[0]

  return averaged


def make_train_step(
  loss_fn: LossFn | None,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  accumulate: int = 1,
  grad_fn: GradFn | None = None,
  unroll: bool = False,
) -> TrainStep:
  """Returns the function that makes one update.

  Args:
    loss_fn: (params, batch, key) -> (loss [], metrics of scalars). A metric called loss or
      grad_norm would be overwritten, and is refused.
    optimizer: its state is `TrainState.opt_state`.
    ema_decay: in [0, 1), reached after a warm-up (`ema_rate`).
    accumulate: parts of a batch whose gradients are averaged, see `accumulate_gradients`: for
      losses that are means over examples, which the contrastive loss is not.
    grad_fn: (params, batch, key) -> ((loss, metrics), gradients), in place of the gradient of
      `loss_fn`, which may then be None: gradients that are cached, or taken at other parameters.
    unroll: of `accumulate_gradients`.

  Returns:
    (state, batch, key) -> (state, metrics). The key is that of the run, the same at each step: it
    is folded with `state.step`. The metrics are float32 scalars: those of `loss_fn`, loss, and
    grad_norm (before clipping); one of the two is not finite where the update went wrong:
    `check_finite` raises on it, `train/guard.py` leaves such updates out.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True) if grad_fn is None else grad_fn
  if accumulate != 1:
    grad_fn = accumulate_gradients(grad_fn, accumulate, unroll)

  def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
    (loss, metrics), grads = grad_fn(state.params, batch, jax.random.fold_in(key, state.step))
    clash = {'loss', 'grad_norm'} & metrics.keys()
    if clash:
      raise ValueError(f'loss_fn returns metrics of reserved names: {sorted(clash)}')
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = ema_rate(state.step, ema_decay)
    ema_params = jax.tree.map(lambda e, p: e + (1.0 - keep) * (p - e), state.ema_params, params)
    metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads), **metrics}
    metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)
    state = state._replace(
      step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    )
    return state, metrics

  return train_step


def epoch_indices(key: Array, step: Array, num_examples: int, batch_size: int) -> Array:
  """Returns which examples make the batch of a step: each once an epoch, in a new order each time.

  The examples that do not fill a last batch sit out the epoch; a new order lets others do so in
  the next.

  Args:
    key: the run's key for data.
    step: int32 [], the number of updates made before.
    num_examples: size of the pool.
    batch_size: at most `num_examples`.

  Returns:
    int32 [batch_size], distinct, in [0, num_examples).

  Raises:
    ValueError: the batch does not fit the pool.
  """
  if not 1 <= batch_size <= num_examples:
    raise ValueError(f'a batch of {batch_size} cannot be drawn from {num_examples} examples')
  steps_per_epoch = num_examples // batch_size
  epoch, place = step // steps_per_epoch, step % steps_per_epoch
  order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
  return jax.lax.dynamic_slice(order, (place * batch_size,), (batch_size,)).astype(jnp.int32)


def uniform_indices(key: Array, step: Array, num_examples: int, batch_size: int) -> Array:
  """Returns a batch of independent draws, int32 [batch_size]: for pools too large to sort."""
  return jax.random.randint(
    jax.random.fold_in(key, step), (batch_size,), 0, num_examples, jnp.int32
  )


def gather(pool: Batch, indices: Array, key: Array) -> Batch:
  """Takes the rows `indices` of each array of the pool; the default of `make_multi_step`."""
  del key  # Only a `make_batch` that composes or augments draws something.
  return jax.tree.map(lambda a: jnp.take(a, indices, axis=0), pool)


class Draw(NamedTuple):
  """What one step of `make_multi_step` is given.

  Attributes:
    indices: int32 [batch_size], of the examples in the pool.
    batch: what `make_batch` makes of them.
    key: of the training step, which folds it with `state.step`.
  """

  indices: Array
  batch: Batch
  key: Array


def draw_batch(
  pool: Batch,
  key: Array,
  step: Array,
  batch_size: int,
  make_batch: Callable[[Batch, Array, Array], Batch] = gather,
  draw_indices: Callable[[Array, Array, int, int], Array] = epoch_indices,
) -> Draw:
  """Returns the batch of one step.

  Args:
    pool: the examples, as for what `make_multi_step` returns.
    key: of the run.
    step: int32 [], the number of updates made before.
    batch_size: as for `make_multi_step`, like the rest.
    make_batch: see there.
    draw_indices: see there.
  """
  key_order, key_batch, key_step = jax.random.split(key, 3)
  num_examples = jax.tree.leaves(pool)[0].shape[0]
  indices = draw_indices(key_order, step, num_examples, batch_size)
  return Draw(indices, make_batch(pool, indices, jax.random.fold_in(key_batch, step)), key_step)


def make_multi_step(
  train_step: TrainStep,
  num_steps: int,
  batch_size: int,
  make_batch: Callable[[Batch, Array, Array], Batch] = gather,
  draw_indices: Callable[[Array, Array, int, int], Array] = epoch_indices,
) -> TrainStep:
  """Returns a function that makes many updates in one program, on data that is on the device.

  Args:
    train_step: of `make_train_step`.
    num_steps: updates a call.
    batch_size: examples an update.
    make_batch: (pool, indices [batch_size], key) -> batch. The key differs from step to step, for
      data composed or augmented on the device; a sharded run constrains the batch here.
    draw_indices: `epoch_indices` or `uniform_indices`.

  Returns:
    (state, pool, key) -> (state, metrics), each metric [num_steps]. `pool` is a pytree of arrays
    with the examples along the first axis. Batches follow from (key, state.step), so that calls of
    other lengths, or a run continued after a kill, see the same ones. Jit it with
    `donate_argnums=0`.
  """

  def multi_step(state: TrainState, pool: Batch, key: Array) -> tuple[TrainState, Metrics]:
    def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
      drawn = draw_batch(pool, key, state.step, batch_size, make_batch, draw_indices)
      return train_step(state, drawn.batch, drawn.key)

    if num_steps == 1:
      # XLA for CPUs keeps a loop of one pass, and runs the gradients of convolutions in it tens of
      # times slower than outside.
      state, metrics = body(state, None)
      return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(body, state, None, length=num_steps)

  return multi_step


def check_finite(metrics: Mapping[str, Array | np.ndarray], first_step: int) -> None:
  """Raises where the loss or the gradient's norm is not finite.

  Call it before a checkpoint is written, so that what is on disk stays good.

  Args:
    metrics: of one step (scalars) or of several ([num_steps]).
    first_step: the number of updates made before them.

  Raises:
    UnclipError: names the first step that failed.
  """
  for name in ('loss', 'grad_norm'):
    values = np.atleast_1d(np.asarray(metrics[name]))
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise UnclipError(
        f'{name} is {values[bad[0]]} at step {first_step + int(bad[0])}: continue from the last '
        'checkpoint with a lower learning rate or more warm-up steps'
      )
