"""Batches of any captioned pictures for the training scripts, in place of a pool of emoji.

Which examples make a batch follows from the seed and the number of updates before it: a run that
continues takes up the next example, whatever the number of processes and of workers.
"""

import json
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from experiments.emoji.options import TrainConfig
from experiments.source_options import describe_source, open_source
from unclip_jax import sharding
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.data.pipeline import PictureRows, Pipeline, PipelineConfig, Rows
from unclip_jax.types import Array, UnclipError

STATE_NAME = 'pipeline.json'
READ_AHEAD = 4  # batches a worker

Arrays = Mapping[str, Any]


class Part:
  """Some of the rows of a source, one after the other."""

  def __init__(self, rows: Rows, start: int, stop: int) -> None:
    self._rows, self._start, self._stop = rows, start, stop

  def __len__(self) -> int:
    return self._stop - self._start

  def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """See Rows."""
    return self._rows.read(self._start + index, rng)


class SeenRows:
  """Rows of pictures, whole, at two sizes: 'image', and 'seen' by CLIP."""

  def __init__(self, rows: Rows, image_size: int, seen_size: int) -> None:
    self._rows, self._image_size, self._seen_size = rows, image_size, seen_size

  def __len__(self) -> int:
    return len(self._rows)

  def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """See Rows."""
    row = self._rows.read(index, rng)
    image = Image.fromarray(row['image'])
    # By area as `PictureConfig` has it for training, and as CLIP's own preprocessing.
    row['image'] = _resize(image, self._image_size, Image.Resampling.BOX)
    row['seen'] = _resize(image, self._seen_size, Image.Resampling.BICUBIC)
    return row


class Stream:
  """Batches on the devices of a mesh, each by the number of updates before it.

  Args:
    pipeline: the rows of this process of them; it ends with the stream.
    batch_size: of all processes together.
    mesh: over whose devices a batch is split.
    prepare: what becomes of a batch there.
  """

  def __init__(
    self,
    pipeline: Pipeline,
    batch_size: int,
    mesh: sharding.Mesh,
    prepare: Callable[[Arrays], Arrays] = lambda batch: batch,
  ) -> None:
    self._pipeline, self._batch_size, self._mesh = pipeline, batch_size, mesh
    self._prepare = prepare
    weakref.finalize(self, pipeline.close)

  def batch(self, step: int) -> Arrays:
    """Arrays [batch_size, ...]; those of the next steps are read meanwhile."""
    rows = _arrays(self._read(step))
    return self._prepare(sharding.place_rows(rows, self._batch_size, self._mesh))

  def examples(self, step: int) -> list[dict[str, Any]]:
    """Ids and captions of those of a batch that this process reads."""
    rows = self._read(step)
    columns = rows['id'], rows['caption']
    return [{'id': one, 'caption': text} for one, text in zip(*columns, strict=True)]

  def _read(self, step: int) -> dict[str, Any]:
    state = self._pipeline.get_state()
    if state['next_batch'] != step:
      self._pipeline.set_state(state | {'next_batch': step})
    return next(self._pipeline)


def open_stream(
  train: TrainConfig,
  stage: str,
  mesh: sharding.Mesh,
  picture: PictureConfig,
  num_held_out: int,
  reads_captions: bool = True,
  sizes: tuple[int, int] | None = None,
  prepare: Callable[[Arrays], Arrays] = lambda batch: batch,
) -> tuple[Stream, Arrays]:
  """The pictures of `train.source` that a run trains on, and the last ones, which are held out.

  Beside the checkpoints of the stage lies the state of its pipeline, and a file with what is broken
  for each process.

  Args:
    train: the options.
    stage: whose checkpoints the run continues from.
    mesh: over whose devices batches are split.
    picture: what becomes of pictures.
    num_held_out: how many.
    reads_captions: whether batches have tokens.
    sizes: of 'image' and 'seen', see `SeenRows`; None has no 'seen'.
    prepare: what becomes of a batch on the devices.

  Returns:
    The stream, whose batches are those of `PictureRows` without strings and with 'seen'; and such a
    batch of numpy arrays with those that are held out, before `prepare`.

  Raises:
    UnclipError: the source has too few examples, cannot be read, or has others than the run that is
      continued.
  """
  source = open_source(train.source)
  tokenizer = train.tokenizer if reads_captions else None
  rows: Rows = PictureRows(source, picture, tokenizer, needs_caption=reads_captions)
  if sizes is not None:
    rows = SeenRows(rows, *sizes)
  about = describe_source(train.source)
  return open_rows(train, stage, mesh, rows, about, num_held_out, prepare)


def open_rows(
  train: TrainConfig,
  stage: str,
  mesh: sharding.Mesh,
  rows: Rows,
  about: str,
  num_held_out: int,
  prepare: Callable[[Arrays], Arrays] = lambda batch: batch,
) -> tuple[Stream, Arrays]:
  """See `open_stream`: of any rows, of which `about` says what they are of."""
  num_trained = len(rows) - num_held_out
  if num_trained < 1:
    raise UnclipError(
      f'{about}: {len(rows)} examples, of which {num_held_out} are held out: take more, at best '
      'thousands'
    )
  if num_trained < num_held_out:
    warnings.warn(
      f'{about}: {num_held_out} of {len(rows)} examples are held out, {num_trained} are trained on',
      stacklevel=2,
    )
  folder = train.run / stage
  pipeline = Pipeline(
    Part(rows, 0, num_trained),
    PipelineConfig(train.batch_size, train.seed),
    batch_rows=sharding.process_rows(train.batch_size, mesh),
    num_workers=train.workers,
    read_ahead=READ_AHEAD,
    broken_file=folder / f'broken_{jax.process_index()}.jsonl',
  )
  if any(path.name.isdecimal() for path in (folder / 'checkpoints').glob('*')):
    pipeline.set_state(_read_state(folder))
  elif jax.process_index() == 0:
    state = pipeline.get_state() | {'source': about}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + '\n')
  last = Part(rows, num_trained, len(rows))
  broken = folder / f'broken_held_out_{jax.process_index()}.jsonl'
  once = PipelineConfig(num_held_out, shuffle=False)
  with Pipeline(last, once, broken_file=broken) as held_out:
    return Stream(pipeline, train.batch_size, mesh, prepare), _arrays(next(held_out))


def _read_state(folder: Path) -> dict[str, Any]:
  try:
    return json.loads((folder / STATE_NAME).read_text())
  except (OSError, ValueError) as error:
    raise UnclipError(
      f'{folder} has checkpoints, but no {STATE_NAME} that can be read: its run was trained on '
      'emoji, or it was lost: take a new --run'
    ) from error


def _arrays(batch: Arrays) -> dict[str, Array]:
  return {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}


def _resize(image: Image.Image, size: int, kernel: Image.Resampling) -> np.ndarray:
  kernel = kernel if size < image.width else Image.Resampling.BICUBIC
  return np.asarray(image.resize((size, size), kernel))
