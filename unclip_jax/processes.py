"""Several processes that share one job, each with devices of its own, through `jax.distributed`.

Sampling needs nothing of the other processes: they meet as they start, which tells each its number,
and once their shares are done.
"""

from typing import NamedTuple

import jax

from unclip_jax.types import UnclipError

START_SECONDS = 300  # JAX's own; what a scheduler may start the last process after the first
# JAX's own. As one process dies the others are ended after as long, and not left to wait for it.
HEARTBEAT_SECONDS = 100
# A process that is done waits for the others, however much more they have to do.
_END_SECONDS = 10**7


class Processes(NamedTuple):
  """Which of how many processes this one is.

  Attributes:
    index: from 0.
    count: 1 where there are no others.
  """

  index: int = 0
  count: int = 1


def start_processes(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Processes:
  """Waits for all processes of a job; before JAX is asked for a device.

  Without arguments the launcher is asked: Slurm, Open MPI, Kubernetes (with the package
  `kubernetes`), Cloud TPU. Slurm and Open MPI give each process of a machine one of its GPUs.

  Args:
    coordinator: HOST:PORT of process 0, where they meet.
    num_processes: how many there are.
    process_id: of this one, from 0.

  Raises:
    UnclipError: there is no launcher that JAX knows, or the arguments do not go together.
  """
  by_hand = (coordinator, num_processes, process_id)
  if None in by_hand and by_hand != (None, None, None):
    raise UnclipError('the coordinator, the number of processes and the id go together: give all')
  if coordinator is not None:
    _check_by_hand(coordinator, num_processes, process_id)
  # It would keep SIGTERM to itself; what a process has drawn is complete at any time.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=START_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
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
