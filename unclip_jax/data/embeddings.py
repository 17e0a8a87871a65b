"""CLIP's embeddings of a data set: computed once (`experiments.embed_dataset`), read in training.

A folder holds `embeddings.json`, which says what they are of, and shards of ArrayRecord. Shard k of
n has the examples k * N / n to (k + 1) * N / n of the source's N, without those that were broken: a
record each, msgpack of arrays and strings by their names.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from flax import serialization

from unclip_jax.types import UnclipError

META_NAME = 'embeddings.json'
FORMAT = 1

Record = Mapping[str, np.ndarray | str]


class EmbeddingRows:
  """The rows of a folder, for a Pipeline, a training loop or `columns`.

  A row has 'z_i' float32 [embed_dim], 'caption' and 'id', strings, 'index' int64, its number in the
  source, and what the job was asked for: 'z_t' float32 [embed_dim], 'ids' int32 [t] and 'mask' bool
  [t], 'states' [t, width].

  Args:
    folder: `gs://` and the like work as far as ArrayRecord reads them.

  Attributes:
    meta: what is in embeddings.json: the model, the dtype, the source and so on.

  Raises:
    UnclipError: it is no such folder, of a newer format, or a shard is missing or damaged.
  """

  def __init__(self, folder: os.PathLike[str] | str) -> None:
    self._folder = epath.Path(folder)
    self.meta = read_meta(self._folder)
    names = [shard_name(i, self.meta['num_shards']) for i in range(self.meta['num_shards'])]
    missing = [name for name in names if not (self._folder / name).exists()]
    if missing:
      raise UnclipError(
        f'{self._folder} lacks {len(missing)} of {len(names)} shards, as {missing[0]}: run '
        'embed_dataset again, it makes what is missing'
      )
    for name in names:
      _check_shard(self._folder / name)
    paths = [os.fspath(self._folder / name) for name in names]
    self._records = array_record_data_source.ArrayRecordDataSource(paths)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'index {index} is not within 0..{len(self) - 1}')
    try:
      return serialization.msgpack_restore(self._records[index])
    except (RuntimeError, ValueError) as error:
      raise UnclipError(
        f'record {index} of {self._folder} is damaged: remove its shard and run embed_dataset again'
      ) from error

  def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A row for a Pipeline; nothing of it is random."""
    return self[index]

  def columns(self, names: Iterable[str], indices: Iterable[int] | None = None) -> dict[str, Any]:
    """Some rows in memory, or all of them: arrays [n, ...], and lists of n strings.

    Raises:
      UnclipError: the records have no such name.
    """
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for index in range(len(self)) if indices is None else indices:
      row = self[int(index)]
      for name, column in columns.items():
        if name not in row:
          raise UnclipError(
            f'{self._folder} has no {name!r}, only {", ".join(sorted(row))}: run embed_dataset '
            'with it'
          )
        column.append(row[name])
    return {
      name: column if column and isinstance(column[0], str) else np.stack(column)
      for name, column in columns.items()
    }


def read_meta(folder: epath.Path) -> dict[str, Any]:
  """What embeddings.json says.

  Raises:
    UnclipError: it is missing, damaged or of a newer format.
  """
  path = folder / META_NAME
  if not path.exists():
    raise UnclipError(f'{folder} has no {META_NAME}: give a folder that embed_dataset has made')
  try:
    meta = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UnclipError(f'{path} is damaged ({error}): run embed_dataset anew') from error
  if not isinstance(meta, dict) or type(meta.get('num_shards')) is not int:
    raise UnclipError(f'{path} does not say how many shards there are: run embed_dataset anew')
  if meta.get('format') != FORMAT:
    raise UnclipError(
      f'{path} is of format {meta.get("format")}, this version reads {FORMAT}: update unclip-jax'
    )
  return meta


def shard_name(index: int, count: int) -> str:
  """Of a shard's file."""
  return f'embeddings-{index:05d}-of-{count:05d}.array_record'


def shard_range(index: int, count: int, num_examples: int) -> range:
  """Which examples of the source a shard has."""
  return range(index * num_examples // count, (index + 1) * num_examples // count)


def write_records(path: Path, records: Iterable[Record]) -> None:
  """Writes a file of ArrayRecord, each record readable on its own.

  Raises:
    OSError: it cannot be written.
  """
  # The library itself reports a full disk, or a missing folder, as one of these.
  try:
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
  except (RuntimeError, ValueError) as error:
    raise OSError(_first_line(error)) from error
  failed = None
  for content in _contents(records):
    try:
      writer.write(content)
    except (RuntimeError, ValueError) as error:
      failed = error
      break
  try:
    writer.close()
  except (RuntimeError, ValueError) as error:
    failed = failed or error
  if failed is not None:
    raise OSError(_first_line(failed)) from failed


def _contents(records: Iterable[Record]) -> Iterator[bytes]:
  for record in records:
    yield serialization.msgpack_serialize(dict(record))


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def _check_shard(path: epath.Path) -> None:
  try:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    reader.close()
  except (ValueError, IndexError, RuntimeError) as error:
    raise UnclipError(
      f'{path} is cut short or damaged: remove it and run embed_dataset again'
    ) from error
