"""Pictures of any number of prompts, of which one batch at a time is in memory.

A batch is filled with images of consecutive prompts, and the last one is filled up: one program of
each stage serves the whole series, whatever prompts have how many images. As the program is the
same wherever a series begins, so are the pictures, to the bit.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from unclip_jax.systems.samples import Samples, first_rows
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import Array, Params

_AS_THE_MODEL = Sampling()
_SMALL = 4096  # elements of a parameter
_MANY = 2**20  # images, more than any batch


class Item(NamedTuple):
  """An image of a series.

  Attributes:
    prompt: its caption.
    seed: 0 to 2^32 - 1.
    index: of the image within its seed.
    name: for the caller to know it by.
  """

  prompt: str
  seed: int = 0
  index: int = 0
  name: str = ''


def sample_series(
  model: Unclip,
  items: Iterable[Item],
  *,
  negative_prompt: str | None = None,
  prior: Sampling = _AS_THE_MODEL,
  decoder: Sampling = _AS_THE_MODEL,
  upsampler: Sampling = _AS_THE_MODEL,
  num_candidates: int | None = None,
  size: int | None = None,
  noise_level: int | None = None,
  tile: int | None = None,
  batch_size: int | None = None,
) -> Iterator[tuple[list[Item], Samples]]:
  """Draws images as they are asked for, a batch at a time.

  Args:
    model: as `load` opens it.
    items: the images, taken a batch at a time.
    negative_prompt: as all that follow, as `Unclip.sample` describes it.
    prior: how the prior is sampled.
    decoder: how the decoder is.
    upsampler: how all upsamplers are.
    num_candidates: of the prior.
    size: in pixels.
    noise_level: of Stable unCLIP.
    tile: of an autoencoder.
    batch_size: how many images go through a stage together; over several devices rounded up. None
      takes 4 on a CPU, else 16. Another size gives the same pictures but for rounding.

  Yields:
    The images of a batch and what was drawn, in the same order.

  Raises:
    UnclipError: as `Unclip.sample`, once the batch with the culprit is asked for.
  """
  rest = iter(items)
  b = model.batch_size(_MANY, batch_size)
  while batch := list(itertools.islice(rest, b)):
    filled = batch + [batch[-1]] * (b - len(batch))
    samples = model.sample(
      [item.prompt for item in filled],
      [item.seed for item in filled],
      first_image=[item.index for item in filled],
      negative_prompt=negative_prompt,
      prior=prior,
      decoder=decoder,
      upsampler=upsampler,
      num_candidates=num_candidates,
      size=size,
      noise_level=noise_level,
      tile=tile,
      batch_size=b,
    )
    yield batch, first_rows(samples, len(batch))


def fingerprint(model: Unclip) -> str:
  """What tells a model from another one, and from itself trained on: as `digest_of`."""
  return digest_of(model.params)


def digest_of(stages: Mapping[str, Params]) -> str:
  """What tells the parameters of stages from others, hexadecimal.

  A digest of those that are small, and of some numbers of each that is large: neither an update of
  the optimiser nor adapters leave them as they were. Nothing is compiled for it.
  """
  digest = hashlib.sha256()
  for stage in sorted(stages):
    for array in map(_some, jax.tree.leaves(stages[stage])):
      digest.update(f'{stage} {array.dtype} {array.shape} '.encode() + array.tobytes())
  return digest.hexdigest()


def _some(leaf: Array | np.ndarray) -> np.ndarray:
  if isinstance(leaf, jax.Array):
    # An array keeps the copy that numpy is given, so this is given to one of the same memory.
    shards = [shard.data for shard in leaf.addressable_shards]
    leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
  array = np.asarray(leaf)
  return array if array.size <= _SMALL else array.reshape(-1)[:: array.size // _SMALL]
