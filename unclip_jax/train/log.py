"""What a training run writes down: metrics as CSV and for TensorBoard, curves, samples, progress.

A run that continues from a checkpoint drops the rows after it, so that its files read as those of
an uninterrupted run.
"""

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import jax
import numpy as np
from etils import epath
from PIL import Image
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from unclip_jax.types import UnclipError

_PLAIN_SECONDS = 10.0  # Between two lines of progress where the output is not a terminal.


class _Board(Protocol):
  """The part of tensorboardX's writer that is used."""

  def add_scalar(self, tag: str, value: float, step: int) -> None: ...

  def add_image(self, tag: str, image: np.ndarray, step: int, *, dataformats: str) -> None: ...

  def close(self) -> None: ...


class RunLog:
  """The record of a run in its folder; a context manager.

  Writes `metrics.csv` (one row a logged step), `samples/NAME_STEP.png`, `NAME.png` curves, and
  TensorBoard's event files where the `train` extra is installed. Of several processes only the
  first writes or shows anything.

  Args:
    folder: of the run, made if missing.
    total_steps: length of the run, for the progress bar.
    resume_step: the step of the checkpoint that the run continues from; rows beyond it go.
    console: where progress is shown; standard error by default.

  Raises:
    UnclipError: the folder cannot be written, or `metrics.csv` is not ours.
  """

  def __init__(
    self,
    folder: os.PathLike[str] | str,
    total_steps: int,
    resume_step: int = 0,
    console: Console | None = None,
  ) -> None:
    self.folder = epath.Path(folder)
    self._is_silent = jax.process_index() > 0
    self._console = console or Console(stderr=True, quiet=self._is_silent)
    self._path = self.folder / 'metrics.csv'
    self._board = None
    if not self._is_silent:
      with self._writing():
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = self._read(resume_step)
        names = dict.fromkeys(k for row in self._rows for k in row if k != 'step')
        self._columns = ['step', *names]
        self._rewrite()
      self._board = _open_board(self.folder / 'tensorboard', resume_step, self._console)
    self._last_write = self._last_shown = time.monotonic()
    self._total_steps = total_steps
    self._progress = Progress(
      TextColumn('[bold]step'),
      BarColumn(bar_width=24),
      MofNCompleteColumn(),
      TextColumn('{task.fields[summary]}'),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._progress.add_task(
      'train', total=total_steps, completed=resume_step, summary=''
    )

  def __enter__(self) -> Self:
    self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._progress.stop()
    if self._board is not None:
      self._board.close()

  def write(self, step: int, metrics: Mapping[str, Any], num_examples: int = 0) -> None:
    """Records metrics and moves the progress on.

    Args:
      step: updates made so far.
      metrics: name -> scalar, or [k] of the k steps since the last call, whose mean is recorded.
        A name may come in some calls only (`val_loss`); two calls of one step share a row.
        Arrays of the device are waited for.
      num_examples: trained on since the last call; gives the throughput in examples a second,
        which is recorded as `examples_per_s`.

    Raises:
      UnclipError: the row cannot be written.
    """
    row = {name: float(np.mean(np.asarray(value))) for name, value in metrics.items()}
    if self._is_silent:
      return
    now = time.monotonic()
    if num_examples:
      row['examples_per_s'] = num_examples / max(now - self._last_write, 1e-9)
      self._last_write = now
    new = [name for name in row if name not in self._columns]
    self._columns += new
    again = bool(self._rows) and self._rows[-1]['step'] == step
    if again:
      self._rows[-1].update(row)
    else:
      self._rows.append({'step': step, **row})
    with self._writing():
      if new or again:
        self._rewrite()
      else:
        with self._path.open('a') as file:
          file.write(_to_csv([self._rows[-1]], self._columns, header=False))
    if self._board is not None:
      for name, value in row.items():
        self._board.add_scalar(name, value, step)
    summary = '  '.join(f'{name} {value:.4g}' for name, value in row.items())
    self._progress.update(self._task, completed=step, summary=summary)
    due = now - self._last_shown >= _PLAIN_SECONDS or step >= self._total_steps
    if not self._console.is_terminal and due:
      self._console.print(
        f'step {step}/{self._total_steps}  {summary}', soft_wrap=True, highlight=False
      )
      self._last_shown = now

  def message(self, text: str) -> None:
    """Prints a line above the progress."""
    self._progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

  def write_image(self, step: int, name: str, image: np.ndarray) -> epath.Path:
    """Saves a picture, uint8 [h, w, 3], as `samples/NAME_STEP.png`; returns its path."""
    path = self.folder / 'samples' / f'{name}_{step:07d}.png'
    if self._is_silent:
      return path
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG')
    with self._writing():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(buffer.getvalue())
    if self._board is not None:
      self._board.add_image(name, image, step, dataformats='HWC')
    return path

  def write_curves(self, names: list[str], file: str = 'loss') -> epath.Path | None:
    """Draws metrics against the step as `FILE.png`; returns its path.

    Without matplotlib (the `train` extra) it says so and returns None.
    """
    if self._is_silent:
      return None
    try:
      # Of the `train` extra: a run writes its CSV without it.
      from matplotlib.figure import Figure
    except ImportError:
      self.message("no curves without matplotlib: pip install 'unclip-jax[train]'")
      return None
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.add_subplot()
    for name in names:
      points = [(row['step'], row[name]) for row in self._rows if name in row]
      if points:
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set_xlabel('step')
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    path = self.folder / f'{file}.png'
    with self._writing():
      path.write_bytes(buffer.getvalue())
    return path

  def _read(self, last_step: int) -> list[dict[str, Any]]:
    if not self._path.exists():
      return []
    try:
      text = self._path.read_text()
      text = text[: text.rfind('\n') + 1]  # A killed process may leave half a last row.
      rows = [
        {k: int(v) if k == 'step' else float(v) for k, v in row.items() if v}
        for row in csv.DictReader(io.StringIO(text))
      ]
      return [row for row in rows if row['step'] <= last_step]
    except (KeyError, ValueError, UnicodeDecodeError) as error:
      raise UnclipError(
        f'{self._path} does not look like the metrics of a run: move it away or choose another '
        'run folder'
      ) from error

  def _rewrite(self) -> None:
    temporary = self._path.with_name(self._path.name + '.part')
    temporary.write_text(_to_csv(self._rows, self._columns, header=True))
    temporary.replace(self._path)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UnclipError(
        f'cannot write to the run folder {self.folder} ({error.strerror or error}): free some '
        'space or choose another folder'
      ) from error


def _to_csv(rows: list[dict[str, Any]], columns: list[str], header: bool) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  if header:
    writer.writeheader()
  writer.writerows(
    {k: f'{v:.9g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows
  )
  return text.getvalue()


def _open_board(folder: epath.Path, step: int, console: Console) -> _Board | None:
  try:
    # Of the `train` extra: a run writes its CSV without it.
    from tensorboardX import SummaryWriter
  except ImportError:
    text = "no TensorBoard files without tensorboardX: pip install 'unclip-jax[train]'"
    console.print(text, markup=False, soft_wrap=True)
    return None
  make: Callable[..., _Board] = SummaryWriter
  # Readers drop what an earlier, killed process wrote beyond the step purged here.
  return make(str(folder), purge_step=step + 1 if step else None)
