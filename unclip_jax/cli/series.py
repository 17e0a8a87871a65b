"""`unclip-jax generate --prompts`: a folder of pictures that is filled, however often it takes.

A picture that is there under its name is whole, and is not drawn again. `series.json` says what the
folder holds the pictures of, so that those of two runs are never mixed.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from etils import epath
from rich.console import Console

from unclip_jax import processes
from unclip_jax.display import SeriesDisplay
from unclip_jax.images import save_png, slug
from unclip_jax.processes import Processes
from unclip_jax.systems import prompt_file, settings
from unclip_jax.systems.samples import Samples
from unclip_jax.systems.series import Item
from unclip_jax.types import UnclipError
from unclip_jax.weights.byte_ranges import is_remote
from unclip_jax.weights.safetensors import reach, write_atomically

MANIFEST_NAME = 'series.json'
_FORMAT_VERSION = 1
_LEAST_DIGITS = 5  # of a line's number in a name
_PICTURES = f'{"[0-9]" * _LEAST_DIGITS}*-[0-9]*-*.png'


class Series(NamedTuple):
  """The pictures of a file of prompts, and the folder that they go to.

  Attributes:
    path: of the file.
    scan: what is known of it.
    folder: the folder.
    seed: of lines that do not say.
    num_images: of lines that do not say.
    first_image: the index of each prompt's first picture.
  """

  path: str
  scan: prompt_file.Scan
  folder: epath.Path
  seed: int
  num_images: int
  first_image: int

  def items(self) -> Iterator[Item]:
    """All pictures in their order; names sort like them."""
    last = self.first_image + self.scan.most_images - 1
    line_digits = max(_LEAST_DIGITS, len(str(self.scan.last_line)))
    for line in prompt_file.read_lines(self.path, self.scan.state):
      seed = self.seed if line.seed is None else line.seed
      num_images = self.num_images if line.num_images is None else line.num_images
      title = slug(line.name or line.prompt)
      for index in range(self.first_image, self.first_image + num_images):
        number = f'{line.number:0{line_digits}d}-{index:0{len(str(last))}d}'
        yield Item(line.prompt, seed, index, f'{number}-{title}.png')

  def is_drawn(self, item: Item) -> bool:
    """Whether the picture is there; an empty file is what a loss of power left of one."""
    try:
      found = (self.folder / item.name).stat()
      return found.length > 0 and not found.is_directory
    except FileNotFoundError:
      return False


def open_series(path: str, out: str, seed: int, num_images: int, first_image: int) -> Series:
  """Reads the file of prompts once, to find mistakes before a model is loaded.

  Raises:
    UnclipError: a mistake in the file or in a number, or the folder has pictures of other prompts.
  """
  settings.check_seed(seed)
  settings.check_first(first_image)
  scan = prompt_file.scan(path, num_images, first_image)
  series = Series(path, scan, reach(out), seed, num_images, first_image)
  _check_manifest(series.folder, _describe(series))
  return series


def join_processes(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Processes:
  """`start_processes`; what to expect is said before, as JAX does not let us say it in the end."""
  print(
    f'unclip-jax: waiting for the other processes, {processes.START_SECONDS} s at most; should one '
    f'die, JAX ends the others within {processes.HEARTBEAT_SECONDS} s: start again for what is '
    'missing then',
    file=sys.stderr,
  )
  return processes.start_processes(coordinator, num_processes, process_id)


def draw_series(
  series: Series,
  settings_of_all: dict[str, Any],
  model: str,
  text: dict[str, str],
  shared_by: Processes,
  sample: Callable[[Iterable[Item]], Iterator[tuple[list[Item], Samples]]],
  check: Callable[[], None],
) -> None:
  """Draws what is missing of this process's share, and saves it while the next batch is drawn.

  Args:
    series: the pictures.
    settings_of_all: what all are drawn with, ready for json.dumps.
    model: its `fingerprint`; a folder of another one, or of other settings, is refused.
    text: what each file says of itself, beyond its prompt, seed and index.
    shared_by: the processes; each takes every `count`-th picture.
    sample: of `sample_series`, all but the items given.
    check: called after each batch; may raise.

  Raises:
    UnclipError: the folder has other pictures, or cannot be written; or a process came to its end
      before its share was done.
  """
  drawn_with = {'model': model, 'settings': json.loads(json.dumps(settings_of_all))}
  manifest = _describe(series) | drawn_with
  _check_manifest(series.folder, manifest)
  left = _parts(series.folder)
  share = _Share(series, shared_by)
  title = f'process {shared_by.index}: ' if shared_by.count > 1 else ''

  def save(items: list[Item], samples: Samples) -> None:
    if (series.folder / MANIFEST_NAME).exists():
      _check_manifest(series.folder, manifest)  # another run may have begun meanwhile
    else:
      _write_manifest(series.folder, manifest)
    for item, image in zip(items, samples.images, strict=True):
      about = {'prompt': item.prompt, 'index': str(item.index), **text, 'seed': str(item.seed)}
      save_png(series.folder / item.name, image, about)

  drawn, saved = 0, Future()
  saved.set_result(None)
  console = Console(stderr=True, highlight=False)
  with SeriesDisplay(console, share.total, title) as display, ThreadPoolExecutor(1) as saver:
    for items, samples in sample(share.missing()):
      saved.result()  # of the batch before: no more than two are in memory
      saved = saver.submit(save, items, samples)
      drawn += len(items)
      check()
      display(share.kept, drawn)
    saved.result()
  if shared_by.count == 1:
    missing = series.scan.num_images - share.kept - drawn
  else:
    print(f'{title}done, {drawn:,} drawn', file=sys.stderr)
    processes.wait_for_processes()
    if shared_by.index > 0:
      return
    missing = sum(not series.is_drawn(item) for item in series.items())
  if missing:
    raise UnclipError(
      f'{missing:,} of {series.scan.num_images:,} pictures are missing in {series.folder}: a '
      'process did not finish or writes elsewhere, or the file of prompts changed; start again for '
      'these, with a folder that all share'
    )
  for part in left:  # since before the first batch: by a run that was killed
    part.unlink(missing_ok=True)
  made = f'{drawn:,} drawn now' if shared_by.count == 1 else f'by {shared_by.count} processes'
  blank = f'; empty lines skipped: {series.scan.num_blank:,}' if series.scan.num_blank else ''
  print(f'{series.scan.num_images:,} pictures in {series.folder}, {made}{blank}', file=sys.stderr)
  print(series.folder)


class _Share:
  """What one process has to draw; counts what it finds drawn."""

  def __init__(self, series: Series, shared_by: Processes):
    self._series, self._shared_by = series, shared_by
    self.total = len(range(shared_by.index, series.scan.num_images, shared_by.count))
    self.kept = 0

  def missing(self) -> Iterator[Item]:
    for i, item in enumerate(self._series.items()):
      if i % self._shared_by.count != self._shared_by.index:
        continue
      if self._series.is_drawn(item):
        self.kept += 1
      else:
        yield item


def _describe(series: Series) -> dict[str, Any]:
  return {
    'format_version': _FORMAT_VERSION,
    'prompts': series.scan.digest,
    'seed': series.seed,
    'num_images': series.num_images,
    'first_image': series.first_image,
  }


def _check_manifest(folder: epath.Path, wanted: dict[str, Any]) -> None:
  """Raises UnclipError where the folder is of a series that differs in what is known so far."""
  path = folder / MANIFEST_NAME
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    # It is written before the first picture.
    if folder.is_dir() and next(iter(folder.glob(_PICTURES)), None) is not None:
      raise UnclipError(
        f'{folder} has pictures of prompts and no {MANIFEST_NAME} that says how they were drawn: '
        'choose another --out'
      ) from None
    return
  except (OSError, ValueError) as error:
    raise UnclipError(f'{path} cannot be read ({error}): choose another --out') from error
  if differing := _differing(found, wanted):
    raise UnclipError(
      f'{folder} has the pictures of another run (another {", ".join(differing)}): choose another '
      '--out'
    )


def _differing(found: Any, wanted: dict[str, Any]) -> list[str]:
  """The names of what differs; of settings all count, also those that only one of the two has."""
  if not isinstance(found, dict):
    return ['format_version']
  names = [name for name in wanted if name != 'settings' and found.get(name) != wanted[name]]
  if 'settings' in wanted:
    one, other = _by_names(found.get('settings', {})), _by_names(wanted['settings'])
    names += [name for name in sorted(one | other) if one.get(name) != other.get(name)]
  return names


def _by_names(tree: Any) -> dict[str, Any]:
  """Settings of stages one by one: 'decoder.num_steps', 'upsamplers.0.sampler'."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _write_manifest(folder: epath.Path, manifest: dict[str, Any]) -> None:
  text = json.dumps(manifest, indent=2, ensure_ascii=False) + '\n'
  write_atomically(folder / MANIFEST_NAME, lambda part: part.write_text(text, 'utf-8'))


def _parts(folder: epath.Path) -> list[epath.Path]:
  """Pictures that are being written, or that a run which was killed left unfinished."""
  return [] if is_remote(folder) else list(folder.glob('.[0-9]*.png.*.part'))
