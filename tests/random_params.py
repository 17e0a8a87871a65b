"""Random parameters, none of them zero: fresh ones leave half of a network without effect."""

from typing import Any

import jax
import numpy as np


def randomised(params: Any, seed: int = 0) -> Any:
  """`params`, arrays or shapes, drawn anew: kernels by their fan-in, scales around 1."""
  draw = np.random.default_rng(seed)

  def fill(path, leaf):
    spread = 0.3 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return (mean + spread * draw.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, params)
