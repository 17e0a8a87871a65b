"""Makes a step again whose loss was bad, from the snapshot that a run of training left.

python -m experiments.emoji.replay runs/emoji_small/prior/bad_step_41
"""

import argparse
from pathlib import Path

from experiments.emoji import common
from experiments.emoji.parser import Parser
from unclip_jax.systems.bad_step import read_bad_step


def main(argv: list[str] | None = None) -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', type=Path, help='bad_step_N, in the folder of a stage')
  args = parser.parse_args(argv)
  bad_step = read_bad_step(args.folder)
  about = bad_step.about
  print(f'step {about["step"]}: {about["what"]}')
  for example in about['examples']:
    print(f'  example {example["id"]}: {example["caption"]}')
  print('in the run:', '  '.join(f'{k} {float(v):.9g}' for k, v in about['metrics'].items()))
  print('once more: ', '  '.join(f'{k} {value:.9g}' for k, value in bad_step.run().items()))


if __name__ == '__main__':
  common.run(main)
