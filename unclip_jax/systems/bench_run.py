"""A benchmark from its options to its text, JSON and plot, for the command and for scripts."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from unclip_jax.measure import report
from unclip_jax.systems import bench
from unclip_jax.systems.bench_subject import Options, Subject
from unclip_jax.types import UnclipError


class Outputs(NamedTuple):
  """Files that are written, the JSON also after each stage; None for none."""

  json: Path | None
  plot: Path | None
  before: dict[str, Any] | None = None  # what the JSON holds, of a run that this one continues

  @classmethod
  def checked(
    cls,
    json: str | Path | None,
    plot: str | Path | None,
    profile: str | Path | None,
    resume: bool = False,
  ) -> Self:
    """The files, if they can be written, as can the folder of traces.

    Raises:
      UnclipError: one cannot, there is nothing to plot with, or nothing to continue; nothing has
        been measured yet.
    """
    if json is not None and plot is not None and Path(json) == Path(plot):
      raise UnclipError(f'--json and --plot both write {json}: give them names of their own')
    before = _read(json) if resume else None
    if plot is not None:
      report.check_can_plot(plot)
    if profile is not None:
      try:
        Path(profile).mkdir(parents=True, exist_ok=True)
      except OSError as error:
        reason = error.strerror
        raise UnclipError(f'{profile} cannot be made ({reason}): take another path') from error
    return cls(*(None if p is None else report.check_writable(p) for p in (json, plot)), before)

  def write(self, results: dict[str, Any]) -> None:
    """Prints the tables to standard output, and writes what was asked for."""
    print(report.to_text(results), flush=True)
    if self.json is not None:
      report.write_json(self.json, results)
    if self.plot is not None:
      report.plot(self.plot, results)


def _read(path: str | Path | None) -> dict[str, Any] | None:
  """What a run before has written, if there was one."""
  if path is None:
    raise UnclipError('--resume continues from the file of --json: name it')
  return read_results(path) if Path(path).exists() else None


def read_results(path: str | Path) -> dict[str, Any]:
  """What the JSON of a benchmark holds.

  Raises:
    UnclipError: it cannot be read, or holds something else.
  """
  try:
    found = json.loads(Path(path).read_text())
  except (OSError, ValueError):
    found = None
  if not _has_figures(found):
    raise UnclipError(f'{path} holds no figures of a benchmark: take another file')
  return found


def _has_figures(found: Any) -> bool:
  if not isinstance(found, dict):
    return False
  about, stages = found.get('about'), found.get('stages')
  if not isinstance(about, dict) or not {'date', 'steps'} <= about.keys():
    return False
  of_each = {'stage', 'devices', 'batch_size', 'seconds'}
  return isinstance(stages, list) and all(
    isinstance(entry, dict) and of_each <= entry.keys() for entry in stages
  )


def run(
  subject: Subject, options: Options, outputs: Outputs, peer: bench.Peer | None = None
) -> dict[str, Any]:
  """Measures, prints the tables to standard output and what is under way to standard error.

  Raises:
    UnclipError: as `bench.check`.
  """

  def save(results: dict[str, Any]) -> None:
    if outputs.json is not None:
      report.write_json(outputs.json, results)

  tell = lambda line: print(line, file=sys.stderr)  # noqa: E731
  results = bench.measure(subject, options, peer, tell, save, outputs.before)
  outputs.write(results)
  return results
