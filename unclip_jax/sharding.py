"""Where arrays live: the mesh, the placement of states and batches, sampling on many devices.

The only importer of `jax.sharding`. A mesh has the axes `data`, over which a batch is split, and
`model`, over which parameters are, of networks that are too large for one device. Axes are Auto:
the compiler carries the placement of the arguments through a program, whose code stays that of one
device.

A Transformer's parameters are split as by Megatron-LM (Shoeybi et al. 2019, section 3): queries,
keys and values by heads and the first layer of an MLP by its columns, what comes after them by
rows, so that devices add up their results once for each of the two.

A training state can also be split over `data`, as by ZeRO-3 (Rajbhandari et al. 2020): each device
keeps its part of the parameters, of their average and of the optimiser's moments, and is given
those of the others where a layer needs them.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unclip_jax.types import Array, UnclipError

DATA_AXIS = 'data'
MODEL_AXIS = 'model'
REST_AXIS = 'rest'  # the minor part of `data`, of a parameter that two axes share it for
# Numbers of an array that is split over `data`: of smaller ones a message costs more than a copy.
FSDP_MIN_SIZE = 2**14

# Ends of the paths of kernels, how many axes they have, and which of these is split first of all.
_AXES = (
  (r'qkv/kernel', 4, 2),  # [width, 3, heads, head_dim]
  (r'context_kv/kernel', 4, 2),
  (r'(attention|self|context)_out/kernel', 3, 0),  # [heads, head_dim, width]
  (r'out_proj/kernel', 3, 0),
  (r'mlp_in/kernel', 2, 1),
  (r'mlp_out/kernel', 2, 0),
  (r'kernel', 4, 3),  # of a convolution: [height, width, in, out]
  (r'embedding', 2, 1),  # so that a device finds its part of each word
)
# They are small, and each device has to have them whole.
_WHOLE = re.compile(
  r'(.*/)?(bias|scale|mean|std|positions|padding|query|null_z_i|class_token|token_types)'
)


def make_mesh(
  num_devices: int | None = None,
  model_devices: int = 1,
  all_processes: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh over the first `num_devices` devices of this process, or over all.

  Args:
    num_devices: of the whole mesh.
    model_devices: how many of them share one copy of the parameters; a batch is split over
      num_devices / model_devices.
    all_processes: whether it is of the devices of all processes, which run one program together.
    devices: in place of those of this process: ones that are only described, say.

  Raises:
    UnclipError: there are fewer devices, or they do not divide into groups of `model_devices`.
  """
  if devices is None:
    devices = jax.devices() if all_processes else jax.local_devices()
  num_devices = len(devices) if num_devices is None else num_devices
  if not 1 <= num_devices <= len(devices):
    few = '1' if len(devices) == 1 else f'1 to {len(devices)}'
    raise UnclipError(
      f'{num_devices} devices were asked for, there are {len(devices)} of kind '
      f'{devices[0].device_kind}: ask for {few}'
    )
  if model_devices < 1 or num_devices % model_devices:
    raise UnclipError(
      f'{num_devices} devices do not divide into groups of {model_devices} that share a copy of '
      f'the parameters: take model_devices that divides {num_devices}'
    )
  return jax.make_mesh(
    (num_devices // model_devices, model_devices),
    (DATA_AXIS, MODEL_AXIS),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[:num_devices],
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the placement that splits the first axis over the devices, or groups of them."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def filled_size(size: int, mesh: Mesh | None) -> int:
  """The size that a batch is filled up to: one that divides over the devices, or groups of them."""
  num_parts = 1 if mesh is None else mesh.shape[DATA_AXIS]
  return -(-size // num_parts) * num_parts


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement that puts a whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def param_spec(
  path: str, shape: tuple[int, ...], model_devices: int, data_devices: int = 1
) -> PartitionSpec:
  """Which axes of a parameter are split, over `model` and over `data`.

  Over `model` that of the rules, else the largest that divides, the last of equal ones. Biases,
  norms, positions and what has no axis that divides are whole on each device. Over `data`, of an
  array of `FSDP_MIN_SIZE` numbers or more, the largest of the others that divides, else a part of
  a part. Where none divides (1664 by 256), one that divides furthest takes a part of `data`, and
  the first that divides by what is left of it, `rest`, that; if none does, there are `rest` copies.

  Args:
    path: its keys, joined by slashes.
    shape: its shape.
    model_devices: how many parts over `model`.
    data_devices: how many parts over `data`.
  """
  return _split(path, shape, model_devices, data_devices)[0]


def _split(
  path: str, shape: tuple[int, ...], model_devices: int, data_devices: int
) -> tuple[PartitionSpec, int]:
  """That of `param_spec`, and how many parts `rest` has."""
  spec: list[Any] = [None] * len(shape)
  rest = 1
  by_size = sorted(range(len(shape)), key=lambda axis: (-shape[axis], -axis))
  if model_devices > 1 and len(shape) > 1 and not _WHOLE.fullmatch(path):
    axes = list(by_size)
    for end, ndim, first in _AXES:
      if ndim == len(shape) and re.search(f'{end}$', path):
        axes.insert(0, first)
        break
    for axis in axes:
      if shape[axis] % model_devices == 0:
        spec[axis] = MODEL_AXIS
        break
  if data_devices > 1 and math.prod(shape) >= FSDP_MIN_SIZE and not _WHOLE.fullmatch(path):
    parts = [
      (math.gcd(shape[axis] // (model_devices if spec[axis] else 1), data_devices), axis)
      for axis in sorted(by_size, key=lambda axis: spec[axis] is not None)
    ]
    most, first = max(parts, key=lambda part: part[0])  # of equal ones that which comes first
    if most > 1:
      rest, names = data_devices // most, {first: DATA_AXIS}
      others = [axis for part, axis in parts if axis != first and part % rest == 0]
      if rest > 1 and others:
        names[others[0]] = REST_AXIS
      for axis, name in names.items():
        spec[axis] = (spec[axis], name) if spec[axis] else name
  while spec and spec[-1] is None:
    spec.pop()
  return PartitionSpec(*spec), rest


def param_sharding(
  path: str, shape: tuple[int, ...], mesh: Mesh, fsdp: bool = False
) -> NamedSharding:
  """Returns the placement of `param_spec` on a mesh; over its `data` axis too if `fsdp`.

  Of a parameter that two axes share `data` for, on the same devices as `data`, `rest` and `model`.
  """
  data, model = mesh.shape[DATA_AXIS], mesh.shape[MODEL_AXIS]
  spec, rest = _split(path, shape, model, data if fsdp else 1)
  if rest > 1:
    mesh = Mesh(
      mesh.devices.reshape(data // rest, rest, model),
      (DATA_AXIS, REST_AXIS, MODEL_AXIS),
      axis_types=(AxisType.Auto,) * 3,
    )
  return NamedSharding(mesh, spec)


def state_shardings(state: Any, mesh: Mesh, fsdp: bool = False) -> Any:
  """Where each array of a training state goes, in its structure.

  The average and the moments of a parameter lie where it does, as their paths end alike.

  Args:
    state: any pytree with parameters in it, which may be described by shapes.
    mesh: over a `model` axis of 1 each device has all parameters, unless
    fsdp: they are split over `data` as well.
  """

  def place(path: Any, leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return param_sharding(name, leaf.shape, mesh, fsdp)

  return jax.tree_util.tree_map_with_path(place, state)


def make_state(make: Callable[[], Any], mesh: Mesh, fsdp: bool = False) -> Any:
  """A state whose arrays are made where `state_shardings` says: no device has to hold all of it."""
  shardings = state_shardings(jax.eval_shape(make), mesh, fsdp)
  # As fast as any for what runs once, and compiled in a fifth of the time.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(make, out_shardings=shardings, compiler_options=options)()


def place_state(state: Any, mesh: Mesh, fsdp: bool = False) -> Any:
  """Puts a state where `state_shardings` says; of several processes, each has all of it."""
  return _place(state, state_shardings(state, mesh, fsdp), mesh)


def place_whole(tree: Any, mesh: Mesh) -> Any:
  """Puts a whole copy of arrays on each device; of several processes, each has the same arrays."""
  return _place(tree, jax.tree.map(lambda _: replicated(mesh), tree), mesh)


def fetch(tree: Any) -> Any:
  """Whole numpy arrays of what lies on the devices, if in parts; several processes all call it."""

  def whole(leaf: Array) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      leaf = jax.device_put(leaf, replicated(leaf.sharding.mesh))
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


def constrain_state(state: Any, mesh: Mesh, fsdp: bool = False) -> Any:
  """Inside of a jitted function: keeps a state where `state_shardings` says."""
  return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh, fsdp))


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """Where each parameter goes, in the structure of `params`, which may be described by shapes.

  Over a `model` axis of 1 each device has all of them.
  """
  return state_shardings(params, mesh)


def shard_params(params: Any, mesh: Mesh) -> Any:
  """Splits parameters over the `model` axis of a mesh; what lies there already is not copied."""
  return jax.device_put(params, param_shardings(params, mesh))


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a batch this process reads: those of its devices, int [n], ascending.

  The batch is the same whatever the number of processes.

  Raises:
    UnclipError: the batch cannot be split over the devices.
  """
  _check_divides(batch_size, mesh)
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in parts]))


def place_rows(rows: Any, batch_size: int, mesh: Mesh) -> Any:
  """Makes one batch [batch_size, ...] of what each process has read.

  Args:
    rows: a pytree of numpy arrays [n, ...], the rows `process_rows` of the batch.
    batch_size: of all processes together.
    mesh: of `make_mesh`, of all processes.

  Raises:
    UnclipError: the batch cannot be split over the devices.
  """
  read, sharding = process_rows(batch_size, mesh), batch_sharding(mesh)

  def place(leaf: np.ndarray) -> Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      return leaf[np.searchsorted(read, np.arange(batch_size)[index[0]])]

    return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(place, rows)


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Splits a pytree of arrays [b, ...] over the devices, or over groups that share parameters.

  Raises:
    UnclipError: b is not a multiple of the number of devices, or groups.
  """
  _check_divides(_batch_size(batch), mesh)
  return jax.device_put(batch, batch_sharding(mesh))


def constrain_batch(batch: Any, mesh: Mesh) -> Any:
  """Inside of a jitted function: splits arrays [b, ...] that are made there over the devices."""
  return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))


def runs_by_itself() -> bool:
  """Whether what is traced is one device's part of a `shard_map` over `data`."""
  return DATA_AXIS in jax.sharding.get_abstract_mesh().manual_axes


def sharded(fn: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
  """Jits `fn(params, batch) -> [b, ...]` with the batch split over the devices.

  A batch that does not divide evenly is filled up with copies of its first row, whose results are
  dropped: with a key a sample, row i is the same on any number of devices.

  Args:
    fn: pure. `params` is a pytree of arrays that each device has whole, or a part of where the mesh
      has a `model` axis (guidance scale and eta may be among them), `batch` and the result are
      pytrees of arrays [b, ...].
    mesh: of `make_mesh`.

  Returns:
    A function of the same arguments. Parameters that `shard_params` has placed are not copied.
  """
  num_devices = mesh.shape[DATA_AXIS]
  jitted = jax.jit(fn, out_shardings=batch_sharding(mesh))

  def call(params: Any, batch: Any) -> Any:
    size = _batch_size(batch)
    batch = place_batch(_fill(batch, -size % num_devices), mesh)
    out = jitted(shard_params(params, mesh), batch)
    return out if size % num_devices == 0 else jax.tree.map(lambda a: a[:size], out)

  return call


def pmapped(fn: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
  """As `sharded`, through `jax.pmap`: each device runs the program on its own part of the batch.

  For code that is written for one device, its collectives over `data` by hand. `sharded` is the
  recommended way.

  Raises:
    UnclipError: the mesh has a `model` axis: here each device has all parameters.
  """
  if mesh.shape[MODEL_AXIS] > 1:
    raise UnclipError(
      f'pmap gives each device all parameters: take model_devices 1, not {mesh.shape[MODEL_AXIS]}, '
      'or jit'
    )
  devices = list(mesh.devices.reshape(-1))
  mapped = jax.pmap(fn, axis_name=DATA_AXIS, in_axes=(None, 0), devices=devices)

  def call(params: Any, batch: Any) -> Any:
    size = _batch_size(batch)
    batch = _fill(batch, -size % len(devices))
    batch = jax.tree.map(lambda a: a.reshape(len(devices), -1, *a.shape[1:]), batch)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:size], mapped(params, batch))

  return call


def _place(tree: Any, shardings: Any, mesh: Mesh) -> Any:
  if not mesh.is_multi_process:
    return jax.device_put(tree, shardings)

  def place(leaf: Array, sharding: NamedSharding) -> Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, sharding)
    # `device_put` would send the whole to the others, to compare it with theirs.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

  return jax.tree.map(place, tree, shardings)


def _check_divides(size: int, mesh: Mesh) -> None:
  num_parts = mesh.shape[DATA_AXIS]
  if size % num_parts:
    what = 'devices' if mesh.shape[MODEL_AXIS] == 1 else 'groups of devices'
    raise UnclipError(
      f'a batch of {size} cannot be split over {num_parts} {what}: use a multiple of {num_parts}, '
      f'or fewer {what}'
    )


def _batch_size(batch: Any) -> int:
  sizes = {a.shape[0] for a in jax.tree.leaves(batch)}
  if len(sizes) != 1:
    raise ValueError(f'the arrays of a batch differ in their first axis: {sorted(sizes)}')
  return sizes.pop()


def _fill(batch: Any, more: int) -> Any:
  def fill(a: Array) -> Array:
    rows = jnp.repeat(a[:1], more, axis=0)
    return jnp.concatenate([a, rows]) if more else a

  return jax.tree.map(fill, batch)
