"""A folder of pictures with captions: `x.jpg` beside `x.txt`, or a list of file names and captions.

The list is `metadata.jsonl` (an object a line: `file_name`, and `text` or `caption`, as the image
folders of the Hugging Face hub have it), `metadata.csv` or `captions.csv` (a header with the same
names). A file that is listed several times has several captions.
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from etils import epath

from unclip_jax.data.examples import BrokenExample, Example, check_index
from unclip_jax.types import UnclipError

IMAGES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.ppm')
_OTHERS = ('.txt', '.json', '.jsonl', '.csv', '.parquet')  # files, without asking a store
LISTS = ('metadata.jsonl', 'metadata.csv', 'captions.csv')
_NAMES = ('file_name', 'file', 'image')
_TEXTS = ('text', 'caption')


class PictureFolder:
  """The pictures of a folder and of those in it, in the order of their names.

  With a list of captions its pictures are the examples, else all that are found.

  Args:
    folder: `gs://` and the like work.

  Raises:
    UnclipError: there is no such folder, it holds no pictures, or its list is damaged.
  """

  def __init__(self, folder: os.PathLike[str] | str) -> None:
    self._folder = epath.Path(folder).expanduser()
    if not self._folder.is_dir():
      raise UnclipError(f'there is no folder {self._folder}: check the path')
    lists = [path for path in (self._folder / name for name in LISTS) if path.exists()]
    self._captions: dict[str, tuple[str, ...]] | None = _read_list(lists[0]) if lists else None
    self._names = sorted(_find(self._folder) if self._captions is None else self._captions)
    if not self._names:
      where = lists[0] if lists else self._folder
      raise UnclipError(f'{where} has no pictures: give a folder of {", ".join(IMAGES[:4])}, ...')

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Example:
    check_index(index, len(self))
    name = self._names[index]
    path = self._folder / name
    try:
      image = path.read_bytes()
      if self._captions is not None:
        return Example(image, self._captions[name], name)
      text = path.with_suffix('.txt')
      caption = text.read_text(encoding='utf-8').strip() if text.exists() else ''
    except OSError as error:
      if not self._folder.is_dir():
        raise UnclipError(f'the folder {self._folder} is gone: see that it is there') from error
      raise BrokenExample(name, f'cannot be read: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
      raise BrokenExample(name, f'its caption is not UTF-8 text: {error.reason}') from error
    return Example(image, (caption,) if caption else (), name)


def _find(folder: epath.Path, inside: str = '') -> Iterator[str]:
  """The names of all pictures relative to a folder."""
  for path in (folder / inside).iterdir():
    name = f'{inside}/{path.name}' if inside else path.name
    if path.name.startswith('.'):
      continue
    if path.suffix.lower() in IMAGES:
      yield name
    elif path.suffix.lower() not in _OTHERS and path.is_dir():
      yield from _find(folder, name)


def _read_list(path: epath.Path) -> dict[str, tuple[str, ...]]:
  """The captions by the names of their files."""
  try:
    text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise UnclipError(f'{path} is not UTF-8 text ({error.reason}): write it anew') from error
  except OSError as error:
    raise UnclipError(f'{path} cannot be read ({error.strerror or error})') from error
  captions: dict[str, list[str]] = {}
  for number, fields in _rows(path, text):
    where = f'line {number} of {path}'
    name, caption = _first(fields, _NAMES), _first(fields, _TEXTS)
    if not isinstance(name, str) or not name:
      raise UnclipError(f'{where} names no file: give it as {_NAMES[0]!r}')
    if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts:
      raise UnclipError(f'{where} names {name!r}: only files inside of the folder are read')
    if caption is not None and not isinstance(caption, str):
      raise UnclipError(f'{where} has {caption!r} for a caption: give text')
    captions.setdefault(name, []).extend([caption.strip()] if caption and caption.strip() else [])
  return {name: tuple(texts) for name, texts in captions.items()}


def _rows(path: epath.Path, text: str) -> Iterator[tuple[int, dict]]:
  """The number of each line and its fields."""
  if path.suffix == '.csv':
    # A byte order mark, as spreadsheets write it, would be part of the first name.
    reader = csv.DictReader(io.StringIO(text.removeprefix('\ufeff'), newline=''))
    names = reader.fieldnames or ()
    if not set(_NAMES) & set(names) or not set(_TEXTS) & set(names):
      raise UnclipError(
        f'{path} begins with {", ".join(map(str, names)) or "nothing"}: give the header '
        f'{_NAMES[0]},{_TEXTS[0]}'
      )
    for fields in reader:
      yield reader.line_num, fields
    return
  # Not splitlines: captions may hold other separators of lines than this.
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UnclipError(f'line {number} of {path} is not JSON ({error}): write it anew') from error
    if not isinstance(fields, dict):
      raise UnclipError(f'line {number} of {path} is no JSON object: write it anew')
    yield number, fields


def _first(fields: dict, names: tuple[str, ...]) -> object:
  """The value of the first of some names that is there."""
  return next((fields[name] for name in names if fields.get(name) is not None), None)
