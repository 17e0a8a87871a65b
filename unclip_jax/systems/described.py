"""Arrays that are only described, by shapes and placements: what they take, where they lie."""

import math
from typing import Any

import jax

from unclip_jax.sharding import NamedSharding


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """What arrays take on each device.

  Args:
    tree: of arrays, or of their shapes and types.
    shardings: in its structure.
  """

  def size(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def described(tree: Any, shardings: Any) -> Any:
  """Shapes and types of arrays [...], with where each of them lies: what programs are lowered for.

  Args:
    tree: of arrays, or of their shapes and types.
    shardings: in its structure, or one for all.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    tree,
    shardings,
  )
