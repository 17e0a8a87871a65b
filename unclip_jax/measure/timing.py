"""Seconds of things that alternate, how far they spread, and the memory that was in use."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax


class Spread(NamedTuple):
  """Measurements of one thing, seconds or ratios: the middle one, the extremes, and all of them."""

  median: float
  least: float
  most: float
  values: tuple[float, ...]


def spread(values: Iterable[float]) -> Spread:
  """The spread of one measurement or more."""
  values = tuple(values)
  return Spread(statistics.median(values), min(values), max(values), values)


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> Spread:
  """The spread of the ratios of what was measured one after the other."""
  return spread(a / b for a, b in zip(numerators, denominators, strict=True))


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
  """What a call gives, and how long it took; `run` waits for devices itself."""
  start = time.perf_counter()
  result = run()
  return result, time.perf_counter() - start


def alternate(
  contenders: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
  """Times contenders in turn, so that what else goes on on a machine meets them all.

  Args:
    contenders: by name, what is timed; each waits for its device before it returns.
    rounds: how often each is timed, after one run of each that is not.

  Returns:
    What that first run of each gave, and the seconds of each round.
  """
  results = {name: run() for name, run in contenders.items()}
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, run in contenders.items():
      times[name].append(seconds(run)[1])
  return results, times


def peak_memory(device: jax.Device) -> int | None:
  """The most bytes in use so far: of the device where it says, of the process on a CPU, else None.

  A CPU's arrays are in the memory of the process, with all that is not an array.
  """
  stats = device.memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return int(stats['peak_bytes_in_use'])
  if device.platform != 'cpu' or sys.platform == 'win32':
    return None
  import resource  # there is none on Windows

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024
