"""What the page takes of people: pictures, masks, words. All else is refused, with a clear line.

Pictures are looked at before they are decoded, and brought to one size afterwards: each other size
would be another program.
"""

import os
import warnings
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from unclip_jax.data.pictures import PictureConfig, make_picture, open_rgb
from unclip_jax.types import UnclipError

MOST_BYTES = 10 * 2**20  # of a file
MOST_PIXELS = 2**24
MOST_CHARACTERS = 400  # of a prompt
# What people have. Others of Pillow's formats start programs, or are old code that few look at.
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
_MOST_LAYERS = 4
_OPAQUE = 128  # of 255: what a brush covers at least half


class Drawing(NamedTuple):
  """A picture that was painted on, as a browser hands it over.

  Attributes:
    background: the file of the picture; None where there is none.
    layers: files of what was painted on it, transparent where nothing was.
  """

  background: str | None
  layers: tuple[str, ...]


def read_picture(
  path: os.PathLike[str] | str | None, side: int, what: str = 'picture'
) -> np.ndarray:
  """The middle square of a picture file.

  Args:
    path: of the file; None where none was given.
    side: in pixels.
    what: it is to people, for the errors.

  Returns:
    uint8 [side, side, 3].

  Raises:
    UnclipError: there is none, or it is no picture, damaged, or too large; it is not decoded then.
  """
  with _open(path, what) as file:
    return _read(file, side, what)


def read_drawing(drawing: Drawing | None, side: int) -> tuple[np.ndarray, np.ndarray]:
  """The middle squares of a picture, uint8 [side, side, 3], and of what was painted on it, bool.

  Raises:
    UnclipError: as `read_picture`, of one of the files; nothing was painted, or not on the picture.
  """
  if drawing is None or drawing.background is None:
    raise UnclipError('there is no picture: put one in, and paint on it')
  if len(drawing.layers) > _MOST_LAYERS:
    raise UnclipError(f'the picture has {len(drawing.layers)} layers: take at most {_MOST_LAYERS}')
  with _open(drawing.background, 'picture') as file:
    size = _check_header(file, 'picture')
    picture = _read(file, side, 'picture')
  is_painted = np.zeros((side, side), bool)
  for path in drawing.layers:
    with _open(path, 'painted layer') as file:
      if _check_header(file, 'painted layer') != size:
        raise UnclipError('what was painted is not of the size of the picture: paint it again')
      is_painted |= _opaque(file, side)
  if not is_painted.any():
    raise UnclipError(
      'nothing is painted in the middle square of the picture: paint over what is to be drawn anew'
    )
  return picture, is_painted


def choice(value: object, choices: Sequence[Any], what: str) -> Any:
  """The one of a few, each a program of its own, that `value` is.

  Raises:
    UnclipError: it is none.
  """
  for one in choices:
    if one == value:
      return one
  raise UnclipError(f'{what} cannot be {value!r}: take one of {", ".join(map(str, choices))}')


def caption(text: object, what: str = 'the prompt') -> str:
  """A caption of one line, without white space at its ends.

  Raises:
    UnclipError: it is no text, or longer than any that a model reads.
  """
  if not isinstance(text, str):
    raise UnclipError(f'{what} must be text')
  if len(text) > MOST_CHARACTERS:
    raise UnclipError(
      f'{what} has {len(text):,} characters: take at most {MOST_CHARACTERS}, a model reads no more'
    )
  return ' '.join(text.split())


def _open(path: os.PathLike[str] | str | None, what: str) -> IO[bytes]:
  if path is None:
    raise UnclipError(f'there is no {what}: put one in')
  if not os.path.isfile(path):
    raise UnclipError(f'the {what} is no longer kept here: put it in again')
  if os.path.getsize(path) > MOST_BYTES:
    raise UnclipError(f'the {what} is larger than {MOST_BYTES // 2**20} MB: take a smaller file')
  return open(path, 'rb')


def _read(file: IO[bytes], side: int, what: str) -> np.ndarray:
  _check_header(file, what)
  file.seek(0)
  try:
    with warnings.catch_warnings():
      # Of odd metadata and the like, in which nobody is interested.
      warnings.simplefilter('ignore')
      image = open_rgb(file, side, FORMATS)  # as what its header was read
  except Exception as error:  # of as many types as there are formats
    raise UnclipError(f'the {what} is damaged: save it anew, or take another one') from error
  draw = np.random.default_rng(0)  # nothing is random of a crop in the middle
  return make_picture(np.asarray(image), what, PictureConfig(side), draw).image


def _check_header(file: IO[bytes], what: str) -> tuple[int, int]:
  """Width and height of a picture of which no pixel has been decoded."""
  file.seek(0)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      width, height = Image.open(file, formats=FORMATS).size
  except Image.DecompressionBombError as error:
    raise _too_large(what) from error
  except UnidentifiedImageError as error:
    raise UnclipError(
      f'the {what} is no file that is read here: take PNG, JPEG, WebP, GIF, BMP or TIFF'
    ) from error
  except Exception as error:  # of as many types as there are formats
    raise UnclipError(f'the {what} is damaged: save it anew, or take another one') from error
  if width * height > MOST_PIXELS:
    raise _too_large(what)
  return width, height


def _too_large(what: str) -> UnclipError:
  return UnclipError(
    f'the {what} has more than {MOST_PIXELS / 1e6:.1f} million pixels: make it smaller'
  )


def _opaque(file: IO[bytes], side: int) -> np.ndarray:
  """The middle square of where a picture is opaque, bool [side, side]."""
  file.seek(0)
  try:
    alpha = Image.open(file, formats=FORMATS).convert('RGBA').getchannel('A')
  except Exception as error:  # of as many types as there are formats
    raise UnclipError('what was painted is damaged: paint it again') from error
  levels = np.asarray(alpha)[..., None]
  square = make_picture(levels, 'mask', PictureConfig(side), np.random.default_rng(0)).image
  return square[..., 0] >= _OPAQUE
