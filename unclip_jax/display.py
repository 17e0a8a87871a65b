"""The progress of a call on a terminal: a line for each stage, or plain lines where there is none.

Stages are handed to the device one after the other while the first ones run, so that the program of
one is compiled while another samples: several lines move at a time.
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from unclip_jax.systems.pipeline import Progress as StageProgress

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
