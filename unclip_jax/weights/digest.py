"""A short digest of arrays that is computed where they lie, to see that they come back unchanged.

The bits of each number are mixed with its place, and the results summed modulo 2^32: any single
number that changes shows, and of more than one almost any. The sum is the same however an array is
split over devices, and costs one pass over it.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.types import Array


def digest(tree: Any) -> str | None:
  """Returns 16 hexadecimal digits that stand for all arrays of a tree, in their order.

  None where the devices of other processes keep the sums to themselves.

  Args:
    tree: arrays of real numbers or truth values.
  """
  sums = _sums(jax.tree.leaves(tree))
  if not sums.is_fully_addressable and not sums.is_fully_replicated:
    return None
  return hashlib.sha256(np.asarray(sums).astype('<u4').tobytes()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[Array]) -> Array:
  """uint32, one for each leaf."""
  return jnp.stack([jnp.uint32(0), *map(_sum, leaves)])


def _sum(x: Array) -> Array:
  x = jnp.asarray(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  # Numbers of 8 bytes become two of 4, along an axis more.
  word = jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    stride *= bits.shape[axis]
  return _mix(bits + _mix(place)).sum(dtype=jnp.uint32)


def _mix(x: Array) -> Array:
  """The end of MurmurHash3 (Appleby, 2008): each bit of uint32 changes about half of the others."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
