"""Where arrays live: the mesh, the placement of states and batches, sampling on many devices.

The only importer of `jax.sharding`. A mesh has the axes `data`, over which a batch is split, and
`model`, of size 1 until networks are split too. Axes are Auto: the compiler carries the placement
of the arguments through a program, whose code stays that of one device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
  SingleDeviceSharding,
)

from unclip_jax.types import Array, UnclipError

DATA_AXIS = 'data'
MODEL_AXIS = 'model'


def make_mesh(num_devices: int | None = None) -> Mesh:
  """Returns a mesh over the first `num_devices` devices, or over all.

  Raises:
    UnclipError: there are fewer devices.
  """
  devices = jax.devices()
  num_devices = len(devices) if num_devices is None else num_devices
  if not 1 <= num_devices <= len(devices):
    raise UnclipError(
      f'{num_devices} devices were asked for, there are {len(devices)} of kind '
      f'{devices[0].device_kind}: ask for 1 to {len(devices)}'
    )
  return jax.make_mesh(
    (num_devices, 1),
    (DATA_AXIS, MODEL_AXIS),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[:num_devices],
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the placement that splits the first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement that puts a whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Splits a pytree of arrays [b, ...] over the devices.

  Raises:
    UnclipError: b is not a multiple of the number of devices.
  """
  size, num_devices = _batch_size(batch), mesh.shape[DATA_AXIS]
  if size % num_devices:
    raise UnclipError(
      f'a batch of {size} cannot be split over {num_devices} devices: use a multiple of '
      f'{num_devices}, or fewer devices'
    )
  return jax.device_put(batch, batch_sharding(mesh))


def constrain_batch(batch: Any, mesh: Mesh) -> Any:
  """Inside of a jitted function: splits arrays [b, ...] that are made there over the devices."""
  return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))


def sharded(fn: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
  """Jits `fn(params, batch) -> [b, ...]` with the batch split over the devices.

  A batch that does not divide evenly is filled up with copies of its first row, whose results are
  dropped: with a key a sample, row i is the same on any number of devices.

  Args:
    fn: pure. `params` is a pytree of arrays that each device has whole (guidance scale and eta may
      be among them), `batch` and the result are pytrees of arrays [b, ...].
    mesh: of `make_mesh`.

  Returns:
    A function of the same arguments. Parameters that are `replicated` already are not copied.
  """
  num_devices = mesh.shape[DATA_AXIS]
  jitted = jax.jit(fn, out_shardings=batch_sharding(mesh))

  def call(params: Any, batch: Any) -> Any:
    size = _batch_size(batch)
    batch = place_batch(_fill(batch, -size % num_devices), mesh)
    out = jitted(jax.device_put(params, replicated(mesh)), batch)
    return out if size % num_devices == 0 else jax.tree.map(lambda a: a[:size], out)

  return call


def pmapped(fn: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
  """As `sharded`, through `jax.pmap`: each device runs the program on its own part of the batch.

  For code that is written for one device, its collectives over `data` by hand. `sharded` is the
  recommended way.
  """
  devices = list(mesh.devices.reshape(-1))
  mapped = jax.pmap(fn, axis_name=DATA_AXIS, in_axes=(None, 0), devices=devices)

  def call(params: Any, batch: Any) -> Any:
    size = _batch_size(batch)
    batch = _fill(batch, -size % len(devices))
    batch = jax.tree.map(lambda a: a.reshape(len(devices), -1, *a.shape[1:]), batch)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:size], mapped(params, batch))

  return call


def described_device(topology: str) -> Sharding:
  """One chip of a TPU that is only described ('v5e:2x2'), to compile for; needs libtpu.

  Raises:
    UnclipError: libtpu is not installed, or knows no such topology.
  """
  try:
    described = topologies.get_topology_desc(topology, platform='tpu')
  except Exception as error:  # as many kinds as there are reasons
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'no programs can be compiled for {topology} ({reason}): pip install libtpu, and take a '
      'topology such as v5e:2x2'
    ) from error
  return SingleDeviceSharding(described.devices[0])


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
