"""Folders of pictures for evaluations: decoded whole, brought to one size, with their captions.

Unlike in training nothing is replaced or cropped at random, and what cannot be read is an error: a
figure is of all pictures of a folder.
"""

import collections
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from unclip_jax.data.examples import BrokenExample, Example, Source
from unclip_jax.data.pictures import PictureConfig, make_picture, open_rgb
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import UnclipError

_READ_AHEAD = 64  # pictures
_MOST_THREADS = 8
_SEEN_AT_ONCE = 32  # pictures, by a CLIP


class Pictured(NamedTuple):
  """A picture of a set.

  Attributes:
    index: within its source.
    id: its name there.
    image: uint8 [size, size, 3].
    captions: what is said of it; where nothing else does, what `unclip-jax generate` wrote into it.
  """

  index: int
  id: str
  image: np.ndarray
  captions: tuple[str, ...]


def first_size(source: Source) -> int:
  """The shorter side of a source's first picture, in pixels.

  Raises:
    UnclipError: it cannot be read, or there is none.
  """
  for index in range(len(source)):
    example = _example(source, index)
    if example is not None:
      return min(_decode(example.image, example.id).shape[:2])
  raise UnclipError('there are no pictures to evaluate: give a folder that has some')


def batches(pictures: Iterable[Pictured], size: int) -> Iterator[tuple[list[Pictured], np.ndarray]]:
  """Pictures in groups, and their images uint8 [size, h, w, 3]: one shape for one program.

  Where there are fewer than `size`, the last of a group is repeated.
  """
  pictures = iter(pictures)
  while batch := list(itertools.islice(pictures, size)):
    images = [picture.image for picture in batch]
    yield batch, np.stack(images + [images[-1]] * (size - len(batch)))


def read_pictures(
  source: Source, size: int, kernel: str, enlarge: bool = False
) -> Iterator[Pictured]:
  """All pictures in their order; the grids that `unclip-jax generate` makes are left out.

  Args:
    source: of the pictures.
    size: the shorter side is reduced to it, and the middle cut out.
    kernel: of the reduction, as `PictureConfig` has it.
    enlarge: whether smaller pictures are enlarged.

  Raises:
    UnclipError: a picture cannot be read, or has fewer pixels and is not enlarged; names it.
  """
  config = PictureConfig(size, kernel=kernel)
  threads = min(_MOST_THREADS, os.cpu_count() or 1)
  waiting: collections.deque[Future[Pictured | None]] = collections.deque()
  with ThreadPoolExecutor(threads) as pool:
    try:
      for index in range(len(source) + _READ_AHEAD):
        if index < len(source):
          waiting.append(pool.submit(_read, source, index, config, enlarge))
        if waiting and index >= _READ_AHEAD:
          picture = waiting.popleft().result()
          if picture is not None:
            yield picture
    finally:
      for future in waiting:
        future.cancel()


def clip_batches(model: Unclip, source: Source) -> Iterator[np.ndarray]:
  """All pictures of a source as a model's CLIP looks at them, uint8 [b, size, size, 3] each.

  Raises:
    UnclipError: the model has no CLIP, or as `read_pictures`.
  """
  model.check_has('clip')
  vision = model.config.clip.vision
  # Without an image tower any size will do to be told so.
  size = 1 if vision is None else vision.image_size
  pictures = read_pictures(source, size, 'bicubic', enlarge=True)
  for batch, images in batches(pictures, _SEEN_AT_ONCE):
    yield images[: len(batch)]


def _example(source: Source, index: int) -> Example | None:
  """One of a source, with the caption that it carries; None of a grid of generated pictures."""
  try:
    example = source[index]
  except BrokenExample as error:
    raise UnclipError(f'{error}: see to it, or remove it') from error
  text = {} if isinstance(example.image, np.ndarray) else _text(example.image)
  if not text.get('Software', '').startswith('unclip_jax'):
    return example
  if 'index' not in text:
    return None
  said = (text['prompt'],) if text.get('prompt', '').strip() else ()
  return example._replace(captions=example.captions or said)


def _read(source: Source, index: int, config: PictureConfig, enlarge: bool) -> Pictured | None:
  example = _example(source, index)
  if example is None:
    return None
  pixels = _decode(example.image, example.id)
  image = fit(pixels, example.id, config, enlarge)
  return Pictured(index, example.id, image, example.captions)


def fit(pixels: np.ndarray, name: str, config: PictureConfig, enlarge: bool = False) -> np.ndarray:
  """A picture uint8 [h, w, 3] at the size of a config.

  Raises:
    UnclipError: it is smaller, and not to be enlarged.
  """
  height, width = pixels.shape[:2]
  if min(height, width) < config.size and not enlarge:
    raise UnclipError(
      f'{name} has {width}x{height} pixels, and pictures are compared at {config.size}: take '
      f'--resolution {min(height, width)} or less'
    )
  return make_picture(pixels, name, config, np.random.default_rng(0)).image


def _decode(content: bytes | np.ndarray, name: str) -> np.ndarray:
  """uint8 [h, w, 3], at full size: a JPEG that is reduced while it is decoded looks different."""
  if isinstance(content, np.ndarray):
    return np.broadcast_to(content, (*content.shape[:2], 3))
  try:
    return np.asarray(open_rgb(io.BytesIO(content)))
  except Exception as error:  # of as many types as there are formats
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'{name} is not a picture that can be read ({reason}): see to it, or remove it'
    ) from error


def _text(content: bytes) -> dict[str, str]:
  """What is written into a picture file; nothing where it is damaged, which decoding finds."""
  try:
    with Image.open(io.BytesIO(content)) as image:
      return {name: value for name, value in image.info.items() if isinstance(value, str)}
  except Exception:  # of as many types as there are formats
    return {}
