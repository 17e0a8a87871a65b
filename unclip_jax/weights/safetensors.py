"""Parameters in safetensors files: a flat name for each array, read one at a time.

A parameter tree `{'block_0': {'kernel': ...}}` is stored as `block_0.kernel`. Reading wants to
know what to expect, so that a file of another architecture is an error and never a bad picture.
"""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.byte_ranges import LazyTensor, is_remote
from unclip_jax.weights.safetensors_file import stored_tensors

# There is no way to read it without setting it: once, while no other thread makes files.
_UMASK = os.umask(0)
os.umask(_UMASK)
_NAMES_SHOWN = 3


def save_params(
  path: os.PathLike[str] | str,
  params: Params,
  dtype: Any = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes parameters to a safetensors file, whole or not at all.

  Args:
    path: the file; `gs://` and the like work.
    params: nested dicts of arrays.
    dtype: what floating arrays of two or more axes are cast to, bfloat16 for instance; None keeps
      theirs. Biases, norms and statistics, vectors, always do: they are small and delicate.
    metadata: words for the header of the file.

  Raises:
    UnclipError: an array holds a NaN or an infinity, or the file cannot be written.
  """
  path = epath.Path(path)
  tensors = {}
  for name, leaf in named_leaves(params).items():
    array = np.ascontiguousarray(jax.device_get(leaf)).reshape(leaf.shape)
    is_matrix = array.ndim > 1 and not name.endswith('bias')
    if dtype is not None and is_matrix and jnp.issubdtype(array.dtype, jnp.floating):
      array = array.astype(jnp.dtype(dtype))
    if not np.isfinite(array).all():
      raise UnclipError(
        f'{name} holds a NaN or an infinity and was not written to {path}: take the parameters of '
        'an earlier checkpoint'
      )
    tensors[name] = array
  header = None if metadata is None else dict(metadata)
  write_atomically(path, lambda part: safetensors_numpy.save_file(tensors, part, header))


def load_params(path: os.PathLike[str] | str, expected: Params, dtype: Any = None) -> Params:
  """Reads parameters from a safetensors file, each array straight to its device.

  The host holds one array at a time. Names and shapes are checked before the first is read.

  Args:
    path: the file; of one in a store (`gs://` and the like) each array is fetched by itself.
    expected: nested dicts of `jax.ShapeDtypeStruct`s or arrays: the names and shapes wanted. A
      leaf with a sharding is placed by it, others on the default device.
    dtype: of the floating arrays returned; None takes that of `expected`.

  Returns:
    The parameters, in the structure of `expected`.

  Raises:
    UnclipError: the file is missing, cut short or of another format; or one of its arrays is
      missing, not wanted, of another shape or kind, or holds a NaN. The message names both.
  """
  path = epath.Path(path)
  wanted = named_leaves(expected)
  with contextlib.ExitStack() as stack:
    tensors = _open(path, stack)
    _check_names(path, set(tensors), wanted)
    for name, leaf in wanted.items():
      shape = tensors[name].shape
      if shape != tuple(leaf.shape):
        raise UnclipError(
          f'{path}: {name} has the shape {list(shape)}, wanted is {list(leaf.shape)}: the file '
          'belongs to another configuration, open it with its own'
        )
    # In the order of the file, which disks and stores are fast at.
    arrays = {name: _read(tensor, name, wanted[name], dtype) for name, tensor in tensors.items()}
  return jax.tree.unflatten(jax.tree.structure(expected), [arrays[name] for name in wanted])


def load_vectors(path: os.PathLike[str] | str) -> dict[str, np.ndarray]:
  """All of a small file of float vectors, float32 by their names, on the host.

  Raises:
    UnclipError: the file is missing, cut short or of another format, or an array holds a NaN, is of
      whole numbers or no vector; names it.
  """
  path, vectors = epath.Path(path), {}
  with contextlib.ExitStack() as stack:
    for name, tensor in _open(path, stack).items():
      if len(tensor.shape) != 1:
        raise UnclipError(f'{path}: {name} has the shape {list(tensor.shape)}, wanted is a vector')
      leaf = jax.ShapeDtypeStruct(tensor.shape, jnp.float32)
      vectors[name] = np.asarray(_read(tensor, name, leaf, None))
  return vectors


def reach(path: os.PathLike[str] | str) -> epath.Path:
  """`path` with its ~ expanded, known to lie where this machine can look.

  Raises:
    UnclipError: it is of a store (`gs://` for instance) that cannot be reached.
  """
  if '://' not in os.fspath(path):
    return epath.Path(path).expanduser()
  try:
    store = epath.Path(path)
    store.exists()
  except Exception as error:  # as many kinds as there are stores
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise UnclipError(
      f'{path} cannot be reached ({reason}): check its name and the network; gs:// needs '
      "pip install 'unclip-jax[gcs]'"
    ) from error
  return store


def write_atomically(path: epath.Path, write: Callable[[Path], None]) -> None:
  """Makes a file through another name, so that the right one only ever holds a whole file.

  Args:
    path: the file; missing folders are made. A remote one is made here and sent at the end.
    write: given the name to write to, always local.

  Raises:
    UnclipError: the file cannot be written, a full disk for instance. Nothing is left of it, and
      one that was there before is untouched.
  """
  try:
    if is_remote(path):
      with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        write(part)
        path.write_bytes(part.read_bytes())
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Chance keeps two writers of one file apart; the numbers of processes are no help on several
    # machines.
    part = Path(path.parent) / f'.{path.name}.{secrets.token_hex(4)}.part'
    try:
      write(part)
      part.chmod(0o666 & ~_UMASK)  # The safetensors package makes files for their owner alone.
      part.replace(path)
    finally:
      part.unlink(missing_ok=True)
  except (OSError, SafetensorError) as error:
    raise UnclipError(
      f'cannot write {path} ({getattr(error, "strerror", None) or error}): free some space or '
      'choose a folder that can be written'
    ) from error


def named_leaves(tree: Params) -> dict[str, Any]:
  """The leaves of nested dicts by their names, the keys on the way joined by dots."""
  named: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if name in named:
      raise ValueError(f'two parameters would both be stored as {name}: rename one')
    named[name] = leaf
  return named


def _open(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  if not path.exists():
    raise UnclipError(
      f'there is no weights file {path}: check the path, or download the model again'
    )
  try:
    return stored_tensors(path, stack)
  except OSError as error:
    raise UnclipError(
      f'cannot read {path} ({error.strerror or error}): check that it is a file and may be read'
    ) from error
  except UnclipError:
    raise
  except (RecursionError, ValueError) as error:
    raise UnclipError(
      f'{path} is cut short, or not a safetensors file ({error}): copy or download it again'
    ) from error


def _check_names(path: epath.Path, found: set[str], wanted: dict[str, Any]) -> None:
  missing = [name for name in wanted if name not in found]
  extra = sorted(found - wanted.keys())
  if not missing and not extra:
    return
  parts = []
  if missing:
    parts.append(f'lacks {_some(missing)}')
  if extra:
    parts.append(f'has {_some(extra)}, which nothing asks for')
  raise UnclipError(
    f'{path} {" and ".join(parts)}: the file belongs to another configuration, open it with its own'
  )


def _some(names: list[str]) -> str:
  more = len(names) - _NAMES_SHOWN
  return ', '.join(names[:_NAMES_SHOWN]) + (f' and {more} more' if more > 0 else '')


def _read(tensor: LazyTensor, name: str, leaf: Any, dtype: Any) -> Array:
  path = tensor.file
  try:
    array = tensor.read()
  except Exception as error:  # of stores, of mapped memory
    raise UnclipError(f'{path}: {name} cannot be read ({error}): download it again') from error
  floating = jnp.issubdtype(leaf.dtype, jnp.floating)
  if floating != jnp.issubdtype(array.dtype, jnp.floating):
    raise UnclipError(
      f'{path}: {name} is {array.dtype}, wanted is {leaf.dtype}: the file belongs to another '
      'configuration, open it with its own'
    )
  with np.errstate(over='ignore'):  # Becomes an infinity, which the check below finds.
    array = array.astype(dtype if floating and dtype is not None else leaf.dtype, copy=False)
  if not np.isfinite(array).all():
    raise UnclipError(
      f'{path}: {name} holds a NaN or an infinity as {array.dtype}: download it again, or take the '
      'weights of an earlier checkpoint'
    )
  return jax.device_put(array, getattr(leaf, 'sharding', None))
