"""Several processes that share one job, each with devices of its own, through `jax.distributed`.

Sampling needs nothing of the other processes: they meet as they start, which tells each its number,
and once their shares are done. Training runs one program on the devices of all: as one process
ends, the others cannot go on.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from unclip_jax.types import UnclipError

START_SECONDS = 300  # JAX's own; what a scheduler may start the last process after the first
# JAX's own. As one process dies the others are ended after as long, and not left to wait for it.
HEARTBEAT_SECONDS = 100
_LEAST_HEARTBEAT_SECONDS = 5  # with less, a busy machine looks like a dead one
# A process that is done waits for the others, however much more they have to do.
_END_SECONDS = 10**7
_POLL_SECONDS = 0.2
_SLACK_SECONDS = 20


class Processes(NamedTuple):
  """Which of how many processes this one is.

  Attributes:
    index: from 0.
    count: 1 where there are no others.
  """

  index: int = 0
  count: int = 1


def start_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int | None = None,
) -> Processes:
  """Waits for all processes of a job; before JAX is asked for a device.

  Without arguments the launcher is asked: Slurm, Open MPI, Kubernetes (with the package
  `kubernetes`), Cloud TPU. Slurm and Open MPI give each process of a machine one of its GPUs.

  Args:
    coordinator: HOST:PORT of process 0, where they meet.
    num_processes: how many there are.
    process_id: of this one, from 0.
    heartbeat_seconds: after so long without a sign of a process JAX ends the others, and gives its
      number; None is HEARTBEAT_SECONDS.

  Raises:
    UnclipError: there is no launcher that JAX knows, or the arguments do not go together.
  """
  by_hand = (coordinator, num_processes, process_id)
  if None in by_hand and by_hand != (None, None, None):
    raise UnclipError('the coordinator, the number of processes and the id go together: give all')
  if coordinator is not None:
    _check_by_hand(coordinator, num_processes, process_id)
  if heartbeat_seconds is None:
    heartbeat_seconds = HEARTBEAT_SECONDS
  if not _LEAST_HEARTBEAT_SECONDS <= heartbeat_seconds <= HEARTBEAT_SECONDS:
    raise UnclipError(
      f'{heartbeat_seconds} seconds without a sign of a process: take '
      f'{_LEAST_HEARTBEAT_SECONDS} to {HEARTBEAT_SECONDS}'
    )
  # It would keep SIGTERM to itself; what a process has drawn is complete at any time.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=_END_SECONDS,
    )
  except (OSError, RuntimeError, ValueError) as error:
    if not by_hand[0] and 'should be defined' in str(error):
      raise UnclipError(
        'no launcher of several processes is found (Slurm, Open MPI, Kubernetes, Cloud TPU): start '
        'with one, or give each process --coordinator, --num-processes and --process-id'
      ) from error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'the processes do not find each other ({reason}): check that the address of the first can '
      'be reached and its port is free'
    ) from error
  return Processes(jax.process_index(), jax.process_count())


def wait_for_processes() -> None:
  """Returns once all processes have called it, or come to their end."""
  jax.distributed.shutdown()


def any_process(said: bool) -> bool:
  """Whether any process says so; all of them have to ask, and get the same answer."""
  if jax.process_count() == 1:
    return said
  return bool(multihost_utils.process_allgather(np.asarray(said)).any())


def wait_until(is_done: Callable[[], bool]) -> None:
  """Returns once what another process does is done, such as a file on a disk that all share."""
  while not is_done():
    time.sleep(_POLL_SECONDS)


def end_all(said: str) -> NoReturn:
  """Ends this process with a line and status 1, and so the others of its job.

  Without a goodbye: that would wait for the others, which wait for this one in a program. JAX ends
  them as there is no sign of it any more.
  """
  if not jax.distributed.is_initialized():
    sys.exit(said)
  print(f'process {jax.process_index()} ends: {said}', file=sys.stderr, flush=True)
  os._exit(1)


def end_with_others(said: str) -> NoReturn:
  """Ends this process, whose program failed, once JAX has said which other one was gone.

  That ends it as well; where no other one is gone, status 1 follows soon after.
  """
  about = f'process {jax.process_index()} waits for JAX to say which other one has died: {said}'
  print(about, file=sys.stderr, flush=True)
  time.sleep(HEARTBEAT_SECONDS + _SLACK_SECONDS)
  end_all(said)


def _check_by_hand(coordinator: str, num_processes: int, process_id: int) -> None:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
    raise UnclipError(f'the coordinator {coordinator!r} is no HOST:PORT, as 10.0.0.1:5000')
  if num_processes < 1:
    raise UnclipError(f'the number of processes is {num_processes}: take 1 or more')
  if not 0 <= process_id < num_processes:
    raise UnclipError(
      f'the process id {process_id} is not within 0..{num_processes - 1}: number the '
      f'{num_processes} processes from 0'
    )
