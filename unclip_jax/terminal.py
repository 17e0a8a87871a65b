"""What a command does about warnings, Ctrl-C, a full memory and compiled programs."""

import contextlib
import math
import os
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from unclip_jax.types import UnclipError

# JAX's warnings of a program that it cannot read back, or keep.
_DAMAGED = 'Error reading persistent compilation cache entry'
_NOT_KEPT = 'Error writing persistent compilation cache entry'
_ZSTD = b'\x28\xb5\x2f\xfd'


@contextlib.contextmanager
def plain_warnings(most: float = math.inf, must_keep: bool = False) -> Iterator[None]:
  """Shows the package's warnings to people: a line each, without a place in the code.

  Beyond the first `most` they are only counted. A compiled program on disk that is cut short, as a
  process was killed while it wrote it, is dropped: it is compiled and kept again.

  Args:
    most: how many.
    must_keep: whether compiled programs are all that is wanted.

  Raises:
    UnclipError: `must_keep`, and one cannot be kept; raised from where it is compiled.
  """
  count = 0

  def show(message: Warning | str, *_: object) -> None:
    nonlocal count
    text, cache = str(message), jax.config.jax_compilation_cache_dir
    if text.startswith(_DAMAGED) and _drop_damaged(Path(cache)):
      message = 'a compiled program in the cache was damaged, and is made again'
    elif must_keep and text.startswith((_DAMAGED, _NOT_KEPT)):
      _drop_damaged(Path(cache))  # what could be written of it
      reason = text.partition("': ")[2]  # after the program's name
      raise UnclipError(
        f'programs cannot be kept in {cache} ({reason}): free some space, or set '
        'JAX_COMPILATION_CACHE_DIR to a folder that can be written'
      )
    count += 1
    if count <= most:
      print(f'unclip-jax: warning: {message}', file=sys.stderr)

  with warnings.catch_warnings():
    warnings.simplefilter('always', UserWarning)
    warnings.showwarning = show
    try:
      yield
    finally:
      if count > most:
        print(f'unclip-jax: warning: {count - most:,} more warnings', file=sys.stderr)


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
  """Lets Ctrl-C end the drawing also where it comes while JAX collects garbage, which swallows it.

  Yields a function that raises KeyboardInterrupt if the key was pressed before.
  """
  pressed = []

  def interrupt(*_: object) -> None:
    pressed.append(True)
    raise KeyboardInterrupt

  def check() -> None:
    if pressed:
      raise KeyboardInterrupt

  try:
    before = signal.signal(signal.SIGINT, interrupt)
  except ValueError:  # only the main thread may
    yield check
    return
  try:
    yield check
  finally:
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
  """Says of a full memory what can be done."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UnclipError(
      'the memory of the device does not suffice: take a smaller --batch-size, --size or a shorter '
      '--dtype'
    ) from error


def use_cache(wanted: bool) -> None:
  """Lets JAX keep compiled programs, where JAX_COMPILATION_CACHE_DIR says if it says so."""
  if not wanted:
    jax.config.update('jax_enable_compilation_cache', False)
    return
  if jax.config.jax_compilation_cache_dir is None:
    folder = cache_folder()
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      print(
        f'unclip-jax: warning: no compiled programs are kept, as {folder} cannot be made '
        f'({error.strerror})',
        file=sys.stderr,
      )
      return
    jax.config.update('jax_compilation_cache_dir', str(folder))
  # Small programs add up: without these only what took a second to compile would be kept.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _drop_damaged(folder: Path) -> bool:
  """Removes programs that were cut short, which JAX would never write again; whether there were.

  Those that JAX compressed by zstd, where that is installed, are left alone.
  """
  dropped = False
  for path in folder.glob('*-cache'):
    entry = path.read_bytes()
    try:
      if not entry.startswith(_ZSTD):
        zlib.decompress(entry)
    except zlib.error:
      path.unlink(missing_ok=True)
      dropped = True
  return dropped


def cache_folder() -> Path:
  """Where programs are kept if JAX_COMPILATION_CACHE_DIR does not say."""
  if root := os.environ.get('XDG_CACHE_HOME'):
    return Path(root) / 'unclip_jax'
  match sys.platform:
    case 'darwin':
      return Path.home() / 'Library' / 'Caches' / 'unclip_jax'
    case 'win32':
      return Path(os.environ.get('LOCALAPPDATA', Path.home())) / 'unclip_jax' / 'Cache'
  return Path.home() / '.cache' / 'unclip_jax'
