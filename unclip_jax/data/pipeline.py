"""Batches for training in a fixed order, read and decoded by worker processes, through Grain.

Everything is a function of (seed, place in the order of examples): the order itself (a new one each
epoch), the caption of several, the crop, the degradation, and what takes the place of an example
that is broken. So batches are the same for any number of processes and of workers, and a run
continues at the exact example from the number of batches that it has had.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags
from etils import epath

from unclip_jax.data.examples import BrokenExample, Source
from unclip_jax.data.pictures import PictureConfig, make_picture
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import UnclipError

# So many broken examples in a row are no accident, unless more than 9 of 10 are broken.
_MOST_BROKEN = 200
_ENDLESS = 2**40  # batches

Batch = dict[str, Any]


class Rows(Protocol):
  """What batches are made of, one at a time; pickled for workers, and safe in several threads."""

  def __len__(self) -> int:
    """How many there are in an epoch."""
    ...

  def read(self, index: int, rng: np.random.Generator) -> Batch:
    """Row `index`: a dict of arrays and strings, a function of the arguments alone.

    Raises:
      BrokenExample: it cannot be used, and another one takes its place.
    """
    ...


class PictureRows:
  """Captioned pictures as rows of batches.

  A row has 'image' uint8 [side, side, 3]; 'low' where the config degrades, uint8 [side / factor,
  side / factor, 3]; 'caption', drawn of those that there are, and 'id', strings; with a tokenizer
  'ids' int32 [t] and 'mask' bool [t].

  Args:
    source: the examples.
    picture: what becomes of the pictures.
    tokenizer: of the captions; None gives no tokens.
    needs_caption: an example without one is broken; else its caption is ''.
  """

  def __init__(
    self,
    source: Source,
    picture: PictureConfig,
    tokenizer: Tokenizer | None = None,
    needs_caption: bool = True,
  ) -> None:
    self._source, self._picture = source, picture
    self._tokenizer, self._needs_caption = tokenizer, needs_caption

  def __len__(self) -> int:
    return len(self._source)

  def read(self, index: int, rng: np.random.Generator) -> Batch:
    """See the class; raises BrokenExample."""
    example = self._source[index]
    if self._needs_caption and not example.captions:
      raise BrokenExample(example.id, 'has no caption')
    drawn = int(rng.integers(max(1, len(example.captions))))
    caption = example.captions[drawn] if example.captions else ''
    image, low = make_picture(example.image, example.id, self._picture, rng)
    row: Batch = {'image': image, 'caption': caption, 'id': example.id}
    if low is not None:
      row['low'] = low
    if self._tokenizer is not None:
      tokens = self._tokenizer.encode([caption])
      row |= {'ids': tokens.ids[0], 'mask': tokens.mask[0]}
    return row


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
  """Which rows batches have, and in which order.

  Attributes:
    batch_size: of the global batch, that of all processes together.
    seed: of everything random, 0 to 2^32 - 1.
    shuffle: a new order each epoch; else the order of the source.

  Raises:
    UnclipError: a number is out of range.
  """

  batch_size: int
  seed: int = 0
  shuffle: bool = True

  def __post_init__(self):
    if self.batch_size < 1:
      raise UnclipError(f'batch_size {self.batch_size}: take 1 or more')
    if not 0 <= self.seed < 2**32:
      raise UnclipError(f'seed {self.seed}: take 0 to {2**32 - 1}')


class Pipeline:
  """An endless iterator of batches, the rows of one process of them.

  Each is a dict of arrays [b, ...] and lists of b strings: b rows of the global batch.

  A context manager, which ends the workers. `get_state` and `set_state` take it to where another
  one was; the state is JSON.

  Args:
    rows: what batches are made of.
    config: which of them, and in which order.
    batch_rows: which rows of each global batch this process has, ascending, as
      `sharding.process_rows` gives them; None is all of them.
    num_workers: processes that read and decode beside this one; 0 does it in threads of this one.
    num_threads: that read in each of them: more than 1 hides how long a store takes to answer.
    read_ahead: batches that each worker (or this process) has ready.
    broken_file: takes a line of JSON ('id' and 'reason') for each example that was left out, once;
      each process needs its own.

  Raises:
    UnclipError: there are no rows, or a number is out of range. Reading a batch raises it where the
      source fails as a whole, or hardly holds an example that is not broken.
  """

  def __init__(
    self,
    rows: Rows,
    config: PipelineConfig,
    *,
    batch_rows: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
    num_threads: int = 1,
    read_ahead: int = 2,
    broken_file: os.PathLike[str] | str | None = None,
  ) -> None:
    if not len(rows):
      raise UnclipError('there are no examples: choose another source')
    batch_rows = [*range(config.batch_size)] if batch_rows is None else [*map(int, batch_rows)]
    if not batch_rows or min(batch_rows) < 0 or max(batch_rows) >= config.batch_size:
      raise UnclipError(
        f'{len(batch_rows)} rows of a batch of {config.batch_size}: take one or more of 0 to '
        f'{config.batch_size - 1}'
      )
    if num_workers < 0 or num_threads < 1 or read_ahead < 1:
      raise UnclipError(
        f'{num_workers} workers, {num_threads} threads, {read_ahead} batches ahead: take at least '
        '0, 1 and 1'
      )
    self._rows, self._config = rows, config
    self._batch_rows = batch_rows
    self._num_workers, self._num_threads = num_workers, num_threads
    self._read_ahead = read_ahead
    self._next_batch = 0
    self._iterator: Iterator[Batch] | None = None
    self._broken = _BrokenList(broken_file)

  @property
  def num_broken(self) -> int:
    """How many different examples were left out so far, those of `broken_file` among them."""
    return len(self._broken.ids)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = iter(self._dataset())
    try:
      batch = dict(next(self._iterator))
    except Exception:
      self.close()  # A worker that has failed would give nothing more.
      raise
    self._next_batch += 1
    self._broken.add(batch.pop('broken'))
    return batch

  def get_state(self) -> dict[str, int]:
    """Where the iterator stands, for `set_state` of one like it."""
    return {
      'next_batch': self._next_batch,
      'batch_size': self._config.batch_size,
      'seed': self._config.seed,
      'shuffle': int(self._config.shuffle),
      'num_examples': len(self._rows),
    }

  def set_state(self, state: Mapping[str, int]) -> None:
    """Goes to where another iterator was, with any number of processes and workers.

    Raises:
      UnclipError: that one had other batches: of another source, seed or size.
    """
    here = self.get_state()
    for name, value in here.items():
      if not isinstance(state.get(name), int):
        raise UnclipError(f'the state of the input pipeline lacks {name}: it is damaged')
      if name != 'next_batch' and state[name] != value:
        raise UnclipError(
          f'the input pipeline had {name} {state[name]:,} before and has {value:,} now: take what '
          'it had, or start a new run'
        )
    if state['next_batch'] < 0:
      raise UnclipError(f'the input pipeline cannot begin at batch {state["next_batch"]}')
    self.close()
    self._next_batch = state['next_batch']

  def close(self) -> None:
    """Ends the workers; the next batch starts them again."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None

  def _dataset(self) -> grain.IterDataset[Batch]:
    batches = _Batches(self._rows, self._config, self._batch_rows, self._next_batch)
    ahead = self._read_ahead if self._num_workers == 0 else 1
    reading = grain.ReadOptions(self._num_threads, max(self._num_threads, ahead))
    dataset = grain.MapDataset.source(batches).to_iter_dataset(reading)
    return in_workers(dataset, self._num_workers, self._read_ahead)


