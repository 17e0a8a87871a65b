"""How long a model of public size takes to open, against reading its bytes.

  python -m experiments.bench_loading --folder karlo             # 14 GB, written at the first run
  python -m experiments.bench_loading --folder my/karlo --dtype float32
  python -m experiments.bench_loading --folder small --set prior.depth=2     # a smaller one

Cold: the system is told to forget the files (posix_fadvise) before each measurement. What reading
takes is that of the same files, whole, by large blocks into one buffer. Prints seconds, their
ratio, the seconds that processors were at work (a busy machine leaves them as they are), and the
peak of memory that is not mapped files, beyond the parameters themselves.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import unclip_jax
from unclip_jax.config_json import override
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.presets import preset
from unclip_jax.systems.loading import expected_params
from unclip_jax.weights import karlo
from unclip_jax.weights.rules import write_tensors
from unclip_jax.weights.safetensors import named_leaves, save_params

BLOCK = 2**24  # bytes


def write_folder(folder: Path, config: UnclipConfig) -> None:
  """A folder of diffusers with random weights of a config's sizes, a component at a time."""
  needed = 4 * sum(leaf.size for leaf in named_leaves(expected_params(config)).values())
  if shutil.disk_usage(folder.parent).free < needed:
    raise SystemExit(f'{folder}: needs {needed / 2**30:.1f} GiB of disk')
  rng = np.random.default_rng(0)
  tokenizer = Tokenizer.clip()
  for path, values in karlo.write_configs(
    config, tokenizer.transformers_class, tokenizer.end_id
  ).items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(values))
  tokenizer.save_transformers(folder / karlo.TOKENIZER)
  for stage, (_, rules) in karlo.rules(config).items():
    shapes = named_leaves(expected_params(config)[stage])
    parts: dict[str, list] = {}
    for rule in rules:
      component = rule.theirs[0].partition('/')[0] if rule.theirs else ''
      parts.setdefault(component, []).append(rule)
    parts.pop('', None)
    for component, own in parts.items():
      ours = {
        name: 0.02 * rng.standard_normal(shapes[name].shape, np.float32)
        for rule in own
        for name in rule.ours
      }
      tensors = {k.partition('/')[2]: v for k, v in write_tensors(ours, own).items()}
      stem = 'model' if component in karlo.OF_TRANSFORMERS else 'diffusion_pytorch_model'
      path = folder / component / f'{stem}.safetensors'
      save_params(path, tensors, metadata={'format': 'pt'})
      print(f'wrote {path}', file=sys.stderr)


def forget(files: list[Path]) -> None:
  """Lets the system drop what it keeps of files in memory."""
  for file in files:
    with file.open('rb') as handle:
      os.fsync(handle.fileno())
      os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(files: list[Path]) -> float:
  """Seconds that reading all files takes."""
  buffer, start = bytearray(BLOCK), time.perf_counter()
  for file in files:
    with file.open('rb', buffering=0) as handle:
      while handle.readinto(buffer):
        pass
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', type=Path, required=True)
  parser.add_argument('--preset', default='karlo')
  parser.add_argument('--set', nargs='+', default=[], metavar='FIELD=VALUE')
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--load', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.load:
    times, start = os.times(), time.perf_counter()
    before = times.user + times.system
    model = unclip_jax.load(args.folder, args.dtype)
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for tree in model.params.values() for x in named_leaves(tree).values())
    # What the import takes is not counted in either.
    times = os.times()
    print(seconds, times.user + times.system - before, size)
    return
  if not (args.folder / 'model_index.json').exists():
    write_folder(args.folder, override(preset(args.preset), args.set))
  files = sorted(args.folder.rglob('*.safetensors'))
  total = sum(file.stat().st_size for file in files)
  command = [sys.executable, '-m', __spec__.name, '--folder', str(args.folder)]
  command += ['--dtype', args.dtype, '--load']
  print(f'{total / 2**30:.1f} GiB of safetensors, opened in {args.dtype}\n')
  print(
    '| page cache | reading the bytes | unclip_jax.load | ratio | processors | '
    'memory beyond the parameters |'
  )
  print('|---|---|---|---|---|---|')
  for state in ('cold', 'warm'):
    if state == 'cold':
      forget(files)
    reading = read_bytes(files)
    if state == 'cold':
      forget(files)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
      status = Path(f'/proc/{process.pid}/status')
      if status.exists():
        for line in status.read_text().splitlines():
          if line.startswith('RssAnon'):
            peak = max(peak, int(line.split()[1]) * 1024)
      time.sleep(0.02)
    seconds, busy, size = map(float, process.stdout.read().split())
    print(
      f'| {state} | {reading:.1f} s | {seconds:.1f} s | {seconds / reading:.2f} | {busy:.1f} s | '
      f'{(peak - size) / 2**30:.2f} GiB |',
      flush=True,
    )


if __name__ == '__main__':
  main()
