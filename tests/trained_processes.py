"""Training scripts as one of several processes, for the tests that start them.

The processes import this module, which must not wake JAX: they have to find each other first.
"""

import csv
from pathlib import Path

from experiments.emoji import common, train_clip
from unclip_jax import processes, sharding

# With Adam's own eps a gradient of nothing but rounding errors would move its parameter as others.
SHORT = [
  '--preset=tiny',
  '--set=optimizer.warmup_steps=0',
  '--set=optimizer.eps=1e-3',
  '--steps=4',
  '--chunk=1',
  '--save-every=2',
  '--batch-size=8',
  '--fsdp',
  '--set=clip.text.depth=1',
  '--set=clip.vision.depth=1',
  '--set=upsamplers.0.unet.multipliers=[1]',
  '--set=upsamplers.0.sampling.num_steps=1',
]
EMOJI = ['--styles=flat', '--groups=food-drink', '--pool-size=16']


def measure_nothing(params):
  """In place of what takes longer to compile than a step of training."""
  return {}, 'nothing was measured'


def train_twice(run, shards, *of_this_process):
  """CLIP on shards of pictures and on emoji, by one process or as one of several."""
  if of_this_process:
    sharding.FSDP_MIN_SIZE, train_clip.NUM_RETRIEVAL = 64, 5  # nothing is large here
    train_clip.make_evaluation = lambda *_: measure_nothing
  on_shards = [f'--run={run}', f'--shards={shards}', *SHORT, *of_this_process]
  common.run(lambda: train_clip.main(on_shards))
  if of_this_process:
    found = processes.Processes(int(of_this_process[-1].partition('=')[2]), 2)
    processes.start_processes = lambda *_: found  # a script is a process of its own elsewhere
  on_emoji = [f'--run={run}/emoji', *SHORT, *EMOJI, *of_this_process]
  common.run(lambda: train_clip.main(on_emoji))
  if of_this_process:
    processes.wait_for_processes()


def train_until_killed(run, *of_this_process):
  """CLIP on emoji, through the script's own end."""
  train_clip.make_evaluation = lambda *_: measure_nothing
  arguments = [f'--run={run}', *SHORT, *EMOJI, '--steps=100000', *of_this_process]
  common.run(lambda: train_clip.main(arguments))


def by_hand(number: int, address: str) -> list[str]:
  """The options of process `number` of two; its number as the last."""
  return [f'--coordinator={address}', '--num-processes=2', f'--process-id={number}']


def losses(run: Path, stage: str, name: str = 'loss') -> dict[int, float]:
  """Those of the steps in the log, or another column of it."""
  with (run / stage / 'metrics.csv').open() as file:
    return {int(row['step']): float(row[name]) for row in csv.DictReader(file) if row[name]}
