"""What accelerators have and reach by their makers' pages: to plan for machines that are not there.

Speeds are those of one chip. What links carry is counted one way: a ring sends and receives at the
same time.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.types import UnclipError

_GIB = 2**30
# A product in float32 proper (`jax.lax.Precision.HIGHEST`) is six of bfloat16 on a TPU.
_TPU_PASSES = 6


class Chip(NamedTuple):
  """One accelerator.

  Attributes:
    name: as topologies and `--gpus` name it.
    memory_bytes: of its own memory.
    flops_per_second: of dense products in bfloat16, a multiply-add as two.
    exact_flops_per_second: of products in float32 proper.
    bytes_per_second: from and to its memory.
    sent_per_second: bytes, over all of its links at once.
    devices: that JAX sees of it, each with as large a part of everything.
    torus: of a TPU: how many dimensions its links span.
    ring: of a TPU: a dimension of a multiple of so many chips is closed to a ring.
    node: of a GPU: how many are linked; beyond them there is
    network_per_second: bytes that each sends to other nodes.
  """

  name: str
  memory_bytes: float
  flops_per_second: float
  exact_flops_per_second: float
  bytes_per_second: float
  sent_per_second: float
  devices: int = 1
  torus: int = 0
  ring: int = 0
  node: int = 0
  network_per_second: float = 0.0

  def product_speed(self, dtype: Any) -> float:
    """FLOPs a second of products of a dtype."""
    exact = np.dtype(dtype) == np.float32
    return self.exact_flops_per_second if exact else self.flops_per_second


def _tpu(
  name: str, gib: float, tflops: float, gbps: float, sent: float, torus: int, ring: int, **more: int
) -> Chip:
  products = tflops * 1e12
  return Chip(
    name, gib * _GIB, products, products / _TPU_PASSES, gbps * 1e9, sent * 1e9,
    torus=torus, ring=ring, **more,
  )  # fmt: skip


def _gpu(
  name: str, gb: float, tflops: float, exact: float, gbps: float, sent: float, network: float
) -> Chip:
  return Chip(
    name, gb * 1e9, tflops * 1e12, exact * 1e12, gbps * 1e9, sent * 1e9,
    node=8, network_per_second=network * 1e9,
  )  # fmt: skip


# Google: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (tpu7x: its announcement). Their
# bandwidth between chips counts both ways: half of it is here. That page of v4 has none; Jouppi et
# al. 2023 (arXiv 2304.01433), table 4: six links of 50 GB/s. v5e and v6e are closed to rings at 16
# chips, the others at whole cubes of 4 (docs.cloud.google.com/tpu/docs/v4, "3D mesh and 3D torus").
# NVIDIA: data sheets of A100 80GB SXM, H100 SXM and H200 SXM, products without sparsity; NVLink
# likewise one way; user guides of DGX A100 and H100: eight linked, one network port a GPU of 200
# and of 400 Gbit/s.
CHIPS: Mapping[str, Chip] = MappingProxyType(
  {
    chip.name: chip
    for chip in (
      _tpu('v4', 32, 275, 1200, 300, 3, 4),
      _tpu('v5e', 16, 197, 819, 200, 2, 16),
      _tpu('v5p', 95, 459, 2765, 600, 3, 4),
      _tpu('v6e', 32, 918, 1638, 400, 2, 16),
      _tpu('tpu7x', 192, 2307, 7380, 600, 3, 4, devices=2),
      _gpu('a100', 80, 312, 19.5, 2039, 300, 25),
      _gpu('h100', 80, 989, 67, 3350, 450, 50),
      _gpu('h200', 141, 989, 67, 4800, 450, 50),
    )
  }
)


class Slice(NamedTuple):
  """Chips that run one program.

  Attributes:
    name: as it was asked for.
    chip: of which it is.
    num_chips: how many.
    sent_per_second: bytes that each sends at once, to all others together.
  """

  name: str
  chip: Chip
  num_chips: int
  sent_per_second: float


def tpu_slice(topology: str) -> Slice:
  """That of a topology, such as v5e:16x16.

  A dimension of one chip has no links, one that is not closed to a ring half of what a ring has.

  Raises:
    UnclipError: there is no such chip, or the shape is not of its dimensions.
  """
  name, _, shape = topology.partition(':')
  chip = CHIPS.get({'v7x': 'tpu7x'}.get(name, name))
  if chip is None or not chip.torus:
    known = ', '.join(chip.name for chip in CHIPS.values() if chip.torus)
    raise UnclipError(f'topology {topology!r}: there is no TPU {name!r}: take one of {known}')
  example = 'x'.join(['4'] * chip.torus)
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or shape.count('x') + 1 != chip.torus:
    raise UnclipError(
      f'topology {topology!r}: a {chip.name} has {chip.torus} dimensions: write {name}:{example}'
    )
  dims = [int(n) for n in shape.split('x')]
  if chip.torus == 2:  # a dimension is closed for itself
    rings = [n % chip.ring == 0 for n in dims]
  else:  # cubes are
    rings = [all(n % chip.ring == 0 for n in dims)] * len(dims)
  links = sum(0 if n == 1 else 2 if ring else 1 for n, ring in zip(dims, rings, strict=True))
  speed = chip.sent_per_second * links / (2 * chip.torus)
  return Slice(f'{chip.name}:{shape}', chip, math.prod(dims), speed)


def gpu_slice(gpus: str) -> Slice:
  """That of so many GPUs, such as h100:256.

  Between nodes an exchange within all is bound by the ports of a node together: each GPU sends its
  part of what the others of its node have put together over their links.

  Raises:
    UnclipError: there is no such GPU, or no number.
  """
  name, _, count = gpus.partition(':')
  chip = CHIPS.get(name)
  if chip is None or not chip.node:
    known = ', '.join(chip.name for chip in CHIPS.values() if chip.node)
    raise UnclipError(f'--gpus {gpus!r}: there is no GPU {name!r}: take one of {known}')
  if not count.isdecimal() or not int(count):
    raise UnclipError(f'--gpus {gpus!r}: write how many there are, as in {name}:8')
  n = int(count)
  beyond = chip.node * chip.network_per_second if n > chip.node else math.inf
  return Slice(gpus, chip, n, min(chip.sent_per_second, beyond) if n > 1 else 0.0)
