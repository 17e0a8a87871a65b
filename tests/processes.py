"""Starts `unclip-jax generate` in processes of their own, for the tests of several of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_model import levels_apart

ROOT = Path(__file__).parent.parent


def free_address() -> str:
  """HOST:PORT on this machine that nothing listens at."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{listener.getsockname()[1]}'


def environment(cache: Path, num_devices: int = 1, **more: str) -> dict[str, str]:
  """Of a process with so many virtual devices, which keeps its programs in `cache`."""
  return os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={num_devices}',
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


def pictures(out: Path) -> dict[str, np.ndarray]:
  """What is in a folder by name."""
  return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob('*.png'))}


def assert_same(out: Path, expected: dict[str, np.ndarray]) -> None:
  """Within a grey level: programs of other batch sizes and devices round otherwise."""
  found = pictures(out)
  assert [*found] == [*expected]
  assert {path.name for path in out.iterdir()} == {*found, 'series.json'}
  assert max(levels_apart(found[name], expected[name]) for name in found) <= 1
