"""Starts `unclip-jax generate`, or a test's function, in processes of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tiny_model import levels_apart

ROOT = Path(__file__).parent.parent


def free_address() -> str:
  """HOST:PORT on this machine that nothing listens at."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{listener.getsockname()[1]}'


def environment(cache: Path, num_devices: int = 1, level: int = 3, **more: str) -> dict[str, str]:
  """Of a process with so many virtual devices, which keeps its programs in `cache`.

  Code of level 0 is compiled sooner.
  """
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={num_devices}'
  return os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'XLA_FLAGS': f'{flags} --xla_backend_optimization_level={level}',
    **more,
  }


def start(args: list[object], env: dict[str, str], before: str = '') -> subprocess.Popen[str]:
  """Starts the command line, after the line of Python `before`."""
  code = f'{before}\nfrom unclip_jax.cli import main\nmain()'
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, args)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_function(
  function: Callable[..., None], *arguments: object, env: Mapping[str, str]
) -> subprocess.Popen[str]:
  """Starts a function of a test module, which is given the arguments as words."""
  code = f"""
import sys
sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]}
import conftest, {function.__module__} as module
module.{function.__name__}(*sys.argv[1:])
"""
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, arguments)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def in_a_process(function: Callable[..., None], *arguments: object, num_devices: int = 8) -> None:
  """Runs a function of a test module where there are so many virtual devices.

  What such a process has compiled the next one finds.
  """
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    # Code that runs for a moment need not be fast.
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={num_devices} '
    '--xla_backend_optimization_level=0',
  }
  process = start_function(function, *arguments, env=env)
  _, said = process.communicate()
  assert process.returncode == 0, said


def pictures(out: Path) -> dict[str, np.ndarray]:
  """What is in a folder by name."""
  return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob('*.png'))}


def assert_same(out: Path, expected: dict[str, np.ndarray]) -> None:
  """Within a grey level: programs of other batch sizes and devices round otherwise."""
  found = pictures(out)
  assert [*found] == [*expected]
  assert {path.name for path in out.iterdir()} == {*found, 'series.json'}
  assert max(levels_apart(found[name], expected[name]) for name in found) <= 1
