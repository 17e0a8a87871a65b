"""Embeddings of any captioned pictures, which experiments.embed_dataset has made, for training.

What is stored is read as it is needed, like the pictures of `stream`. Where CLIP's view of captions
is not stored, which is most of what a record takes (states), it is computed of their tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.embed_dataset import digest
from experiments.emoji import common
from experiments.emoji.options import TrainConfig
from experiments.emoji.stream import Arrays, Stream, open_rows
from experiments.source_options import describe_source, open_source
from unclip_jax import sharding
from unclip_jax.data.embeddings import EmbeddingRows
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.data.pipeline import PictureRows, Rows
from unclip_jax.types import Array, UnclipError

MOST_SAMPLED = 16384
ENCODED = 512  # captions at a time
OF_TOKENS = ('states', 'z_t')  # computed where they are not stored


class StoredRows:
  """What a stage reads of embeddings, and the pictures that they are of where those are given.

  A row has `names` as far as they are stored, 'caption' and 'id', and with pictures 'image'.
  """

  def __init__(
    self, stored: EmbeddingRows, names: Sequence[str], pictures: Rows | None = None
  ) -> None:
    self._stored, self._names, self._pictures = stored, names, pictures

  def __len__(self) -> int:
    return len(self._stored)

  def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """See Rows.

    Raises:
      BrokenExample: its picture cannot be used.
      UnclipError: the picture is another one than was embedded.
    """
    record = self._stored[index]
    row = {name: record[name] for name in (*self._names, 'caption', 'id') if name in record}
    if 'states' in row:
      row['states'] = row['states'].astype(jnp.bfloat16)  # as a pool has it, to halve the memory
    if self._pictures is not None:
      shown = self._pictures.read(int(record['index']), rng)
      if shown['id'] != record['id']:
        raise UnclipError(
          f'the embedding of {record["id"]} is number {record["index"]} of its source, which is '
          f'{shown["id"]} in the one given: give that of embed_dataset, or run it again'
        )
      row['image'] = shown['image']
    return row


def open_embeddings(
  train: TrainConfig,
  stage: str,
  mesh: sharding.Mesh,
  num_held_out: int,
  names: Sequence[str] = ('ids', 'mask', 'states', 'z_t', 'z_i'),
  picture: PictureConfig | None = None,
) -> tuple[Stream, dict[str, Array]]:
  """The rows of `--embeddings` that a run trains on, and the last ones, which are held out.

  Args:
    train: the options.
    stage: see `open_rows`.
    mesh: over whose devices batches are split.
    num_held_out: how many.
    names: what a batch has, as `common.encode_pool` gives it.
    picture: what becomes of the pictures of `train.source`, 'image'; None reads none.

  Raises:
    UnclipError: the folder lacks something, has too few rows, or they are of another CLIP than the
      run's or of another source.
  """
  stored = EmbeddingRows(train.embeddings)
  if stored.meta.get('parameters') != digest(common.load_clip(train)):
    raise UnclipError(
      f'--embeddings {train.embeddings}: they are of another CLIP ({stored.meta.get("model")}) '
      f"than the run's: run embed_dataset with --model {train.run}"
    )
  computed = _missing(train, stored, names)
  about, pictures = f'embeddings {train.embeddings}', None
  if picture is not None:
    about = f'{about} of {describe_source(train.source)}'
    pictures = PictureRows(open_source(train.source), picture, needs_caption=False)
    if len(pictures) != stored.meta['num_examples'] or 'index' not in stored[0]:
      raise UnclipError(
        f'{about}: the source has {len(pictures)} examples, {stored.meta["num_examples"]} were '
        'embedded, each with its number: give the source of embed_dataset, or run it again'
      )
  rows = StoredRows(stored, names, pictures)
  prepare = _make_prepare(train, names, computed, mesh)
  stream, held_out = open_rows(train, stage, mesh, rows, about, num_held_out, prepare)
  return stream, _make_prepare(train, names, computed)(held_out)


def sample_embeddings(
  train: TrainConfig, num_held_out: int, names: Sequence[str] = ('z_i',)
) -> dict[str, np.ndarray]:
  """'z_i' and, where it is named, 'z_t' of what is trained on, evenly spaced, for statistics.

  Returns:
    Arrays [n, embed_dim], n at most `MOST_SAMPLED`.
  """
  stored = EmbeddingRows(train.embeddings)
  num_trained = len(stored) - num_held_out
  indices = np.arange(num_trained)
  if num_trained > MOST_SAMPLED:
    indices = np.linspace(0, num_trained - 1, MOST_SAMPLED).astype(np.int64)
  if not _missing(train, stored, names):
    return stored.columns(names, indices)
  encode, z_t = common.make_encoder(train), []
  columns = stored.columns(['z_i', 'ids', 'mask'], indices)
  for start in range(0, len(indices), ENCODED):
    rows = np.arange(start, start + ENCODED).clip(max=len(indices) - 1)  # one shape, one program
    z_t.append(np.asarray(encode(columns['ids'][rows], columns['mask'][rows])['z_t']))
  return {'z_i': columns['z_i'], 'z_t': np.concatenate(z_t)[: len(indices)]}


def _missing(train: TrainConfig, stored: EmbeddingRows, names: Sequence[str]) -> list[str]:
  """Those of `names` that have to be computed of the tokens."""
  there = stored[0] if len(stored) else {}
  missing = [name for name in names if name not in there]
  if lost := [name for name in missing if name not in OF_TOKENS]:
    raise UnclipError(
      f'--embeddings {train.embeddings}: there is no {", ".join(lost)}: run embed_dataset '
      'with tokens'
    )
  return missing


def _make_prepare(
  train: TrainConfig, names: Sequence[str], computed: list[str], mesh: sharding.Mesh | None = None
) -> Callable[[Arrays], dict[str, Array]]:
  """A function that computes what is not stored, of a batch on the devices."""
  encode = common.make_encoder(train, mesh) if computed else None

  def prepare(rows: Arrays) -> dict[str, Array]:
    rows = dict(rows)
    if encode is not None:
      features = encode(rows['ids'], rows['mask'])
      rows |= {name: features[name] for name in computed}
    return {name: jnp.asarray(rows[name]) for name in (*names, 'image') if name in rows}

  return prepare
