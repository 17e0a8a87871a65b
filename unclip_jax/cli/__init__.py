"""The command line, `unclip-jax`: generate, manipulations, info, evaluate, convert and others.

What takes long to import (JAX, and all that needs it) is imported by the commands, so that --help
and slips of the fingers are answered at once.
"""

import sys
from typing import Annotated

import typer

import unclip_jax
from unclip_jax.cli.bench import bench
from unclip_jax.cli.compile import compile_ahead
from unclip_jax.cli.convert import convert
from unclip_jax.cli.demo import demo
from unclip_jax.cli.evaluate import evaluate
from unclip_jax.cli.export import export
from unclip_jax.cli.generate import generate
from unclip_jax.cli.info import info
from unclip_jax.cli.manipulate import (
  inpaint,
  interpolate,
  pca,
  reconstruct,
  redraw,
  text_diff,
  variations,
)
from unclip_jax.cli.plan import plan
from unclip_jax.cli.probe import probe
from unclip_jax.cli.sweep import sweep

app = typer.Typer(
  name='unclip-jax',
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  context_settings={'help_option_names': ['-h', '--help']},
)
app.command(epilog='Example: unclip-jax generate "a red apple, flat style" "a rocket" -n 4 -s 7')(
  generate
)
app.command(epilog='Example: unclip-jax variations fox.png --eta 0.6 -n 6')(variations)
app.command(epilog='Example: unclip-jax interpolate fox.png owl.png -n 9')(interpolate)
app.command(epilog='Example: unclip-jax text-diff cat.png "a flat cat" "a 3D cat" --theta 0.4')(
  text_diff
)
app.command(epilog='Example: unclip-jax pca fox.png owl.png --fit photos --dims 20,40,80,160')(pca)
app.command(epilog='Example: unclip-jax reconstruct fox.png owl.png --steps 100')(reconstruct)
app.command(epilog='Example: unclip-jax inpaint fox.png "a fox with a hat" --mask hat.png')(inpaint)
app.command(epilog='Example: unclip-jax redraw fox.png "a blue fox" --strength 0.5')(redraw)
app.command(epilog='Example: unclip-jax demo --port 8000')(demo)
app.command(epilog='Example: unclip-jax info --vocabulary --matching fish --pictures fish.png')(
  info
)
app.command(epilog='Example: unclip-jax evaluate out --reference coco --inception fid.pth')(
  evaluate
)
app.command(epilog='Example: unclip-jax sweep coco --clip ViT-L-14.pt --num 2000 --plot sweep.png')(
  sweep
)
app.command(epilog='Example: unclip-jax probe val --train train --model ViT-L-14.pt')(probe)
app.command(epilog='Example: unclip-jax convert kakaobrain/karlo-v1-alpha karlo --dtype bfloat16')(
  convert
)
app.command('compile', epilog='Example: unclip-jax compile --batch-sizes 1,4 --dtype bfloat16')(
  compile_ahead
)
app.command(epilog='Example: unclip-jax export default program --platforms cuda,tpu')(export)
app.command(epilog='Example: unclip-jax bench --preset karlo --batch-sizes 1,4 --json karlo.json')(
  bench
)
app.command(epilog='Example: unclip-jax plan decoder --topology v5e:16x16 --fsdp --remat')(plan)


def _show_version(wanted: bool) -> None:
  if wanted:
    print(f'unclip-jax {unclip_jax.__version__}')
    raise typer.Exit


@app.callback()
def options(
  version: Annotated[
    bool,
    typer.Option(
      '--version', help='Show the version and exit.', callback=_show_version, is_eager=True
    ),
  ] = False,
) -> None:
  """Draw pictures from captions with unCLIP (DALL·E 2), in JAX."""


def main(args: list[str] | None = None) -> None:
  """Runs the command line; a mistake of the user's is one line on stderr, and status 1 or 2."""
  try:
    status = app(args, prog_name='unclip-jax', standalone_mode=False)
  except Exception as error:
    from unclip_jax.types import UnclipError

    if isinstance(error, UnclipError):
      message, status = str(error), 1
    elif type(error).__name__ == 'NoArgsIsHelpError':
      error.show()
      sys.exit(2)
    elif hasattr(error, 'format_message'):  # typer's usage errors, click's or its own
      message, status = f'{error.format_message()} (see unclip-jax --help)', 2
    else:
      raise
    print(f'unclip-jax: error: {message}', file=sys.stderr)
  sys.exit(status or 0)
