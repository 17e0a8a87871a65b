"""Training runs in processes of their own, to which something happens on the way.

A process that has imported everything forks one child a run, which so starts in no time. What
happens to a child is in `_arm`: nothing in the package or the scripts knows of it.
"""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Faults:
  """What happens to a child; nothing by default.

  Attributes:
    in_save: SIGKILL at this file operation on a checkpoint that is not complete yet, from 1.
    in_run: SIGKILL at this file operation below the folder of the run.
    after: SIGKILL so many seconds after the log was opened.
    signals: [name, count, number of a signal] each: sent at the call so many of `RunLog.write` or
      of `Checkpoints.save_async`, from 1.
    file_size: the most bytes that a file may have, for a full disk.
  """

  in_save: int | None = None
  in_run: int | None = None
  after: float | None = None
  signals: Sequence[Sequence[Any]] = ()
  file_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a child ended.

  Attributes:
    status: as of `subprocess`: below 0 the signal that ended it.
    said: its output and errors.
    in_save: file operations on incomplete checkpoints, where it came to its end.
    in_run: those below the folder of the run.
  """

  status: int
  said: str
  in_save: int | None
  in_run: int | None


class Children:
  """Starts runs of `experiments.emoji.train_upsampler`; a context manager.

  Args:
    folder: for the programs that are compiled and what the children say.
  """

  def __init__(self, folder: Path) -> None:
    self._said = folder / 'said'
    env = os.environ | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_backend_optimization_level=0',
    }
    self._process = subprocess.Popen(
      [sys.executable, __file__],
      env=env,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._process.stdin.close()
    self._process.wait(60)
    self._process.stdout.close()

  def train(self, argv: Sequence[str], faults: Faults = Faults()) -> Ended:
    """Runs the script to its end, whichever that is."""
    job = {'argv': list(argv), 'said': str(self._said), 'faults': dataclasses.asdict(faults)}
    self._process.stdin.write(json.dumps(job) + '\n')
    self._process.stdin.flush()
    status = int(self._process.stdout.readline())
    counts = self._said.with_suffix('.counts')
    found = json.loads(counts.read_text()) if counts.exists() else {}
    return Ended(status, self._said.read_text(), found.get('in_save'), found.get('in_run'))


def _serve() -> None:
  """Forks a child for each line of JSON, and answers with its status."""
  import matplotlib.figure  # noqa: F401  what a run imports on its way
  import tensorboardX  # noqa: F401

  from experiments.emoji import train_upsampler  # noqa: F401
  from experiments.emoji.compose import load_sprites

  load_sprites(None)  # which takes half of a run that is as short as these
  if threading.active_count() > 1:
    raise RuntimeError(f'threads do not survive a fork: {threading.enumerate()}')
  for line in sys.stdin:
    job = json.loads(line)
    Path(job['said']).with_suffix('.counts').unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
      _train(job)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _train(job: dict[str, Any]) -> None:
  """A child's life."""
  out = os.open(job['said'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for stream in (1, 2):
    os.dup2(out, stream)
  status, argv = 1, job['argv']
  try:
    import jax

    from experiments.emoji import common, train_upsampler

    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    faults = Faults(**job['faults'] | {'signals': tuple(job['faults']['signals'])})
    if faults != Faults():
      # It may be killed while it writes a program, which others would then read.
      jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
    run = next(word.removeprefix('--run=') for word in argv if word.startswith('--run='))
    counts = _arm(faults, run)
    common.run(lambda: train_upsampler.main(argv))
    Path(job['said']).with_suffix('.counts').write_text(json.dumps(counts))
    status = 0
  except SystemExit as stop:
    if isinstance(stop.code, int):
      status = stop.code
    else:
      print(stop.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _arm(faults: Faults, run: str) -> dict[str, int]:
  """Lets the faults happen; returns counts of file operations, which go on."""
  from unclip_jax.train.log import RunLog
  from unclip_jax.weights.checkpoint import Checkpoints

  counts, fatal = {'in_save': 0, 'in_run': 0}, {'in_save': faults.in_save, 'in_run': faults.in_run}
  limits = (faults.file_size or resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  lock = threading.RLock()

  def look(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith(('open', 'os.', 'shutil.')):
      return
    path = next((str(word) for word in arguments if isinstance(word, str | os.PathLike)), '')
    if not path.startswith(run):
      return
    with lock:
      for name in ('in_run', 'in_save'):
        if name == 'in_run' or 'orbax-checkpoint-tmp' in path:
          counts[name] += 1
          if counts[name] == fatal[name]:
            os.kill(os.getpid(), signal.SIGKILL)

  def wrap(owner: type, name: str) -> None:
    inner, calls = getattr(owner, name), 0

    def outer(*args: Any, **kwargs: Any) -> Any:
      nonlocal calls
      calls += 1
      for where, count, number in faults.signals:
        if where == name and count == calls:
          os.kill(os.getpid(), number)
      return inner(*args, **kwargs)

    setattr(owner, name, outer)

  def begin(log: RunLog, *args: Any, **kwargs: Any) -> None:
    init(log, *args, **kwargs)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if faults.after is not None:
      timer = threading.Timer(faults.after, os.kill, (os.getpid(), signal.SIGKILL))
      timer.daemon = True
      timer.start()
    sys.addaudithook(look)

  init = RunLog.__init__
  RunLog.__init__ = begin
  wrap(RunLog, 'write')
  wrap(Checkpoints, 'save_async')
  return counts


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  _serve()
