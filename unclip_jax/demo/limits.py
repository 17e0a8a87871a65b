"""What the page takes of people: pictures, masks, words. All else is refused, with a clear line.

Pictures are looked at before they are decoded, and brought to one size afterwards: each other size
would be another program.
"""

import io
import os
import threading
import warnings
from collections import OrderedDict
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
_MOST_DRAWINGS = 16
_MOST_LAYERS = 4
_OPAQUE = 128  # of 255: what a brush covers at least half


class Drawing(NamedTuple):
  """A picture that was painted on, as a browser hands it over.

  Attributes:
    background: the file of the picture; None where there is none.
    layers: files of what was painted on it, transparent where nothing was.
  """

  background: bytes | None
  layers: tuple[bytes, ...]


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
  if path is None:
    raise UnclipError(f'there is no {what}: put one in')
  if os.path.getsize(path) > MOST_BYTES:
    raise UnclipError(f'the {what} is larger than {MOST_BYTES // 2**20} MB: take a smaller file')
  with open(path, 'rb') as file:
    return _read(file, side, what)


def read_drawing(drawing: Drawing | None, side: int) -> tuple[np.ndarray, np.ndarray]:
  """The middle squares of a picture, uint8 [side, side, 3], and of what was painted on it, bool.

  Raises:
    UnclipError: as `read_picture`, of one of the files; nothing was painted, or not on the picture.
  """
  if drawing is None or drawing.background is None:
    raise UnclipError('there is no picture: put one in, and paint on it')
  for content in (drawing.background, *drawing.layers):
    if len(content) > MOST_BYTES:
      raise UnclipError(f'the picture is larger than {MOST_BYTES // 2**20} MB: take a smaller one')
  picture = _read(io.BytesIO(drawing.background), side, 'picture')
  size = _check_header(io.BytesIO(drawing.background), 'picture')
  is_painted = np.zeros((side, side), bool)
  for content in drawing.layers:
    if _check_header(io.BytesIO(content), 'painted layer') != size:
      raise UnclipError('what was painted is not of the size of the picture: paint it again')
    is_painted |= _opaque(io.BytesIO(content), side)
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


class Drawings:
  """What browsers have handed over of drawings that are not yet asked for: a few, the last ones.

  Gradio's own store grows with each, and with each number of a layer that somebody makes up.
  """

  def __init__(self) -> None:
    self._parts: OrderedDict[str, dict[str, bytes]] = OrderedDict()
    self._lock = threading.Lock()

  def put(self, name: object, kind: object, index: object, content: object) -> None:
    """Keeps a part.

    Args:
      name: of the drawing, which the browser makes up.
      kind: 'background', 'layer', or 'composite', which is not kept.
      index: of a layer.
      content: the file.

    Raises:
      UnclipError: it is none of these, or too large.
    """
    is_layer = kind == 'layer' and str(index) in map(str, range(_MOST_LAYERS))
    if not isinstance(name, str) or len(name) > 64 or not isinstance(content, bytes):
      raise UnclipError('this is no part of a drawing')
    if len(content) > MOST_BYTES:
      raise UnclipError(f'a part of the drawing is larger than {MOST_BYTES // 2**20} MB')
    if kind == 'composite':
      return
    if kind != 'background' and not is_layer:
      raise UnclipError(f'a drawing has a background and at most {_MOST_LAYERS} layers')
    with self._lock:
      parts = self._parts.setdefault(name, {})
      self._parts.move_to_end(name)
      parts['background' if kind == 'background' else f'layer {index}'] = content
      while len(self._parts) > _MOST_DRAWINGS:
        self._parts.popitem(last=False)

  def take(self, name: object) -> Drawing | None:
    """A drawing, which is gone then; None where there is none of that name, or no longer."""
    with self._lock:
      parts = self._parts.pop(name, None) if isinstance(name, str) else None
    if parts is None:
      return None
    background = parts.pop('background', None)
    return Drawing(background, tuple(parts[name] for name in sorted(parts)))

  def __len__(self) -> int:
    return len(self._parts)


def _read(file: IO[bytes], side: int, what: str) -> np.ndarray:
  _check_header(file, what)
  file.seek(0)
  try:
    with warnings.catch_warnings():
      # Of odd metadata and the like, in which nobody is interested.
      warnings.simplefilter('ignore')
      image = open_rgb(file, side)
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
    f'the {what} has more than {MOST_PIXELS / 1e6:.0f} million pixels: make it smaller'
  )


def _opaque(file: IO[bytes], side: int) -> np.ndarray:
  """The middle square of where a picture is opaque, bool [side, side]."""
  try:
    alpha = Image.open(file, formats=FORMATS).convert('RGBA').getchannel('A')
  except Exception as error:  # of as many types as there are formats
    raise UnclipError('what was painted is damaged: paint it again') from error
  levels = np.asarray(alpha)[..., None]
  square = make_picture(levels, 'mask', PictureConfig(side), np.random.default_rng(0)).image
  return square[..., 0] >= _OPAQUE
