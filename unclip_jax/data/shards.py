"""Captioned pictures in tar files, as img2dataset and WebDataset write them, with random access.

Files that share their name up to its first dot are one example: `000000017.jpg`, `.txt` (the
caption), `.json` (the field `caption`, where there is no `.txt`). The headers of a tar file are
read once, into an index of where its members lie; then an example costs the bytes that it has, of a
local file or of one in a store (`gs://`).
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from etils import epath
from fsspec.spec import AbstractBufferedFile

from unclip_jax import git_lfs
from unclip_jax.data.examples import BrokenExample, Example, check_index
from unclip_jax.types import UnclipError

IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm')
_TAR_BLOCK = 512
# Members of an example lie side by side: between them so many bytes are read rather than asking a
# store twice.
_GAP = 2**16
_INDICES_OPEN = 256  # each takes a file descriptor
_INDEXED_AT_ONCE = 16  # which hides how long a store takes to answer
_PARTS = ('image', 'txt', 'json')

Fetch = Callable[[int, int], bytes]  # (start, end) -> the bytes between them


class TarShards:
  """The examples of tar files, in the order of their names and within them.

  Args:
    patterns: of the files: names with `{00000..00123}`, `{a,b}`, `*` and `?`, or folders, of which
      all `*.tar` are taken. `gs://` and the like work.
    index_folder: where the indices are kept; by default each beside its tar file. Those that are
      there are used again as long as size and time of the tar file are the same. Of many shards in
      a store they are better on this machine, where they need not be held in memory.

  Raises:
    UnclipError: no file fits a pattern, one is missing, cut short, no plain tar file or holds no
      example, or an index cannot be written.
  """

  def __init__(
    self, patterns: str | Sequence[str], index_folder: os.PathLike[str] | str | None = None
  ) -> None:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    self.paths = sorted({str(path) for pattern in patterns for path in expand(pattern)})
    if not self.paths:
      raise UnclipError('no tar files are given: name a pattern such as data/{00000..00009}.tar')
    # Shards of several folders may share their names, and so have those in front of them as ids.
    ends = (path.split('/')[:-1] for path in (self.paths[0], self.paths[-1]))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))
    self._names_from = sum(len(part) + 1 for part, _ in same)
    folder = None if index_folder is None else epath.Path(index_folder)

    with ThreadPoolExecutor(_INDEXED_AT_ONCE) as pool:
      indices = list(pool.map(lambda path: _indexed(epath.Path(path), folder), self.paths))
    self._index_paths = [path for path, _ in indices]
    self._ends = list(itertools.accumulate(length for _, length in indices))
    self.__setstate__({})

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Example:
    check_index(index, len(self))
    shard = bisect.bisect_right(self._ends, index)
    try:
      rows, fetch = self._open(shard)
      row = rows[1 + index - (self._ends[shard - 1] if shard else 0)]
      parts = _read_parts(fetch, row)
    except (OSError, EOFError) as error:
      reason = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
      raise UnclipError(
        f'{self.paths[shard]} can no longer be read ({reason}): see that it is there, and start '
        'again'
      ) from error
    name = f'{self.paths[shard][self._names_from :]}/{row["key"].decode()}'
    if 'image' not in parts:
      raise BrokenExample(name, 'has no picture')
    return Example(parts['image'], _captions(name, parts), name)

  def __getstate__(self) -> dict:
    kept = ('paths', '_names_from', '_index_paths', '_ends')
    return {name: getattr(self, name) for name in kept}

  def __setstate__(self, state: dict) -> None:
    self.__dict__ |= state
    self._rows: dict[int, np.ndarray] = {}
    self._fetchers: dict[int, Fetch] = {}
    self._lock = threading.Lock()

  def _open(self, shard: int) -> tuple[np.ndarray, Fetch]:
    with self._lock:
      if shard not in self._rows:
        if len(self._rows) >= _INDICES_OPEN:
          self._rows.pop(next(iter(self._rows)))
        self._rows[shard] = _load_index(self._index_paths[shard])
      if shard not in self._fetchers:
        self._fetchers[shard] = _fetcher(epath.Path(self.paths[shard]))
      return self._rows[shard], self._fetchers[shard]


def expand(pattern: str) -> list[epath.Path]:
  """The files that a pattern names, in order.

  Raises:
    UnclipError: there are none, or a folder or one that is named without `*` and `?` is missing.
  """
  paths: list[epath.Path] = []
  for name in _braces(pattern):
    path = epath.Path(name).expanduser()
    if '*' in name or '?' in name:
      found = sorted(path.parent.glob(path.name)) if path.parent.exists() else []
    elif not path.exists():
      raise UnclipError(f'there is no {path}: check the name, or fetch it')
    else:
      found = sorted(path.glob('*.tar')) if path.is_dir() else [path]
    if not found:
      raise UnclipError(f'{name} has no tar files: check the name, or fetch them')
    paths += found
  return paths


def _braces(pattern: str) -> Iterator[str]:
  """A pattern once for each way to fill its braces, as a shell does."""
  match = re.search(r'\{([^{}]*)\}', pattern)
  if match is None:
    yield pattern
    return
  inner = match[1]
  if bounds := re.fullmatch(r'(\d+)\.\.(\d+)', inner):
    first, last = bounds.groups()
    values: Iterable[str] = (
      str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)
    )
  else:
    values = inner.split(',')
  for value in values:
    yield from _braces(pattern[: match.start()] + value + pattern[match.end() :])


def _indexed(path: epath.Path, folder: epath.Path | None) -> tuple[epath.Path, int]:
  """The index of a tar file, made where it is not there or of another file, and its length."""
  if folder is None:
    index = path.with_name(f'{path.name}.index.npy')
  else:
    # Shards of several folders may share their names.
    where = hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]
    index = folder / f'{where}-{path.name}.index.npy'
  stamp = _stamp(path)
  if index.exists():
    rows = _load_index(index)
    if len(rows) and (rows[0]['image_start'], rows[0]['image_size']) == stamp:
      return index, len(rows) - 1
  rows = _scan(path, stamp)
  content = io.BytesIO()
  np.save(content, rows)
  try:
    _write_whole(index, content.getvalue())
  except OSError as error:
    raise UnclipError(
      f'cannot write the index {index} ({error.strerror or error}): name an index folder that can '
      'be written'
    ) from error
  return index, len(rows) - 1


def _stamp(path: epath.Path) -> tuple[int, int]:
  """What tells a file from another one of its name: its size, and when it was written."""
  if _is_remote(path):
    stat = path.stat()
    return stat.length, stat.mtime
  local = os.stat(path)
  return local.st_size, local.st_mtime_ns


def _write_whole(path: epath.Path, content: bytes) -> None:
  """A file that is there is whole; two processes that make the same one write the same."""
  if _is_remote(path):
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.part')
  try:
    part.write_bytes(content)
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def _is_remote(path: epath.Path) -> bool:
  return '://' in str(path)


def _scan(path: epath.Path, stamp: tuple[int, int]) -> np.ndarray:
  """Where the parts of each example lie: a row each, with `key` and start and size of parts.

  The first row is no example: its picture's place is the stamp of the file.
  """
  size = stamp[0]
  examples: list[tuple[str, dict[str, tuple[int, int]]]] = []
  try:
    with path.open('rb') as file:
      head = file.read(git_lfs.HEAD)
      git_lfs.refuse_pointer(path, head)
      file.seek(0)
      with tarfile.open(fileobj=file, mode='r:') as tar:
        for member in tar:
          if member.isreg():
            _add(examples, member)
        _check_end(path, file, tar, size)
  except (tarfile.ReadError, EOFError) as error:
    if size and head[:2] in (b'\x1f\x8b', b'BZ', b'\xfd7', b'(\xb5'):
      raise UnclipError(f'{path} is compressed: unpack it to a plain tar file') from error
    raise UnclipError(f'{path} is cut short or no tar file ({error}): fetch it again') from error
  except OSError as error:
    raise UnclipError(f'{path} cannot be read ({error.strerror or error})') from error
  if not examples:
    raise UnclipError(f'{path} holds no pictures: give tar files of .jpg, .txt and .json')
  width = max(len(key.encode()) for key, _ in examples)
  fields = [(f'{part}_{what}', '<u8') for part in _PARTS for what in ('start', 'size')]
  rows = np.zeros(1 + len(examples), [('key', f'S{width}'), *fields])
  rows[0]['image_start'], rows[0]['image_size'] = stamp
  for row, (key, parts) in zip(rows[1:], examples, strict=True):
    row['key'] = key.encode()
    for part, (start, length) in parts.items():
      row[f'{part}_start'], row[f'{part}_size'] = start, length
  return rows


def _add(examples: list[tuple[str, dict[str, tuple[int, int]]]], member: tarfile.TarInfo) -> None:
  """Puts a member to the example that it belongs to: its neighbours of the same name."""
  folder, _, name = member.name.rpartition('/')
  stem, _, suffix = name.partition('.')
  suffix = suffix.lower()
  part = 'image' if suffix in IMAGES else suffix
  if part not in _PARTS or not stem:
    return
  key = f'{folder}/{stem}' if folder else stem
  if not examples or examples[-1][0] != key:
    examples.append((key, {}))
  examples[-1][1].setdefault(part, (member.offset_data, member.size))


def _check_end(path: epath.Path, file: IO[bytes], tar: tarfile.TarFile, size: int) -> None:
  """What tarfile is silent about: a file that ends, or turns into something else, on the way."""
  file.seek(tar.offset)
  end = file.read(_TAR_BLOCK)
  if len(end) < _TAR_BLOCK:
    raise EOFError(f'its end is missing, at byte {size:,}')
  if end.strip(b'\0'):
    raise EOFError(f'damaged at byte {tar.offset:,}')


def _load_index(path: epath.Path) -> np.ndarray:
  """Mapped where it is local, so that all processes of a machine share it."""
  try:
    if _is_remote(path):
      return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(os.fspath(path), mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    reason = str(error).partition('\n')[0]
    raise UnclipError(
      f'the index {path} cannot be read ({reason}): remove it, and it is made anew'
    ) from error


def _fetcher(path: epath.Path) -> Fetch:
  """Reads ranges of a file, in any number of threads."""
  if not _is_remote(path):

    def fetch(start: int, end: int) -> bytes:
      with open(path, 'rb', buffering=0) as file:
        file.seek(start)
        return file.read(end - start)

    return fetch
  file = path.open('rb')
  if isinstance(file, AbstractBufferedFile):
    # What the file reads by: the file itself would fetch 5 MiB beyond what it is asked for.
    return file.cache.fetcher
  lock = threading.Lock()

  def fetch_alone(start: int, end: int) -> bytes:
    with lock:
      file.seek(start)
      return file.read(end - start)

  return fetch_alone


def _read_parts(fetch: Fetch, row: np.void) -> dict[str, bytes]:
  """The parts of an example that are there, neighbours by one request."""
  places = {}
  for part in _PARTS:
    if row[f'{part}_start']:  # a member never begins at 0, where its header is
      start = int(row[f'{part}_start'])
      places[part] = (start, start + int(row[f'{part}_size']))
  if 'txt' in places:
    places.pop('json', None)
  runs: list[tuple[int, int]] = []
  for start, end in sorted(places.values()):
    if runs and start - runs[-1][1] <= _GAP:
      runs[-1] = (runs[-1][0], end)
    else:
      runs.append((start, end))
  content = {}
  for first, last in runs:
    block = fetch(first, last)
    if len(block) < last - first:
      raise EOFError(f'it ends at byte {first + len(block):,}')
    for part, (start, end) in places.items():
      if first <= start and end <= last:
        content[part] = block[start - first : end - first]
  return content


def _captions(name: str, parts: dict[str, bytes]) -> tuple[str, ...]:
  """Of the .txt, else of the .json."""
  caption: object = None
  try:
    if 'txt' in parts:
      caption = parts['txt'].decode()
    elif 'json' in parts:
      fields = json.loads(parts['json'])
      caption = fields.get('caption') if isinstance(fields, dict) else None
  except (ValueError, RecursionError) as error:
    raise BrokenExample(name, f'its caption cannot be read: {error}') from error
  captions = caption if isinstance(caption, list) else [caption]
  stripped = (text.strip() for text in captions if isinstance(text, str))
  return tuple(text for text in stripped if text)
