"""Updates of a training state that is split over devices, as they should run there.

From the placement of its arguments alone the compiler would rather move activations than weights,
and exchanges them feature by feature. Here each layer is given its weights whole, in the type that
it computes in, where it uses them, and gives back its part of their gradient, as ZeRO-3 does
(Rajbhandari et al. 2020, section 5.3): nothing else is sent. The networks know nothing of it.

A Transformer whose blocks run again for their gradients becomes a loop over them: its program is
that of one block, which is compiled once, and no more than one block's weights are whole at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax import sharding
from unclip_jax.nn.convolution import Conv3x3
from unclip_jax.nn.transformer import KeyValues, Transformer
from unclip_jax.sharding import Mesh
from unclip_jax.train.state import TrainState, TrainStep
from unclip_jax.types import Array

_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed, Conv3x3)


def placed(train_step: TrainStep, mesh: Mesh, fsdp: bool) -> TrainStep:
  """An update of a state that stays where `sharding.state_shardings` says.

  Args:
    train_step: of `make_train_step`.
    mesh: of the devices.
    fsdp: whether the state is split over its `data` axis as well.
  """

  def update(state: TrainState, batch: Any, key: Array) -> Any:
    if fsdp:
      with nn.intercept_methods(functools.partial(_gathered, mesh)):
        state, metrics = train_step(state, batch, key)
    else:
      state, metrics = train_step(state, batch, key)
    return sharding.constrain_state(state, mesh, fsdp), metrics

  return update


def _gathered(mesh: Mesh, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
  """A method of a network; layers are given their weights whole."""
  module = context.module
  if context.method_name != '__call__' or module.scope is None or module.is_initializing():
    return call(*args, **kwargs)
  if isinstance(module, Transformer) and module.remat:
    return _in_a_loop(module, *args, **kwargs)
  if sharding.runs_by_itself():  # with weights that are whole already
    return call(*args, **kwargs)
  if isinstance(module, _LAYERS) and module.scope.path:  # else it is the one that is applied below
    params = {
      name: _whole(mesh, '/'.join((*module.path, name)), param, module.dtype)
      for name, param in module.variables['params'].items()
    }
    return module.clone(parent=None, name=None).apply({'params': params}, *args, **kwargs)
  return call(*args, **kwargs)


def _in_a_loop(
  module: Transformer,
  x: Array,
  mask: Array | None = None,
  caches: tuple[KeyValues, ...] | None = None,
  index: Array | None = None,
  num_last: int | None = None,
) -> tuple[Array, tuple[KeyValues, ...]]:
  """As `Transformer`, of blocks that run again for their gradients."""
  block, blocks, depth = module.block(parent=None), module.variables['params'], module.depth
  given = [(blocks[f'block_{i}'], None if caches is None else caches[i]) for i in range(depth)]

  def run(x: Array, given: Any, num_last: int | None = None) -> tuple[Array, KeyValues]:
    params, cache = given
    return block.apply({'params': params}, x, mask, cache, index, num_last)

  in_loop = depth if num_last is None else depth - 1
  keys_values = []
  if in_loop:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given[:in_loop])
    x, (k, v) = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), x, stacked)
    keys_values += [(k[i], v[i]) for i in range(in_loop)]
  if in_loop < depth:
    x, key_value = jax.checkpoint(run, static_argnums=2)(x, given[-1], num_last)
    keys_values.append(key_value)
  return x, tuple(keys_values)


def _whole(mesh: Mesh, path: str, param: Array, dtype: Any) -> Array:
  """A parameter as a layer computes with it; its gradient goes to where the parameter lies."""
  split = sharding.param_sharding(path, param.shape, mesh, True)
  whole = sharding.param_sharding(path, param.shape, mesh, False)
  if split == whole:
    return param

  @jax.custom_vjp
  def gather(param: Array) -> Array:
    return jax.lax.with_sharding_constraint(param.astype(dtype), whole)

  def backward(_: None, gradient: Array) -> tuple[Array]:
    gradient = jax.lax.with_sharding_constraint(gradient, split)
    return (gradient.astype(param.dtype),)

  gather.defvjp(lambda param: (gather(param), None), backward)
  return gather(param)
