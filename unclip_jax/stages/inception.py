"""The Inception of FID as a stage: initialise, and features of pictures (Heusel et al. 2017).

Three programs bring pictures to the network's 299 pixels in three ways, and their FIDs differ
(Parmar et al. 2022): each is a `Preparation` here.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.nn.inception import Inception
from unclip_jax.types import Array, Params

SIZE = 299  # pixels a side
DIM = 2048


class Preparation(NamedTuple):
  """How pictures become what the network takes.

  Attributes:
    resize: 'corner', bilinear without antialiasing, the first pixels of both grids in one place, as
      TensorFlow 1 did; 'centre', the same with the grids' middles in one place, as torch does;
      'cubic', antialiased, as Pillow does.
    middle: the level that becomes 0.
    reach: so many levels above it is 1.
  """

  resize: Literal['corner', 'centre', 'cubic']
  middle: float
  reach: float


PREPARATIONS = {
  'torch-fidelity': Preparation('corner', 128.0, 128.0),  # which is TensorFlow's own
  'pytorch-fid': Preparation('centre', 127.5, 127.5),
  'clean-fid': Preparation('cubic', 128.0, 128.0),
}


def init(key: Array, shrink: int = 1) -> Params:
  """Fresh parameters; `shrink` divides the channels."""
  return Inception(shrink).init(key, jnp.zeros((1, SIZE, SIZE, 3)))['params']


def features(params: Params, image_bhwc: Array, preparation: Preparation) -> Array:
  """Features float32 [b, 2048] of pictures uint8 [b, h, w, 3]."""
  return Inception().apply({'params': params}, prepare(image_bhwc, preparation))


def prepare(image_bhwc: Array, preparation: Preparation) -> Array:
  """Pictures uint8 [b, h, w, 3] as float32 [b, 299, 299, 3] around [-1, 1]."""
  x = image_bhwc.astype(jnp.float32)
  b, height, width, c = x.shape
  if preparation.resize == 'cubic':
    x = jax.image.resize(x, (b, SIZE, SIZE, c), 'cubic')
  else:
    is_centred = preparation.resize == 'centre'
    x = jnp.einsum('oh,bhwc->bowc', bilinear_weights(height, SIZE, is_centred), x)
    x = jnp.einsum('ow,bhwc->bhoc', bilinear_weights(width, SIZE, is_centred), x)
  return (x - preparation.middle) / preparation.reach


def bilinear_weights(size_in: int, size_out: int, is_centred: bool) -> np.ndarray:
  """What each pixel of a row counts in each of the resized one: float32 [size_out, size_in]."""
  half = 0.5 if is_centred else 0.0
  place = np.maximum((np.arange(size_out) + half) * (size_in / size_out) - half, 0)
  low = np.minimum(np.floor(place).astype(int), size_in - 1)
  share = place - low
  weights, rows = np.zeros((size_out, size_in)), np.arange(size_out)
  np.add.at(weights, (rows, low), 1 - share)
  np.add.at(weights, (rows, np.minimum(low + 1, size_in - 1)), share)
  return weights.astype(np.float32)