def in_workers(
  dataset: grain.IterDataset[Batch], num_workers: int, read_ahead: int
) -> grain.IterDataset[Batch]:
  """The same in the same order, made by other processes where `num_workers` is not 0."""
  if not num_workers:
    return dataset
  if not flags.FLAGS.is_parsed():
    # Grain 0.2.18 asks for a flag of its own, which raises in programs that parse theirs otherwise.
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers, read_ahead)
  return dataset.mp_prefetch(options, worker_init_fn=_belong_to_parent)


def _belong_to_parent(index: int, count: int) -> None:
  """A worker leaves Ctrl-C to its parent, and ends once that is no more, if only by SIGKILL."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class _Batches:
  """The batches of one process from one of them on, with random access."""

  def __init__(self, rows: Rows, config: PipelineConfig, batch_rows: list[int], first: int) -> None:
    self._rows, self._config, self._first = rows, config, first
    self._batch_rows = batch_rows
    order = grain.MapDataset.range(len(rows))
    if config.shuffle:
      order = order.shuffle(seed=config.seed)
    self._order = order.repeat()

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Batch:
    start = (self._first + index) * self._config.batch_size
    broken: list[tuple[str, str]] = []
    rows = [self._row(start + row, broken) for row in self._batch_rows]
    batch: Batch = {'broken': broken}
    for name, value in rows[0].items():
      column = [row[name] for row in rows]
      batch[name] = column if isinstance(value, str) else np.stack(column)
    return batch

  def _row(self, place: int, broken: list[tuple[str, str]]) -> Batch:
    """The row of a place in the order, or the first that is whole of those drawn for it."""
    rng = np.random.default_rng((self._config.seed, place))
    index = int(self._order[place])
    for _ in range(_MOST_BROKEN):
      try:
        return self._rows.read(index, rng)
      except BrokenExample as error:
        broken.append((error.id, error.reason))
        index = int(rng.integers(len(self._rows)))
    name, reason = broken[-1]
    raise UnclipError(
      f'{_MOST_BROKEN} examples, one after the other, are broken, as {name} ({reason}): see what '
      'the source holds'
    )


class _BrokenList:
  """Which examples were left out, in memory and in a file."""

  def __init__(self, path: os.PathLike[str] | str | None) -> None:
    self._path = None if path is None else epath.Path(path)
    self.ids: set[str] = set()
    text = ''
    if self._path is not None and self._path.exists():
      text = self._path.read_text(encoding='utf-8')
    # A run that was killed may have left the beginning of a line.
    self._before = '\n' if text and not text.endswith('\n') else ''
    for line in text.splitlines():
      with contextlib.suppress(ValueError, KeyError, TypeError):
        self.ids.add(json.loads(line)['id'])

  def add(self, broken: list[tuple[str, str]]) -> None:
    """Notes those that are new."""
    new = {name: reason for name, reason in broken if name not in self.ids}
    self.ids |= new.keys()
    if not new or self._path is None:
      return
    lines = (json.dumps({'id': name, 'reason': reason}) + '\n' for name, reason in new.items())
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open('a') as file:
        file.write(self._before + ''.join(lines))
        self._before = ''
    except OSError as error:
      raise UnclipError(
        f'cannot write {self._path} ({error.strerror or error}): free some space or choose another '
        'folder'
      ) from error
