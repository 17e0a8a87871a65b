"""What a device reaches on plain work: a large product of matrices, a copy, a skinny product.

The share of it that a program reaches says how much there is left to gain on that machine, at that
hour: peaks are measured in the run that they are compared with.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.measure.timing import seconds

_REPEATS = 5
_CALLS = 4  # handed over at once: a launch is not what is measured
_SKINNY_WIDTHS = (2048, 8192)  # of Karlo's prior, whose steps are such products
# Of a matrix product, and bytes of an array: a tenth of a second each, about.
_SIDE = {'cpu': 2048}
_BYTES = {'cpu': 2**28}
_OTHER_SIDE, _OTHER_BYTES = 8192, 2**30


class Peaks(NamedTuple):
  """The best of several measurements, of one device.

  Attributes:
    flops_per_second: of a product of two square matrices, a multiply-add as two.
    bytes_per_second: of reading an array and writing another of its size, both counted.
    skinny_bytes_per_second: of reading the weights of a chain of products with few rows, which lie
      by rows or by columns, whichever is faster.
    skinny_rows: how many rows those are.
  """

  flops_per_second: float
  bytes_per_second: float
  skinny_bytes_per_second: float
  skinny_rows: int


def measure_peaks(
  dtype: Any, rows: int = 6, side: int | None = None, num_bytes: int | None = None
) -> Peaks:
  """Measures the default device.

  Args:
    dtype: of all arrays; products in float32 are float32 proper, as the stages' are.
    rows: of the skinny product; the prior has 6 where it is guided, 3 where not, at batch 1.
    side: of the square matrices; by default what takes long enough to be measured.
    num_bytes: of the copied array, and of all weights of the skinny product, at least.
  """
  dtype, platform = jnp.dtype(dtype), jax.devices()[0].platform
  side = _SIDE.get(platform, _OTHER_SIDE) if side is None else side
  num_bytes = _BYTES.get(platform, _OTHER_BYTES) if num_bytes is None else num_bytes
  precision = 'highest' if dtype == jnp.float32 else 'default'
  with jax.default_matmul_precision(precision):
    a, b = _numbers((side, side), dtype), _numbers((side, side), dtype)
    product = _best(jax.jit(jnp.dot), a, b)
    # A negation: what would only copy may not run at all.
    array = _numbers((num_bytes // dtype.itemsize,), dtype)
    copied = _best(jax.jit(jnp.negative), array)
    few, many = _SKINNY_WIDTHS
    pairs = math.ceil(num_bytes / (2 * few * many * dtype.itemsize))
    weights = [
      (_numbers((few, many), dtype, few), _numbers((many, few), dtype, many)) for _ in range(pairs)
    ]
    x = _numbers((rows, few), dtype)
    skinny = min(_best(jax.jit(chain), x, weights) for chain in (_chain, _chain_by_columns))
  return Peaks(
    flops_per_second=2 * side**3 / product,
    bytes_per_second=2 * array.nbytes / copied,
    skinny_bytes_per_second=sum(w.nbytes for pair in weights for w in pair) / skinny,
    skinny_rows=rows,
  )


def _chain(x: jax.Array, weights: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
  """One product after the other: a compiler would join those of one array."""
  for widen, narrow in weights:
    x = x @ widen @ narrow
  return x


def _chain_by_columns(x: jax.Array, weights: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
  """The same, each array taken as the transposed weights: outputs first."""
  for narrow, widen in weights:
    for kernel in (widen, narrow):
      x = jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))
  return x


def _numbers(shape: tuple[int, ...], dtype: np.dtype, fan_in: int = 1) -> jax.Array:
  """Normal numbers that repeat: a product takes as long with them as with others."""
  block = _block() / np.float32(fan_in**0.5)
  return jax.device_put(np.resize(block, shape).astype(dtype))


@functools.cache
def _block() -> np.ndarray:
  return np.random.default_rng(0).standard_normal(1_000_003, np.float32)


def _best(run: Callable[..., jax.Array], *args: Any) -> float:
  """The least seconds of a call."""

  def several() -> None:
    jax.block_until_ready([run(*args) for _ in range(_CALLS)])

  jax.block_until_ready(run(*args))
  return min(seconds(several)[1] for _ in range(_REPEATS)) / _CALLS
