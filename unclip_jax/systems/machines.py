"""Machines that are only described: what their chips reach, and devices to compile for."""

import contextlib
import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from unclip_jax.measure.chips import Chip, Slice, gpu_slice, tpu_slice
from unclip_jax.sharding import Mesh, make_mesh
from unclip_jax.types import UnclipError

_ANY_TPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',  # it guards a device that nobody opens here
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


class Machine(NamedTuple):
  """Chips that are planned for.

  Attributes:
    slice: what they are.
    mesh: what programs are compiled for: their own devices, or as many that a CPU pretends to have.
    platform: of the mesh.
    is_real: whether the compiler is theirs, and tells the memory and the bytes of their programs.
  """

  slice: Slice
  mesh: Mesh
  platform: str
  is_real: bool

  @property
  def chip(self) -> Chip:
    """Of which it is."""
    return self.slice.chip

  @property
  def num_devices(self) -> int:
    """As JAX sees them: a chip may be two."""
    return self.mesh.devices.size

  @property
  def num_chips(self) -> int:
    """Of those that are used."""
    return -(-self.num_devices // self.chip.devices)

  @property
  def memory_bytes(self) -> float:
    """Of a device."""
    return self.chip.memory_bytes / self.chip.devices


def described_tpu(topology: str, model_devices: int = 1, num_devices: int | None = None) -> Machine:
  """A TPU, by its topology; needs libtpu, which compiles for it.

  Args:
    topology: such as 'v5e:16x16'.
    model_devices: that share one copy of the parameters.
    num_devices: that are used; None for all.

  Raises:
    UnclipError: libtpu is not installed or knows no such topology, or the devices do not divide.
  """
  chips = tpu_slice(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UnclipError(
      "programs for TPUs are compiled by libtpu, which is missing: pip install 'unclip-jax[plan]'"
    )
  # libtpu would ask a server of Google's which machine this is, and wants to be told one.
  for name, value in _ANY_TPU.items():
    os.environ.setdefault(name, value)
  try:
    devices = topologies.get_topology_desc(chips.name, platform='tpu').devices
  except Exception as error:  # as many kinds as there are reasons
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'libtpu has no topology {chips.name!r} ({reason}): take one such as v5e:4x8, v5p:4x4x8'
    ) from error
  return Machine(chips, make_mesh(num_devices, model_devices, devices=devices), 'tpu', True)


def pretended_gpus(gpus: str, model_devices: int = 1) -> Machine:
  """GPUs, for which a CPU's compiler shows how programs are split.

  Args:
    gpus: such as 'h100:256'.
    model_devices: that share one copy of the parameters.

  Raises:
    UnclipError: there is no such GPU, JAX has begun with fewer devices, or they do not divide.
  """
  chips = gpu_slice(gpus)
  with contextlib.suppress(RuntimeError):  # JAX has begun
    jax.config.update('jax_num_cpu_devices', chips.num_chips)
  devices = jax.devices('cpu')
  if len(devices) < chips.num_chips:
    raise UnclipError(
      f'--gpus {gpus}: JAX has begun with {len(devices)} devices: plan in a process of its own'
    )
  mesh = make_mesh(chips.num_chips, model_devices, devices=devices)
  return Machine(chips, mesh, 'cpu', False)
