"""Low-rank adapters (Hu et al. 2021, LoRA): a few matrices beside the frozen ones of attention.

A kernel W of attention becomes W + (alpha / rank) A B. The adapters are a tree of their own, which
is trained and merged apart; networks know nothing of them. Their files: `weights.lora`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.types import Array, Params, UnclipError

# Kernels of attention by the name of their layer, and how many of their axes are inputs.
_INPUT_AXES = {'qkv': 1, 'context_kv': 1, 'attention_out': 2, 'out_proj': 2}
_OF_ATTENTION_ONLY = 3  # axes: a plain Dense of the same name has two


def init_lora(params: Params, rank: int, key: Array) -> Params:
  """Adapters of all attention kernels, without an effect at first.

  Args:
    params: of a network: nested dicts of arrays, or of their `jax.ShapeDtypeStruct`s.
    rank: columns of A.
    key: of the draw of A; B is zero.

  Returns:
    {path of a layer, joined by dots: {'a': [inputs, rank], 'b': [rank, outputs]}}, float32.

  Raises:
    UnclipError: the rank is below 1, or the network has no attention.
  """
  if rank < 1:
    raise UnclipError(f'a rank of {rank}: take 1 or more')
  kernels = _kernels(params)
  if not kernels:
    raise UnclipError('the network has no attention that an adapter could change')
  adapters = {}
  for i, (name, (leaf, num_inputs)) in enumerate(kernels.items()):
    inputs, outputs = (int(np.prod(part)) for part in _parts(leaf.shape, num_inputs))
    a = jax.random.normal(jax.random.fold_in(key, i), (inputs, rank), jnp.float32)
    adapters[name] = {'a': a / inputs**0.5, 'b': jnp.zeros((rank, outputs))}
  return adapters


def merge_lora(params: Params, adapters: Params, scale: float | Array = 1.0) -> Params:
  """The parameters with adapters added; a function of both, to be differentiated in either.

  Args:
    params: of the network.
    adapters: of `init_lora`, of this network.
    scale: alpha / rank; 0 is the network without them.

  Raises:
    UnclipError: an adapter is of a layer, or of a size, that the network has not.
  """
  kernels = _kernels(params)
  if unknown := sorted(adapters.keys() - kernels.keys()):
    raise UnclipError(f'the network has no layer {unknown[0]} that the adapter is for')

  def merge(path: Any, leaf: Array) -> Array:
    name = _name(path[:-1])
    if path[-1].key != 'kernel' or name not in adapters:
      return leaf
    a, b = adapters[name]['a'], adapters[name]['b']
    sizes = tuple(int(np.prod(part)) for part in _parts(leaf.shape, kernels[name][1]))
    if (a.shape[0], b.shape[1]) != sizes or a.shape[1] != b.shape[0]:
      raise UnclipError(
        f'the adapter of {name} is {list(a.shape)} and {list(b.shape)}: the layer has '
        f'{sizes[0]} inputs and {sizes[1]} outputs'
      )
    change = (a.astype(jnp.float32) @ b.astype(jnp.float32)).reshape(leaf.shape)
    return (leaf.astype(jnp.float32) + scale * change).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(merge, params)


def _kernels(params: Params) -> dict[str, tuple[Any, int]]:
  """The attention kernels and how many of their axes are inputs, by the names of their layers."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    layer = path[-2].key if len(path) > 1 else ''
    if path[-1].key == 'kernel' and layer in _INPUT_AXES and len(leaf.shape) >= _OF_ATTENTION_ONLY:
      found[_name(path[:-1])] = leaf, _INPUT_AXES[layer]
  return found


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _parts(shape: tuple[int, ...], num_inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  return shape[:num_inputs], shape[num_inputs:]
