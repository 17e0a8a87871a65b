"""What a run does about SIGTERM, which schedulers send before they take the machine away."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# 128 + SIGTERM, as a shell has it: what a scheduler expects of a job that it stopped, and starts
# again. An error is 1.
STATUS = 143


class Preemption:
  """A context manager in whose body the first SIGTERM only asks the run to stop.

  The loop looks at `requested` between its updates, saves, and leaves by `leave`. A second SIGTERM
  ends the process at once, as does Ctrl-C after the first: what is on disk stays whole. Outside of
  the main thread, where Python has no signals, nothing is asked.

  Args:
    agree: of several processes that train together, says whether any of them was asked; they all
      call it.
  """

  def __init__(self, agree: Callable[[bool], bool] = bool) -> None:
    self._asked, self._agree = False, agree
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    self._set(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def requested(self) -> bool:
    """Whether the run is to stop, so that all processes do so after the same update."""
    return self._agree(self._asked)

  def leave(self, say: Callable[[str], None], step: int) -> None:
    """Once the state is saved: ends the process with `STATUS`, if that was asked for.

    Args:
      say: takes the line that says so.
      step: of the state.

    Raises:
      SystemExit: it was.
    """
    if self.requested():
      say(f'step {step}: told to stop (SIGTERM), and saved: the same command goes on from here')
      raise SystemExit(STATUS)

  def _ask(self, number: int, frame: FrameType | None) -> None:
    self._asked = True
    self._set(signal.SIGTERM, signal.SIG_DFL)
    self._set(signal.SIGINT, signal.SIG_DFL)

  def _set(self, number: signal.Signals, handler: Any) -> None:
    try:
      before = signal.signal(number, handler)
    except ValueError:  # only the main thread may
      return
    self._before.setdefault(number, before)
