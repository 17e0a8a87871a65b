"""Files of prompts: UTF-8, a prompt a line, or (.jsonl) a JSON object a line.

    {"prompt": "a red fox", "name": "fox", "seed": 7, "num_images": 4}

All but the prompt may be left out. A file is read line by line, and never held.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from unclip_jax.systems import settings
from unclip_jax.types import UnclipError
from unclip_jax.weights.safetensors import reach

_JSON_LINES = ('.jsonl', '.ndjson')
_KEYS = ('prompt', 'name', 'seed', 'num_images')
_MOST_BYTES = 2**20  # of a line: more is no prompt, and would be held at once


class Line(NamedTuple):
  """A line of a file of prompts.

  Attributes:
    number: of the line, from 1.
    prompt: the caption.
    name: what its pictures are to be called, if not like the prompt.
    seed: of its pictures, if not that of the others.
    num_images: how many, if not as of the others.
  """

  number: int
  prompt: str
  name: str | None = None
  seed: int | None = None
  num_images: int | None = None


class Scan(NamedTuple):
  """What is known of a file of prompts that was read once.

  Attributes:
    num_prompts: lines with a prompt.
    num_blank: lines without.
    num_images: pictures of all prompts.
    most_images: pictures of the prompt that has most.
    last_line: number of the last line with a prompt.
    digest: SHA-256 of its bytes, hexadecimal.
    state: what changes when it is written to; None of a file of a store.
  """

  num_prompts: int
  num_blank: int
  num_images: int
  most_images: int
  last_line: int
  digest: str
  state: tuple[int, int] | None = None


def read_lines(
  path: os.PathLike[str] | str, state: tuple[int, int] | None = None
) -> Iterator[Line]:
  """The lines that hold a prompt, in their order.

  Args:
    path: the file.
    state: of its `Scan`, to be held to; None to take it as it is.

  Raises:
    UnclipError: the file cannot be read, or has changed since its scan; or a line cannot be used:
      names the line, and the byte where it is not UTF-8.
  """
  is_json = _is_json(path)
  for number, raw in enumerate(_raw_lines(path), 1):
    if state is not None and _state(path) != state:
      raise UnclipError(
        f'{os.fspath(path)} has changed since it was read first: what is drawn by now is of what '
        'it was; put that back to go on, or choose another --out'
      )
    what = f'line {number} of {os.fspath(path)}'
    text = _decode(raw, what, is_first=number == 1)
    if text.strip():
      yield _parse(text, what, number) if is_json else _line(number, text.strip(' '), what)


def scan(path: os.PathLike[str] | str, num_images: int, first_image: int = 0) -> Scan:
  """Reads a file once, to find mistakes in it before anything is drawn.

  Args:
    path: the file.
    num_images: pictures of a prompt that does not say.
    first_image: the index of each prompt's first picture.

  Raises:
    UnclipError: as `read_lines`; or there is no prompt in it.
  """
  num_images = settings.check_count('the number of images', num_images)
  if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
    raise UnclipError(
      f'{os.fspath(path)} can be read only once, and prompts are read as they are drawn: write '
      'them to a file'
    )
  state = _state(path)
  num_prompts, total, most, last_line = 0, 0, 0, 0
  for line in read_lines(path):
    wanted = num_images if line.num_images is None else line.num_images
    where = '' if line.num_images is None else f' of line {line.number} of {os.fspath(path)}'
    settings.check_last(first_image + wanted - 1, where)
    num_prompts, total = num_prompts + 1, total + wanted
    most, last_line = max(most, wanted), line.number
  digest, num_lines = hashlib.sha256(), 0
  for raw in _raw_lines(path):
    digest.update(raw)
    num_lines += 1
  if num_prompts == 0:
    lines = f'only {num_lines} empty lines' if num_lines else 'nothing'
    raise UnclipError(f'there is no prompt in {os.fspath(path)}, {lines}: give a prompt a line')
  num_blank = num_lines - num_prompts
  return Scan(num_prompts, num_blank, total, most, last_line, digest.hexdigest(), state)


def _state(path: os.PathLike[str] | str) -> tuple[int, int] | None:
  try:
    found = os.stat(path)
  except OSError:  # of a store, or gone: to open it says so
    return None
  return found.st_size, found.st_mtime_ns


def _raw_lines(path: os.PathLike[str] | str) -> Iterator[bytes]:
  place = reach(path)
  try:
    # A file of a store cannot be asked for a line of at most so many bytes.
    with place.open('rb') as opened, io.BufferedReader(opened) as file:
      number = 0
      while raw := file.readline(_MOST_BYTES + 1):
        number += 1
        if len(raw) > _MOST_BYTES:
          raise UnclipError(
            f'line {number} of {os.fspath(path)} has more than {_MOST_BYTES:,} bytes: give a file '
            'with a prompt a line'
          )
        yield raw
  except FileNotFoundError as error:
    raise UnclipError(f'there is no file of prompts {os.fspath(path)}: check the path') from error
  except IsADirectoryError as error:
    raise UnclipError(f'{os.fspath(path)} is a folder: give a file with a prompt a line') from error
  except OSError as error:
    raise UnclipError(
      f'the prompts {os.fspath(path)} cannot be read ({error.strerror or error}): check the file'
    ) from error


def _decode(raw: bytes, what: str, is_first: bool) -> str:
  raw = raw.removesuffix(b'\n').removesuffix(b'\r')
  if is_first:
    raw = raw.removeprefix(b'\xef\xbb\xbf')  # Notepad's mark of UTF-8
  if b'\0' in raw:
    raise UnclipError(f'{what} has a zero byte (is it UTF-16?): save the file as UTF-8')
  if b'\r' in raw.strip():
    raise UnclipError(
      f'{what} has a carriage return within (do lines end in one alone?): save the file with line '
      'feeds'
    )
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise UnclipError(
      f'{what} is not UTF-8 at byte {error.start + 1} (0x{raw[error.start]:02X}): save the file as '
      'UTF-8'
    ) from error


def _is_json(path: os.PathLike[str] | str) -> bool:
  suffix = epath.Path(path).suffix.lower()
  if suffix == '.json':
    raise UnclipError(
      f'{os.fspath(path)}: give JSON lines, an object a line, in a file that ends in .jsonl'
    )
  return suffix in _JSON_LINES


def _parse(text: str, what: str, number: int) -> Line:
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UnclipError(f'{what} is not valid JSON ({error}): give an object a line') from error
  if not isinstance(found, dict):
    raise UnclipError(f'{what} is no JSON object: write {{"prompt": "..."}}')
  if unknown := sorted(found.keys() - set(_KEYS)):
    raise UnclipError(f'{what} has an unknown key {unknown[0]!r}: the keys are {", ".join(_KEYS)}')
  if 'prompt' not in found:
    raise UnclipError(f'{what} has no "prompt"')
  return _line(number, found['prompt'], what, *(found.get(key) for key in _KEYS[1:]))


def _line(
  number: int, prompt: Any, what: str, name: Any = None, seed: Any = None, num_images: Any = None
) -> Line:
  settings.check_text(prompt, f'the prompt in {what}')
  if name is not None:
    settings.check_text(name, f'the name in {what}')
  if seed is not None:
    settings.check_seed(seed, f'the seed in {what}')
  if num_images is not None:
    settings.check_count(f'the number of images in {what}', num_images)
  return Line(number, prompt, name, seed, num_images)
