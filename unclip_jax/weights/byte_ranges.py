"""The bytes of a file by their ranges: mapped where it is local, else asked of its store.

Of a file in a store (`gs://` for instance) only what is read is fetched, straight into the array
that will hold it: nothing is copied to this machine's disk.
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

import numpy as np
from etils import epath

# What one request to a store asks for, in bytes: so much is held twice while it is copied.
_BLOCK = 2**24


class LazyTensor(NamedTuple):
  """A tensor of a file, known but not read; `read` gives an array of its own in C order."""

  file: epath.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class ByteRanges:
  """An open file.

  Attributes:
    file: for what has to be read in another way; where it stands is not kept.
    size: of the file in bytes.
  """

  def __init__(self, path: epath.Path, stack: contextlib.ExitStack) -> None:
    """Opens a file that is not empty, and keeps it open as long as `stack`.

    Raises:
      OSError: it cannot be read.
    """
    self.file: IO[bytes] = stack.enter_context(path.open('rb'))
    self._mapped: mmap.mmap | None = None
    if is_remote(path):
      self.size = path.stat().length
      return
    mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
    self._mapped = stack.enter_context(mapped)
    self.size = len(mapped)

  def read(self, start: int, length: int) -> bytes:
    """Some bytes; fewer where the file ends before."""
    if self._mapped is not None:
      return self._mapped[start : start + length]
    return self._fetch(start, max(0, min(length, self.size - start))).tobytes()

  def array(
    self, start: int, shape: Sequence[int], dtype: np.dtype, strides: Sequence[int] | None = None
  ) -> np.ndarray:
    """An array of its own in C order.

    Args:
      start: where its first element begins.
      shape: of the array.
      dtype: of the array.
      strides: in bytes, none negative; None where the elements lie in C order.

    Raises:
      Exception: some of it lies behind the end of the file, or numpy can hold no such array.
    """
    if self._mapped is not None:
      return np.array(np.ndarray(shape, dtype, self._mapped, start, strides), order='C')
    length = dtype.itemsize * math.prod(shape)
    if strides is not None and length:
      steps = (step * (size - 1) for size, step in zip(shape, strides, strict=True))
      length = dtype.itemsize + sum(steps)
    content = self._fetch(start, length)
    return np.array(np.ndarray(shape, dtype, content, 0, strides), order='C', copy=None)

  def _fetch(self, start: int, length: int) -> np.ndarray:
    if start + length > self.size:
      raise EOFError(f'it ends at byte {self.size}, wanted is {start + length}')
    content = np.empty(length, np.uint8)
    self.file.seek(start)
    filled = 0
    while filled < length:
      block = self.file.read(min(_BLOCK, length - filled))
      if not block:
        raise EOFError(f'it ended at byte {start + filled}')
      content[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
      filled += len(block)
    return content


def is_remote(path: epath.Path) -> bool:
  """Whether a file lies in a store."""
  return '://' in str(path)
