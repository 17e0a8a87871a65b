"""How fast sampling is: each stage and all together, on their own or against diffusers.

  pip install -e '.[parity,train]'
  python -m experiments.bench_sampling --preset karlo --steps 25 25 7 --peer diffusers --json a.json
  python -m experiments.bench_sampling --preset karlo --batch-sizes 1 4 16 --dtype bfloat16
  python -m experiments.bench_sampling --preset tiny-karlo --peer diffusers       # in a minute
  python -m experiments.bench_sampling --model my/karlo --stages prior decoder --profile traces
  python -m experiments.bench_sampling --merge prior.json decoder.json    # of runs on one machine

`unclip-jax bench` measures the same without a peer. What is measured and how: docs/benchmarks.md.
`--merge` prints the stages that several runs have measured, and their sum end to end.
`--preset` has random weights of its sizes, held one stage at a time; `tiny-karlo` is the smallest
model with the architecture of Karlo. With `--peer diffusers` our parameters are written into its
networks, and both sides run in turn on one device with the same noise, text features and caches
made anew each time. A peer's end to end is the sum of the stages, as two copies of all of them take
much memory.

The JSON has, with seconds as {median, least, most, values}:
  about       date, model, dtype, steps, samplers, guided (stages), rounds, model_devices (share one
              copy of the parameters), platform, device, num_devices, machine, threads, load (of the
              machine, before), versions; peer (name, versions, device, threads, attention); resumed
              (stages that an earlier run measured, with its date)
  peaks       flops_per_second (of a large matrix product), bytes_per_second (of a large copy, read
              and written), skinny_bytes_per_second (weights of a product of skinny_rows rows)
  stages      a list, of each stage, number of devices and batch size:
    stage, batch_size, devices, steps (null where nothing is sampled)
    compile_seconds        tracing and compiling
    seconds                of a run, from its inputs on the device to its result there
    images_per_second      by the median
    flops, matmul_flops, bytes     of the compiled program, loops as often as they run, all devices;
                           matmul_flops are those of matrix products and convolutions
    analytic_flops         matmul_flops counted by hand; null where nobody has
    share_of_matmul_peak   matmul_flops a second, over the peak
    share_of_copy          bytes a second, over those of the copy
    program_bytes          parameters and arguments, results, and what the program needs in between
    peak_bytes             the most in use so far, of the device, or the process where it has none
    step                   of the prior: rows of its products, seconds of one step (the difference
                           of runs with all and half of the steps; left out where runs differ by
                           more than that), weights_bytes_per_second, and share_of_skinny where
                           the skinny product has as many rows
    peer                   name; notes (memory_format, torch.compile, ...); contenders, by
                           their names 'eager' and 'compiled': seconds, ratio (its seconds over
                           ours, a round each), largest_error and rms_error of our result, over the
                           standard deviation of its
  end_to_end  a list, of each number of devices and batch size: batch_size, devices, steps, seconds,
              images_per_second, first_image_seconds (compiling and one run); without a peer
              peak_bytes; with one sum_of_stages (true) and peer, as above without errors
"""

import argparse
import os
import sys

from unclip_jax.config_json import override
from unclip_jax.presets import preset
from unclip_jax.systems import bench_figures, bench_subject
from unclip_jax.systems.bench import Peer
from unclip_jax.systems.bench_run import Outputs, read_results, run
from unclip_jax.terminal import memory_errors, plain_warnings
from unclip_jax.types import UnclipError

TINY_KARLO = 'tiny-karlo'
# The architecture of Karlo at the sizes of the tiny preset.
TINY_KARLO_CONFIG = override(
  preset('tiny'),
  [
    'clip.unit_norm=false',
    'clip.embed_dim=24',
    'prior.embed_dim=24',
    'prior.unit_norm=false',
    'prior.num_candidates=1',
    'prior.diffusion.clip_x_0=4.0',
    'prior.sampling.spacing=karlo',
    'prior.sampling.guidance_scale=4.0',
    'decoder.embed_dim=24',
    'decoder.embed_scale=1.0',
    'decoder.text=null',
    'decoder.clip_text_width=24',
    'decoder.sampling.spacing=karlo',
    'upsamplers.0.sampling.spacing=karlo',
    'upsamplers.0.sampling.sampler=ddpm',
    'upsamplers.0.final_unet=true',
    'upsamplers.0.unet.patch_size=1',
  ],
)


def make_peer(name: str | None, try_compile: bool, num_threads: int) -> Peer | None:
  if name is None:
    return None
  # Both libraries share the memory of a GPU.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  try:
    from experiments.karlo_peer import Karlo
  except ImportError as error:
    raise UnclipError(
      f"--peer {name} needs {error.name}: pip install 'unclip-jax[parity]'"
    ) from error
  return Karlo(try_compile, num_threads)


def make_subject(args: argparse.Namespace) -> bench_subject.Subject:
  if args.preset is None:
    return bench_subject.of_model(args.model or 'default', args.dtype)
  if args.preset == TINY_KARLO:
    return bench_subject.of_preset(TINY_KARLO, TINY_KARLO_CONFIG)
  return bench_subject.of_preset(args.preset)


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  what = parser.add_mutually_exclusive_group()
  what.add_argument('--model', help="a folder, or a hub's owner/name; by default the package's own")
  what.add_argument('--preset', help='random weights of its sizes: karlo, tiny-karlo, emoji, ...')
  what.add_argument(
    '--merge', nargs='+', metavar='JSON', help='what runs have measured, as one; measures nothing'
  )
  parser.add_argument('--peer', choices=['diffusers'])
  parser.add_argument(
    '--compile', action=argparse.BooleanOptionalAction, default=True, help='torch.compile, too'
  )
  parser.add_argument(
    '--threads', type=int, default=bench_figures.num_threads(), help='of torch; by default all'
  )
  parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1])
  parser.add_argument('--devices', nargs='+', type=int, default=[1])
  parser.add_argument(
    '--model-devices', type=int, default=1, help='how many of them share one copy of the parameters'
  )
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--steps', nargs='+', type=int, default=[], help='as 25 25 7')
  parser.add_argument('--sampler')
  parser.add_argument('--guided', action='store_true', default=None)
  parser.add_argument('--unguided', action='store_false', dest='guided')
  parser.add_argument('--stages', nargs='+', default=[])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json')
  parser.add_argument(
    '--resume', action='store_true', help='do not measure again what --json holds of a run like it'
  )
  parser.add_argument('--plot')
  parser.add_argument('--profile', metavar='FOLDER')
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  options = bench_subject.Options(
    batch_sizes=tuple(args.batch_sizes),
    devices=tuple(args.devices),
    model_devices=args.model_devices,
    dtype=args.dtype,
    steps=tuple(args.steps),
    sampler=args.sampler,
    guided=args.guided,
    stages=tuple(args.stages),
    rounds=args.rounds,
    profile=args.profile,
  )
  try:
    with plain_warnings(), memory_errors():
      outputs = Outputs.checked(args.json, args.plot, args.profile, args.resume)
      if args.merge is not None:
        outputs.write(bench_figures.merged({file: read_results(file) for file in args.merge}))
        return
      peer = make_peer(args.peer, args.compile, args.threads)
      run(make_subject(args), options, outputs, peer)
  except UnclipError as error:
    sys.exit(f'bench_sampling: error: {error}')


if __name__ == '__main__':
  main()
