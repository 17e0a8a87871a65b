"""Data sets that TFDS prepared as ArrayRecord, read through Grain without TensorFlow.

`data_source` gives the records as they are, `TfdsExamples` the pictures and captions in them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from unclip_jax.data.examples import BrokenExample, Example, check_index
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
  records = _open(directory, split).as_data_source(split=split)
  return grain.MapDataset.source(_Records(records, f'split {split!r} of {directory}'))


class TfdsExamples:
  """The examples of a split: any data set with a feature for pictures and one for captions.

  Pictures stay encoded until they are used.

  Args:
    directory: the folder that holds `dataset_info.json` and the shards.
    split: the name of a split.
    image: the feature of the pictures, an `Image` or one of bytes; of features in others the keys
      on the way, joined by slashes.
    caption: the feature of the captions, text or a list of it: 'captions/text' in `coco_captions`,
      'caption' in `laion400m`.

  Raises:
    UnclipError: as `data_source`, or the data set has no such features.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    split: str,
    image: str = 'image',
    caption: str = 'caption',
  ) -> None:
    directory = epath.Path(directory)
    builder = _open(directory, split)
    features = builder.info.features
    for name in (image, caption):
      if _feature(features, name.split('/')) is None:
        known = ', '.join(sorted(_names(features)))
        raise UnclipError(f'{directory} has no feature {name!r}: choose one of {known}')
    self._image, self._caption = image.split('/'), caption.split('/')
    decoders: Any = tfds.decode.SkipDecoding()
    for key in reversed(self._image):
      decoders = {key: decoders}
    if not isinstance(_feature(features, self._image), tfds.features.Image):
      decoders = None  # bytes as they are
    records = builder.as_data_source(split=split, decoders=decoders)
    self._name = f'{builder.info.name}/{split}'
    self._records = _Records(records, f'split {split!r} of {directory}')

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    check_index(index, len(self))
    name = f'{self._name}/{index}'
    try:
      record = self._records[index]
    except UnclipError as error:
      raise BrokenExample(name, str(error)) from error
    return Example(_value(record, self._image), _texts(_value(record, self._caption)), name)


def _open(directory: epath.Path, split: str) -> tfds.core.DatasetBuilder:
  """The builder of a data set whose split is known to be whole; errors as of `data_source`."""
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
  return builder


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


def _feature(features: Any, keys: Sequence[str]) -> Any:
  """The feature at the end of some keys, None where there is none."""
  for key in keys:
    features = _fields(features).get(key)
  return features


def _fields(features: Any) -> dict[str, Any]:
  """What is in a feature by its names, also where it is a sequence of such; else nothing."""
  if isinstance(features, tfds.features.Sequence):
    return _fields(features.feature)
  return dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def _names(features: Any, inside: str = '') -> Iterator[str]:
  for key, feature in _fields(features).items():
    if _fields(feature):
      yield from _names(feature, f'{inside}{key}/')
    else:
      yield f'{inside}{key}'


def _value(record: Any, keys: Sequence[str]) -> Any:
  for key in keys:
    record = record[key]
  return record


def _texts(value: Any) -> tuple[str, ...]:
  """The captions in what TFDS gives for text: bytes, or an array or list of them."""
  if isinstance(value, bytes | str):
    text = value.decode(errors='replace') if isinstance(value, bytes) else value
    return (text.strip(),) if text.strip() else ()
  return tuple(text for one in value for text in _texts(one))


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
