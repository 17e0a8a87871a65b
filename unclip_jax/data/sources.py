"""Data sets that TFDS prepared as ArrayRecord, read through Grain without TensorFlow."""

import json
import os
from collections.abc import Sequence
from typing import Any

import grain
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from unclip_jax.types import UnclipError


def data_source(directory: str | os.PathLike[str], split: str) -> grain.MapDataset[dict[str, Any]]:
  """Returns one split of a prepared TFDS data set as a Grain data set with random access.

  Args:
    directory: the folder that holds `dataset_info.json` and the shards.
    split: the name of a split.

  Returns:
    Records in their stored order, each a dict from feature names to numpy values. Reading a
    damaged one raises UnclipError.

  Raises:
    UnclipError: the folder is missing or holds no ArrayRecord data set, it has no such split, or a
      shard is missing or cut short.
  """
  directory = epath.Path(directory)
  info_path = directory / 'dataset_info.json'
  if not info_path.exists():
    raise UnclipError(f'no data set in {directory} (no dataset_info.json): fetch or build it first')
  try:
    file_format = json.loads(info_path.read_text()).get('fileFormat')
  except ValueError as error:
    raise UnclipError(f'{info_path} is damaged ({error}): fetch or build it again') from error
  if file_format != 'array_record':
    raise UnclipError(
      f"{directory} is stored as {file_format}: prepare it with file_format='array_record'"
    )
  if not (directory / 'features.json').exists():
    raise UnclipError(f'{directory}/features.json is missing: fetch or build the data set again')
  builder = tfds.builder_from_directory(directory)
  if split not in builder.info.splits:
    known = ', '.join(sorted(builder.info.splits))
    raise UnclipError(f'{directory} has no split {split!r}: choose one of {known}')
  info = builder.info.splits[split]
  for path, num_records in zip(info.filepaths, info.shard_lengths, strict=True):
    _check_shard(epath.Path(path), num_records)
  records = builder.as_data_source(split=split)
  return grain.MapDataset.source(_Records(records, f'split {split!r} of {directory}'))


class _Records:
  """Records of a TFDS source; reading a damaged one names the data set."""

  def __init__(self, records: Sequence[dict[str, Any]], name: str):
    self._records = records
    self._name = name

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      return self._records[index]
    except RuntimeError as error:
      raise UnclipError(
        f'record {index} in {self._name} is damaged: fetch or build the data set again'
      ) from error


def _check_shard(path: epath.Path, num_records: int) -> None:
  if not path.exists():
    raise UnclipError(f'data shard {path} is missing: fetch or build the data set again')
  try:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    found = reader.num_records()
    reader.close()
  except (ValueError, IndexError, RuntimeError) as error:
    raise UnclipError(
      f'data shard {path} is cut short or damaged: fetch or build the data set again'
    ) from error
  if found != num_records:
    raise UnclipError(
      f'data shard {path} holds {found} of {num_records} records: fetch or build the data set again'
    )
