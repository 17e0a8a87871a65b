"""What every source of captioned pictures gives: a sequence of examples with random access."""

from typing import NamedTuple, Protocol

import numpy as np

from unclip_jax.types import UnclipError


class Example(NamedTuple):
  """A picture as it is stored, and what is said of it.

  Attributes:
    image: the bytes of a picture file of any format that Pillow reads, or uint8 [h, w, 1 or 3].
    captions: any number of them, of which training draws one each time.
    id: the name within its source, for people to find it again.
  """

  image: bytes | np.ndarray
  captions: tuple[str, ...]
  id: str


class Source(Protocol):
  """Examples by their index, read when they are asked for.

  Reading one raises BrokenExample where only that one is at fault, and any other UnclipError where
  the source is (a vanished shard). It is safe in several threads, and pickled for worker processes.
  """

  def __len__(self) -> int:
    """How many there are."""
    ...

  def __getitem__(self, index: int) -> Example:
    """The example at an index from 0."""
    ...


class BrokenExample(UnclipError):
  """An example that cannot be used, while its source goes on.

  Attributes:
    id: of the example.
    reason: why, in one line.
  """

  def __init__(self, id: str, reason: str) -> None:
    super().__init__(id, reason)  # what pickling gives back to the parent of a worker
    self.id = id
    self.reason = reason

  def __str__(self) -> str:
    return f'{self.id}: {self.reason}'


def check_index(index: int, length: int) -> None:
  """Raises IndexError where an index is not within 0..length - 1: it ends a loop over a source."""
  if not 0 <= index < length:
    raise IndexError(f'index {index} is not within 0..{length - 1}')
