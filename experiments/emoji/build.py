"""Builds the captioned emoji at any size: `python -m experiments.emoji.build --size 128 --out DIR`.

Needs the `data` extra and npm on the PATH. Reading a build needs neither.
"""

import argparse
import sys
import time
from pathlib import Path

from experiments.emoji import builder
from experiments.emoji.captions import STYLES
from unclip_jax.types import UnclipError

DEFAULT_CACHE = Path.home() / '.cache' / 'unclip_jax' / 'npm'


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.emoji.build',
    description='Render the emoji of five open icon sets as RGBA sprites, a TFDS data set in '
    'ArrayRecord. 64 px takes two minutes on one core, 1024 px an hour or more.',
  )
  parser.add_argument(
    '--size',
    type=int,
    default=64,
    help='pixels of a side (default %(default)s); above 256 the 3D style is left out',
  )
  parser.add_argument(
    '--out', type=Path, required=True, metavar='DIR', help='new or empty folder for the data set'
  )
  parser.add_argument(
    '--styles',
    nargs='+',
    choices=STYLES,
    default=STYLES,
    help='which styles to render (default: all)',
  )
  parser.add_argument(
    '--groups', nargs='+', help="which of emojibase's groups, such as food-drink (default: all)"
  )
  parser.add_argument(
    '--colour-bits',
    type=int,
    choices=range(4, 9),
    default=8,
    help='bits of a channel; fewer make smaller files (default %(default)s)',
  )
  parser.add_argument(
    '--cache',
    type=Path,
    default=DEFAULT_CACHE,
    metavar='DIR',
    help='folder that keeps the downloaded npm packages, 43 MB (default %(default)s)',
  )
  args = parser.parse_args(argv)
  start = time.monotonic()
  try:
    counts = builder.build(
      args.size,
      args.out,
      args.cache,
      args.styles,
      args.colour_bits,
      _print_progress,
      args.groups,
    )
  except UnclipError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(f'\n{counts} in {args.out}, {time.monotonic() - start:.0f} s')
  return 0


def _print_progress(done: int, total: int) -> None:
  if done % 100 == 0 or done == total:
    print(f'\rrendered {done} of {total}', end='', flush=True)


if __name__ == '__main__':
  sys.exit(main())
