"""Pictures in files: PNGs that carry their own description, grids, sheets, names of prompts."""

import math
import os
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from unclip_jax.data.pictures import open_rgb
from unclip_jax.types import UnclipError
from unclip_jax.weights.safetensors import reach, write_atomically

GRID_GAP = 4  # pixels
_MAX_SLUG_BYTES = 80
_LEAST_ON_SHEET = 64  # pixels; smaller pictures are enlarged
_FONT_SIZE = 12
_LINE = 16  # pixels


def save_png(
  path: os.PathLike[str] | str, image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
  """Writes a picture, whole or not at all. The same picture and text give the same bytes.

  Args:
    path: the file, replaced if it is there; `gs://` and the like work.
    image: uint8 [h, w, 3].
    text: goes into text chunks of the file, name by name.

  Raises:
    UnclipError: the file cannot be written, a full disk for instance.
    ValueError: the image is of another shape or type.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f'a picture is uint8 [h, w, 3], not {image.dtype}{list(image.shape)}')
  chunks = PngImagePlugin.PngInfo()
  for name, value in (text or {}).items():
    # iTXt holds any Unicode, tEXt only Latin-1, in which some readers expect it.
    add = chunks.add_text if value.isascii() else chunks.add_itxt
    add(name, value)

  def write(part: Path) -> None:
    Image.fromarray(image).save(part, format='PNG', pnginfo=chunks)

  write_atomically(epath.Path(path), write)


def read_text(path: os.PathLike[str] | str) -> dict[str, str]:
  """The text that `save_png` put into a file."""
  with Image.open(path) as picture:
    picture.load()
    return {name: str(value) for name, value in picture.text.items()}


def read_picture(path: os.PathLike[str] | str) -> np.ndarray:
  """A picture of any mode as uint8 [h, w, 3]: turned as its EXIF says, transparency on white.

  Of an animation it is the first frame.

  Raises:
    UnclipError: the file is missing, is no picture, or is larger than Pillow takes for safe.
  """
  return _read(path, 'white')


def read_mask(path: os.PathLike[str] | str) -> np.ndarray:
  """A picture of any mode as bool [h, w], true where it is white; what is transparent is not.

  Raises:
    UnclipError: as of `read_picture`.
  """
  return _read(path, 'black').mean(axis=-1) > 127


def _read(path: os.PathLike[str] | str, ground: str) -> np.ndarray:
  path = reach(path)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      with path.open('rb') as file:
        return np.asarray(open_rgb(file, ground=ground))
  except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
    raise UnclipError(
      f'{path} has more pixels than Pillow takes for safe: make it smaller'
    ) from error
  except FileNotFoundError as error:
    raise UnclipError(f'there is no picture {path}: check the path') from error
  except (OSError, SyntaxError, ValueError) as error:
    raise UnclipError(f'{path} is not a picture that can be read: {error}') from error


def make_grid(images: np.ndarray, num_columns: int) -> np.ndarray:
  """Pictures side by side on white, row by row.

  Args:
    images: uint8 [n, h, w, 3].
    num_columns: pictures in a row; the last row may have fewer.

  Returns:
    uint8 [height, width, 3].
  """
  n, h, w, c = images.shape
  num_rows = -(-n // num_columns)
  step_y, step_x = h + GRID_GAP, w + GRID_GAP
  grid = np.full((num_rows * step_y + GRID_GAP, num_columns * step_x + GRID_GAP, c), 255, np.uint8)
  for i, image in enumerate(images):
    y, x = GRID_GAP + i // num_columns * step_y, GRID_GAP + i % num_columns * step_x
    grid[y : y + h, x : x + w] = image
  return grid


def make_sheet(images: np.ndarray, labels: Sequence[str], title: str) -> np.ndarray:
  """Groups of pictures with a label under each, on white, about as wide as high.

  Args:
    images: uint8 [n, k, h, w, 3], n groups of k pictures that stand side by side. Small ones are
      enlarged, each pixel to a square.
    labels: n texts.
    title: the first line.

  Returns:
    uint8 [height, width, 3].
  """
  n, k, h, w, c = images.shape
  scale = -(-_LEAST_ON_SHEET // h)
  h, w = h * scale, w * scale
  images = images.repeat(scale, axis=2).repeat(scale, axis=3)
  # Pictures of a group as one.
  groups = images.transpose(0, 2, 1, 3, 4).reshape(n, h, k * w, c)
  font = ImageFont.load_default(_FONT_SIZE)
  widest = max(math.ceil(font.getlength(label)) for label in labels)
  step_x = max(k * w, widest) + 3 * GRID_GAP
  step_y = h + _LINE + 2 * GRID_GAP
  num_columns = min(n, math.ceil(math.sqrt(n * step_y / step_x)))
  width = max(num_columns * step_x, math.ceil(font.getlength(title))) + 2 * GRID_GAP
  height = -(-n // num_columns) * step_y + _LINE + 2 * GRID_GAP
  sheet = Image.new('RGB', (width, height), 'white')
  draw = ImageDraw.Draw(sheet)
  draw.text((GRID_GAP, GRID_GAP), title, 'black', font)
  for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
    x = GRID_GAP + i % num_columns * step_x
    y = GRID_GAP + _LINE + GRID_GAP + i // num_columns * step_y
    sheet.paste(Image.fromarray(group), (x, y))
    draw.text((x, y + h), label, 'black', font)
  return np.asarray(sheet)


def slug(prompt: str) -> str:
  """A file name for a prompt, without suffix: its letters and digits, the rest as dashes."""
  words = unicodedata.normalize('NFC', prompt).lower()
  name = re.sub(r'[^\w]+', '-', words).strip('-_')
  name = name.encode(errors='ignore')[:_MAX_SLUG_BYTES].decode(errors='ignore').strip('-_')
  return name or 'image'


def slugs(prompts: Sequence[str]) -> list[str]:
  """A file name for each prompt, without suffix; prompts that would share one are numbered."""
  names: list[str] = []
  for prompt in prompts:
    name = slug(prompt)
    number, unique = 2, name
    while unique in names:
      number, unique = number + 1, f'{name}-{number}'
    names.append(unique)
  return names


class OutputFolder:
  """A folder that pictures go to, known to be writable before anything is drawn.

  A context manager: folders that it made are removed again if nothing came to be in them.

  Args:
    folder: made if missing; `gs://` and the like work.

  Attributes:
    paths: the files that are complete, in their order.

  Raises:
    UnclipError: on entering, it cannot be written.
  """

  def __init__(self, folder: os.PathLike[str] | str) -> None:
    if not os.fspath(folder):
      raise UnclipError("the output folder has no name: give one, or '.' for the current folder")
    self._folder = reach(folder)
    self._made: list[Path] = []
    self.paths: list[epath.Path] = []

  def __enter__(self) -> Self:
    if '://' in str(self._folder):
      return self
    folder = Path(self._folder)
    try:
      missing = [path for path in (folder, *folder.parents) if not path.exists()]
      for path in reversed(missing):
        path.mkdir(exist_ok=True)
        self._made.append(path)
      with tempfile.TemporaryFile(dir=folder):
        pass
    except OSError as error:
      self._remove_empty()
      raise UnclipError(
        f'cannot write to the folder {folder} ({error.strerror or error}): choose another one'
      ) from error
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if not self.paths:
      self._remove_empty()

  def save(self, name: str, image: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes a picture into the folder; as `save_png`."""
    path = self._folder / name
    save_png(path, image, text)
    self.paths.append(path)

  def save_text(self, name: str, text: str) -> None:
    """Writes a text into the folder, whole or not at all."""
    path = self._folder / name
    write_atomically(path, lambda part: part.write_text(text, 'utf-8'))
    self.paths.append(path)

  def _remove_empty(self) -> None:
    for path in reversed(self._made):
      if any(path.iterdir()):
        break
      path.rmdir()
