"""The command line of the training scripts."""

import argparse
import dataclasses
from pathlib import Path
from typing import NoReturn

from experiments.source_options import add_source_options
from unclip_jax import processes
from unclip_jax.presets import PRESETS
from unclip_jax.train.state import OptimizerConfig
from unclip_jax.types import UnclipError

PRESET = 'emoji_small'


class Parser(argparse.ArgumentParser):
  """Says what is wrong with options in one line, through `common.run`."""

  def error(self, message: str) -> NoReturn:
    """Raises UnclipError in place of printing the usage and leaving."""
    raise UnclipError(f'{message} (see --help)')


def make_parser(description: str) -> Parser:
  """The options that all training scripts have, made before JAX is asked for a device."""
  parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--run', type=Path, default=Path('runs/emoji_small'), help='folder of the run')
  add('--init', default=None, help="a model whose weights to start from, such as 'default'")
  add(
    '--preset',
    default=None,
    help=f'one of {", ".join(PRESETS)}; without one that of --init, or {PRESET}',
  )
  add(
    '--set',
    dest='assignments',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='overrides of the preset (decoder.width=96) or of the optimiser (optimizer.FIELD of: '
    + ', '.join(f'{field.name}' for field in dataclasses.fields(OptimizerConfig))
    + ')',
  )
  add('--tokenizer', metavar='FILE', help="of a preset: 'clip', or a file (the run's, or emoji's)")
  help_text = 'defaults of optimiser, batch size, steps and average: those of its Table 3'
  add('--recipe', choices=['paper'], help=help_text)
  add('--steps', type=int, help='updates in all, those of earlier starts included')
  add('--batch-size', type=int, help='examples of an update')
  add('--ema-decay', type=float, help='of the average that is exported')
  add('--chunk', type=int, help='updates between log lines (100, on a CPU 20)')
  add('--save-every', type=int, default=1000, help='updates between checkpoints')
  add('--keep', type=int, default=2, help='how many of the latest checkpoints stay')
  bad_help = 'at a loss that is NaN, infinite or a spike: stop with a snapshot, or skip the step'
  add('--on-bad-loss', choices=('stop', 'skip'), default='stop', help=bad_help)
  spike_help = 'times the median of the last 64 losses, from where a loss is a spike (none is)'
  add('--spike-factor', type=float, metavar='FACTOR', help=spike_help)
  add(
    '--draft-steps', type=int, default=2500, help="of the decoder's draft first; 0 keeps --init's"
  )
  add('--minutes', type=float, default=None, help='stop with a checkpoint after so long')
  add('--pool-size', type=int, help='composed examples held in memory')
  add('--styles', nargs='+', default=None, help='of flat 3d noto twemoji (all)')
  add('--groups', nargs='+', default=None, help="emojibase's, such as food-drink (all)")
  add('--labels', nargs='+', default=(), help='objects beside those of --groups, such as rocket')
  add('--scene-fraction', type=float, default=0.15, help='pictures of two objects')
  add('--jitter', type=float, default=0.04, help='largest change of scale and of place')
  add('--stage', type=int, default=0, help='which of the upsamplers, by train_upsampler')
  add('--data', type=Path, default=None, help='a build of experiments.emoji.build')
  add('--seed', type=int, default=0, help='of everything random')
  add('--dtype', help='of the networks (bfloat16, on a CPU float32)')
  add('--fsdp', action='store_true', help='split parameters, average and moments over the devices')
  add('--model-devices', type=int, default=1, help='devices that share one copy of the networks')
  add('--accumulate', type=int, default=1, help='parts of a batch, computed one after the other')
  add('--remat', action='store_true', help='compute activations twice, in place of keeping them')
  _add_processes(parser)
  return parser


def add_lora(parser: Parser) -> None:
  """The options of a script that can train adapters."""
  add = parser.add_argument
  add(
    '--lora',
    type=int,
    metavar='RANK',
    help='train low-rank adapters of attention alone, beside the frozen weights of --init',
  )
  add('--lora-alpha', type=float, metavar='ALPHA', help='adapters count ALPHA / RANK times (RANK)')
  add('--init-lora', type=Path, metavar='FILE', help='adapters to start from, in place of --lora')


def add_contrast(parser: Parser) -> None:
  """The options of a script that trains CLIP, whose loss compares all of a batch."""
  add = parser.add_argument
  add(
    '--sam-rho',
    type=float,
    help="length of SAM's perturbations; in the paper 0.1; 0 for none",
  )
  add('--sam-group', type=int, help='examples that share a perturbation')
  add('--cache-chunk', type=int, help='examples whose activations are held at a time (all)')
  add('--loss-chunk', type=int, help='columns of logits that are held at a time (all)')


def add_source(parser: Parser) -> None:
  """The options of a script that can train on any captioned pictures in place of emoji."""
  add_source_options(parser, required=False)


def _add_processes(parser: Parser) -> None:
  add = parser.add_argument
  add('--distributed', action='store_true', help='one of several processes (Slurm, a TPU, ...)')
  add('--coordinator', metavar='HOST:PORT', help='of process 0, where no launcher says it')
  add('--num-processes', type=int, help='with --coordinator')
  add('--process-id', type=int, help='with --coordinator: from 0')
  add(
    '--heartbeat-seconds',
    type=int,
    default=processes.HEARTBEAT_SECONDS,
    help='all end after so long without a sign of one of several processes',
  )
