"""What a terminal shows: lists of words, and the progress of a call, a line for each stage.

Where there is no terminal the progress is plain lines.

Stages are handed to the device one after the other while the first ones run, so that the program of
one is compiled while another samples: several lines move at a time. A series of many
pictures has one line for all.
"""

import datetime
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from unclip_jax.systems.samples import Progress as StageProgress

_SECONDS_BETWEEN_LINES = 10
_WORDS = {'preparing': 'compiling', 'sampling': 'sampling', 'done': 'done'}


class StageDisplay:
  """A context manager to give to `Unclip.sample` as `progress`.

  Args:
    console: where to draw.
    stages: names in their order, as `Unclip.sample` reports them.
  """

  def __init__(self, console: Console, stages: list[str]) -> None:
    self._console = console
    self._progress: Progress | None = None
    self._tasks: dict[str, TaskID] = {}
    self._stages = stages

  def __enter__(self) -> Self:
    if self._console.is_terminal:
      self._progress = Progress(
        SpinnerColumn(finished_text='[green]✓'),
        TextColumn('{task.description:<12}'),
        BarColumn(bar_width=24),
        TextColumn('{task.fields[status]:<22}'),
        TimeElapsedColumn(),
        console=self._console,
      )
      self._tasks = {
        name: self._progress.add_task(
          name.replace('_', ' '), start=False, total=None, status='waiting'
        )
        for name in self._stages
      }
      self._progress.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._progress is not None:
      self._progress.stop()

  def __call__(self, event: StageProgress) -> None:
    """Shows what a stage does now."""
    word, name = _WORDS[event.status], event.stage.replace('_', ' ')
    first, several = event.batch == 0, event.num_batches > 1
    where = f' batch {event.batch + 1} of {event.num_batches}' if several else ''
    if self._progress is None:
      if event.status == 'done' or (first and event.status == 'preparing'):
        self._console.print(f'{name}: {word}{where if event.status == "done" else ""}')
      return
    task = self._tasks[event.stage]
    if first and event.status == 'preparing':
      self._progress.start_task(task)
      # Until the program is there nothing is known about how long it takes: the bar pulses.
      self._progress.update(task, total=None, status=word)
    elif event.status == 'done':
      last = event.batch + 1 == event.num_batches
      self._progress.update(
        task,
        total=event.num_batches,
        completed=event.batch + 1,
        status=word if last else f'sampled{where}',
      )
    else:
      self._progress.update(task, status=f'sampling{where}')


class SeriesDisplay:
  """A context manager that counts the pictures of a series.

  A bar on a terminal; else a line after the first batch, then every ten seconds.

  Args:
    console: where to draw.
    total: how many pictures there will be.
    title: put in front.
  """

  def __init__(self, console: Console, total: int, title: str = '') -> None:
    self._console, self._total, self._title = console, total, title
    self._bar: Progress | None = None
    self._task: TaskID | None = None
    self._kept = self._drawn = 0
    # Drawing the first batch compiles the programs: the speed is that of the others.
    self._first, self._began = 0, 0.0
    self._told = -math.inf

  def __enter__(self) -> Self:
    if self._console.is_terminal:
      columns = (BarColumn(bar_width=24), TextColumn('{task.description}'))
      self._bar = Progress(*columns, console=self._console)
      self._task = self._bar.add_task(self._text(), total=self._total)
      self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()

  def __call__(self, kept: int, drawn: int) -> None:
    """Shows how many pictures were there, and how many were drawn so far."""
    now = time.monotonic()
    if self._drawn == 0:
      self._first, self._began = drawn, now
    self._kept, self._drawn = kept, drawn
    if self._bar is not None:
      self._bar.update(self._task, completed=kept + drawn, description=self._text(now))
    elif now - self._told >= _SECONDS_BETWEEN_LINES:
      self._told = now
      self._console.print(self._text(now), soft_wrap=True)

  def _text(self, now: float = 0.0) -> str:
    done = self._kept + self._drawn
    text = f'{self._title}{done:,} of {self._total:,} pictures'
    if self._drawn == self._first:
      return text if self._drawn else f'{text}, compiling'
    per_second = (self._drawn - self._first) / (now - self._began)
    left = datetime.timedelta(seconds=math.ceil((self._total - done) / per_second))
    return f'{text}, {per_second:.3g} a second, {left} left'


def format_lists(lists: Mapping[str, Sequence[str]], width: int) -> str:
  """Lists under their names and lengths, wrapped between items where they can be.

  Args:
    lists: name -> what is in it; an empty one is left out.
    width: columns of the terminal.
  """

  def wrap(items: Sequence[str]) -> str:
    # White space within an item is no place to wrap at.
    line = ', '.join(item.replace(' ', '\N{NO-BREAK SPACE}') for item in items)
    return textwrap.fill(
      line, width, initial_indent='  ', subsequent_indent='  ', break_on_hyphens=False
    ).replace('\N{NO-BREAK SPACE}', ' ')

  return '\n\n'.join(
    f'{name} ({len(items):,})\n{wrap(items)}' for name, items in lists.items() if items
  )
