"""Kernels kept by columns, which is how a CPU multiplies few rows by them fastest.

A kernel of inputs and outputs lies in memory input by input, and XLA's product for CPUs has to
gather the columns that it works on. With three rows or more, as the prior has at each step, that is
what it does most of the time. A kernel that lies output by output is read straight through.
"""

from typing import Any

import jax
from flax import struct

from unclip_jax.types import Array, Params


@struct.dataclass
class ByColumns:
  """A kernel in the place of which it stands among parameters.

  Attributes:
    columns: [outputs, inputs], axes of several joined.
    shape: of the kernel, inputs first.
  """

  columns: Array
  shape: tuple[int, ...] = struct.field(pytree_node=False)


def plain(params: Params) -> Params:
  """The kernels as networks expect them.

  Within the body of a loop: there XLA makes one product of the transposition and what multiplies
  by it, and the kernel stays as it lies.
  """

  def restore(leaf: Any) -> Any:
    return leaf.columns.T.reshape(leaf.shape) if isinstance(leaf, ByColumns) else leaf

  return jax.tree.map(restore, params, is_leaf=lambda leaf: isinstance(leaf, ByColumns))
