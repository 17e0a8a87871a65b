"""Arrays that a caller gives."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from unclip_jax.types import UnclipError


def given_array(what: str, value: Any, n: int, shape: tuple[int, ...]) -> np.ndarray | None:
  """An array of the caller's as float32 [n, *shape], None as None.

  Args:
    what: its name, for messages.
    value: [n or 1, *shape].
    n: rows.
    shape: of a row.

  Raises:
    UnclipError: it is of another shape, or holds other than finite floating-point numbers.
  """
  if value is None:
    return None
  value = as_array(what, value)
  if value.shape not in ((n, *shape), (1, *shape)):
    raise UnclipError(
      f'{what} has the shape {list(value.shape)}, wanted is {[n, *shape]}, or 1 in place of {n}'
    )
  is_floating = jnp.issubdtype(value.dtype, jnp.floating)
  with np.errstate(over='ignore'):
    value = value.astype(np.float32) if is_floating else value
  if not is_floating or not np.isfinite(value).all():
    raise UnclipError(f'{what} must hold finite floating-point numbers')
  return np.broadcast_to(value, (n, *shape))


def as_array(what: str, value: Any) -> np.ndarray:
  """Anything array-like as numpy.

  Raises:
    UnclipError: it is not.
  """
  try:
    return np.asarray(value)
  except (TypeError, ValueError):
    raise UnclipError(f'{what} must be an array, all rows of it as long as each other') from None
