"""Embeddings of any captioned pictures, which experiments.embed_dataset has made, for training."""

import jax
import jax.numpy as jnp

from experiments.embed_dataset import digest
from experiments.emoji.common import load_clip
from experiments.emoji.options import TrainConfig
from unclip_jax.data.embeddings import EmbeddingRows
from unclip_jax.types import Array, UnclipError

NAMES = ('ids', 'mask', 'states', 'z_t', 'z_i')


def read_embeddings(
  train: TrainConfig, num_held_out: int
) -> tuple[dict[str, Array], dict[str, Array]]:
  """What `common.encode_pool` gives, of `--embeddings`: all but the last rows, and these.

  Raises:
    UnclipError: the folder lacks something, has too few rows, or they are of another CLIP than the
      run's.
  """
  rows = EmbeddingRows(train.embeddings)
  if rows.meta.get('parameters') != digest(load_clip(train)):
    raise UnclipError(
      f'--embeddings {train.embeddings}: they are of another CLIP ({rows.meta.get("model")}) than '
      f"the run's: run embed_dataset with --model {train.run}"
    )
  if len(rows) <= num_held_out:
    raise UnclipError(
      f'--embeddings {train.embeddings}: {len(rows)} examples, of which {num_held_out} are held '
      'out: take more'
    )
  columns = jax.tree.map(jnp.asarray, rows.columns(NAMES))
  columns['states'] = columns['states'].astype(jnp.bfloat16)  # to halve the memory
  first = {name: column[:-num_held_out] for name, column in columns.items()}
  return first, {name: column[-num_held_out:] for name, column in columns.items()}
