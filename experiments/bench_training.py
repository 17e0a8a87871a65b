"""How fast training steps are: each stage on its own, alone or against diffusers and transformers.

  python -m experiments.bench_training --preset emoji_small --json a.json
  pip install -e '.[parity,train]'
  python -m experiments.bench_training --preset karlo --slice --peer diffusers --dtype bfloat16
  python -m experiments.bench_training --preset paper --slice --stages prior --remat --accumulate 4
  python -m experiments.bench_training --preset tiny-karlo --peer diffusers --no-compile  # a minute

A step is one update of `make_train_step` with the stage's own loss, clipping, AdamW and the average
of the parameters, on random data that is on the device. `--slice` takes few layers of the full
width, where a whole network does not fit; `--set FIELD=VALUE` changes any size. With `--peer
diffusers` the same networks with the same weights, noise and timesteps are trained in torch, in
turn with ours; it needs a model with the architecture of Karlo (`karlo`, `tiny-karlo`).

The JSON has, with seconds as {median, least, most, values}:
  about       date, model, dtype, settings, rounds, updates, platform, device, num_devices, machine,
              threads, load (of the machine, before), versions; peer (name, versions, device, ...)
  peaks       flops_per_second (of a large matrix product), bytes_per_second (of a large copy), ...
  stages      a list, of each stage:
    stage, batch_size, devices, parameters, loss (of the first update)
    compile_seconds, seconds (of an update), examples_per_second
    flops, matmul_flops, bytes     of the compiled update, all devices
    share_of_matmul_peak, share_of_copy
    least_seconds          what the larger share takes at its peak: the estimate of unclip-jax plan
    argument_bytes, temp_bytes     of one device: state and batch, and what an update needs beside
    peak_bytes             the most in use so far, of the device, or the process where it has none
    peer                   name, notes, contenders by their names 'eager' and 'compiled': seconds,
                           ratio (its seconds over ours, a round each); of 'eager' also loss_error,
                           of its first loss (the decoder's: its squared error) relative to ours
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench_sampling import TINY_KARLO, TINY_KARLO_CONFIG
from experiments.training_cases import SLICE, Case, make_case
from unclip_jax import sharding
from unclip_jax.config_json import override
from unclip_jax.configs import UnclipConfig
from unclip_jax.measure import report
from unclip_jax.measure.hlo import program_cost
from unclip_jax.measure.peaks import Peaks, measure_peaks
from unclip_jax.measure.timing import alternate, peak_memory, ratios, seconds, spread
from unclip_jax.presets import preset
from unclip_jax.systems import bench_figures as figures
from unclip_jax.systems.fsdp import placed
from unclip_jax.systems.settings import check_count, check_dtype
from unclip_jax.systems.training import trained_stages
from unclip_jax.terminal import memory_errors, plain_warnings
from unclip_jax.train.state import OptimizerConfig, init_state, make_optimizer, make_train_step
from unclip_jax.types import UnclipError

OURS = 'unclip_jax'
OPTIMIZER = OptimizerConfig()  # the decoder's of Table 3
EMA_DECAY = 0.9999
_GIB = 2**30


def choose_config(args: argparse.Namespace) -> UnclipConfig:
  config = TINY_KARLO_CONFIG if args.preset == TINY_KARLO else preset(args.preset)
  if args.slice:
    if args.preset not in ('paper', 'karlo'):
      raise UnclipError(f'--slice: {args.preset} is small as a whole: leave it out')
    fields = [field for stage in trained_stages(config) for field in SLICE[stage]]
    config = override(config, fields)
  return override(config, args.assignments)


def make_peer(args: argparse.Namespace) -> Any:
  if args.peer is None:
    return None
  if args.devices > 1 or args.accumulate > 1:
    raise UnclipError(f'--peer {args.peer}: it makes whole updates on one device')
  # Both libraries share the memory of a GPU.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  try:
    from experiments.training_peer import TrainingPeer
  except ImportError as error:
    raise UnclipError(
      f"--peer {args.peer} needs {error.name}: pip install 'unclip-jax[parity]'"
    ) from error
  return TrainingPeer(args.compile, args.threads)


def make_contender(
  case: Case, args: argparse.Namespace, key: jax.Array
) -> tuple[Callable[[], float], dict[str, Any]]:
  """Our updates, which return what is compared of the first, and figures of the program."""
  mesh = sharding.make_mesh(args.devices, args.model_devices)
  optimizer = make_optimizer(OPTIMIZER, 1)
  on_cpu = jax.default_backend() == 'cpu'
  step = make_train_step(case.loss_fn, optimizer, EMA_DECAY, args.accumulate, unroll=on_cpu)
  update = placed(step, mesh, args.fsdp)
  state = sharding.place_state(init_state(case.trained, optimizer), mesh, args.fsdp)
  batch = sharding.place_batch(case.batch, mesh)
  key = jax.device_put(key, sharding.replicated(mesh))
  jitted = jax.jit(update, donate_argnums=0)
  program, took = seconds(lambda: jitted.lower(state, batch, key).compile())
  # Of the decoder's loss the peer has a part.
  name = 'mse' if case.stage == 'decoder' else 'loss'

  def run() -> float:
    nonlocal state
    losses = []
    for _ in range(args.updates):
      state, metrics = program(state, batch, key)
      losses.append(metrics[name])
    jax.block_until_ready(state)
    return float(losses[0])

  cost, memory = program_cost(program.as_text()), program.memory_analysis()
  return run, {
    'stage': case.stage,
    'batch_size': args.batch_size,
    'devices': args.devices,
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(case.trained)),
    'compile_seconds': took,
    'flops': cost.flops * args.devices,
    'matmul_flops': cost.matmul_flops * args.devices,
    'bytes': cost.bytes * args.devices,
    'argument_bytes': memory.argument_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
  }


def measure(
  config: UnclipConfig, stage: str, args: argparse.Namespace, peaks: Peaks, peer: Any
) -> dict[str, Any]:
  case = make_case(config, stage, args.batch_size, jnp.dtype(args.dtype), args.remat)
  key, contenders, notes = jax.random.key(0), {}, {}
  if peer is not None:
    # Before ours, whose first update takes the parameters over. A step folds its key with its
    # number.
    contenders, notes = peer.prepare(
      case, jax.random.fold_in(key, 0), OPTIMIZER, args.dtype, args.updates
    )
  run, entry = make_contender(case, args, key)
  del case
  first, times = alternate({OURS: run, **contenders}, args.rounds)
  took = {name: [s / args.updates for s in each] for name, each in times.items()}
  entry['loss'] = first[OURS]
  entry['seconds'] = figures.plain(spread(took[OURS]))
  entry['examples_per_second'] = args.batch_size / entry['seconds']['median']
  figures.add_shares(entry, peaks)
  # The shares are those of all devices of the time that was measured.
  shares = entry['share_of_matmul_peak'], entry['share_of_copy']
  entry['least_seconds'] = entry['seconds']['median'] * max(shares)
  entry['peak_bytes'] = peak_memory(jax.devices()[0])
  if peer is not None:
    entry['peer'] = {'name': peer.about()['name'], 'notes': notes, 'contenders': {}}
    for name in contenders:
      entry['peer']['contenders'][name] = {
        'seconds': figures.plain(spread(took[name])),
        'ratio': figures.plain(ratios(took[name], took[OURS])),
      }
    error = abs(first['eager'] - first[OURS]) / abs(first[OURS])
    entry['peer']['contenders']['eager']['loss_error'] = error
  return entry


def to_text(results: dict[str, Any]) -> str:
  about, peaks = results['about'], results['peaks']
  versions = dict(about['versions']) | about.get('peer', {}).get('versions', {})
  head = [
    f'training steps of {about["model"]}, {about["dtype"]}, {about["date"]}',
    f'device    {about["num_devices"]} × {about["device"]} ({about["platform"]}), '
    f'{about["machine"]}, {about["threads"]} threads, load {about["load"]}',
    'versions  ' + ', '.join(f'{name} {version}' for name, version in versions.items()),
    'settings  ' + ', '.join(f'{name} {value}' for name, value in about['settings'].items()),
    f'peaks     {peaks["flops_per_second"] / 1e12:.3g} TFLOP/s, copy '
    f'{peaks["bytes_per_second"] / 1e9:.3g} GB/s; {about["rounds"]} rounds of '
    f'{about["updates"]} updates',
  ]
  rows = [
    [
      e['stage'],
      str(e['batch_size']),
      f'{e["parameters"] / 1e6:.1f}',
      f'{e["compile_seconds"]:.1f}',
      *(f'{e["seconds"][k]:.4g}' for k in ('median', 'least', 'most')),
      f'{e["examples_per_second"]:.4g}',
      f'{e["share_of_matmul_peak"]:.1%}',
      f'{e["least_seconds"]:.4g}',
      *(f'{e[k] / _GIB:.2f}' for k in ('argument_bytes', 'temp_bytes')),
      '' if e['peak_bytes'] is None else f'{e["peak_bytes"] / _GIB:.2f}',
    ]
    for e in results['stages']
  ]
  names = ['stage', 'batch', 'M params', 'compile s', 's', 'least', 'most', 'examples/s', 'of peak']
  names += ['at best s', 'state GiB', 'temp GiB', 'peak GiB']
  parts = ['\n'.join(head), report.table('updates', names, rows)]
  rows, notes = [], []
  for e in results['stages']:
    for name, contender in e.get('peer', {}).get('contenders', {}).items():
      ratio, error = contender['ratio'], contender.get('loss_error')
      rows.append(
        [
          e['stage'],
          name,
          f'{contender["seconds"]["median"]:.4g}',
          *(f'{ratio[k]:.2f}' for k in ('median', 'least', 'most')),
          '' if error is None else f'{error:.1e}',
        ]
      )
    notes += [f'{e["stage"]}: {k} {v}' for k, v in e.get('peer', {}).get('notes', {}).items()]
  if rows:
    names = ['stage', 'peer', 'its s', 'ratio', 'least', 'most', 'loss error']
    parts.append(report.table('against the peer (ratio: its seconds over ours)', names, rows))
    parts.append('\n'.join(line for note in notes for line in report.wrapped(note)))
  return '\n\n'.join(parts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--preset', default='emoji_small', help='tiny, emoji_small, emoji, paper, karlo, tiny-karlo')
  add('--slice', action='store_true', help='few layers of the full width, of paper and karlo')
  add('--set', dest='assignments', action='append', default=[], metavar='FIELD=VALUE')
  add('--stages', nargs='+', default=[])
  add('--batch-size', type=int, default=16)
  add('--dtype', default='float32')
  add('--remat', action='store_true')
  add('--accumulate', type=int, default=1)
  add('--devices', type=int, default=1)
  add('--model-devices', type=int, default=1)
  add('--fsdp', action='store_true')
  add('--rounds', type=int, default=5)
  add('--updates', type=int, default=4, help='of a round')
  add('--peer', choices=['diffusers'])
  add('--compile', action=argparse.BooleanOptionalAction, default=True, help='torch.compile, too')
  add('--threads', type=int, default=figures.num_threads(), help='of torch; by default all')
  add('--json')
  return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> dict[str, Any]:
  check_dtype(args.dtype)
  for name in ('batch_size', 'accumulate', 'rounds', 'updates'):
    check_count(f'--{name.replace("_", "-")}', getattr(args, name))
  out = None if args.json is None else report.check_writable(args.json)
  config = choose_config(args)
  known = list(trained_stages(config))
  wanted = args.stages or known
  if unknown := [stage for stage in wanted if stage not in known]:
    raise UnclipError(f'there is no stage {unknown[0]!r} here: take {", ".join(known)}')
  peer = make_peer(args)  # before JAX takes all memory of a GPU
  unit = sharding.make_mesh(args.devices, args.model_devices).shape[sharding.DATA_AXIS]
  if args.batch_size % (unit * args.accumulate):
    raise UnclipError(
      f'--batch-size {args.batch_size}: take a multiple of {unit * args.accumulate}'
    )
  about = {'model': args.preset, 'dtype': args.dtype, 'rounds': args.rounds}
  names = ('slice', 'assignments', 'remat', 'accumulate', 'devices', 'model_devices', 'fsdp')
  about |= {'updates': args.updates, 'settings': {name: getattr(args, name) for name in names}}
  about |= figures.machine()
  about |= {} if peer is None else {'peer': peer.about()}
  peaks = measure_peaks(args.dtype)
  results: dict[str, Any] = {'about': about, 'peaks': peaks._asdict(), 'stages': []}
  precision = 'highest' if args.dtype == 'float32' else 'default'
  for stage in wanted:
    print(f'{stage} ...', file=sys.stderr)
    with jax.default_matmul_precision(precision):
      results['stages'].append(measure(config, stage, args, peaks, peer))
  print(to_text(results))
  if out is not None:
    report.write_json(out, results)
  return results


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  try:
    with plain_warnings(), memory_errors():
      run(args)
  except UnclipError as error:
    sys.exit(f'bench_training: error: {error}')


if __name__ == '__main__':
  main()
