"""`unclip-jax convert`: a model in another format."""

from typing import Annotated

import typer

import unclip_jax
from unclip_jax.cli.options import PriorModelOption


def convert(
  model: Annotated[
    str, typer.Argument(metavar='MODEL', help="A folder, a hub's owner/name, or 'default'.")
  ],
  out: Annotated[str, typer.Argument(metavar='FOLDER', help='Where the files go.')],
  to: Annotated[
    str,
    typer.Option(
      help='unclip (this package), diffusers (a pipeline), transformers (its CLIP alone) or orbax.'
    ),
  ] = 'unclip',
  dtype: Annotated[
    str, typer.Option(help='Of what is written: float32, bfloat16 or float16.')
  ] = 'float32',
  prior_model: PriorModelOption = None,
) -> None:
  """Write a model, public or trained here, in another format."""
  from unclip_jax.systems.convert import convert as write
  from unclip_jax.terminal import plain_warnings

  with plain_warnings():
    write(model, out, to, dtype, f'unclip_jax {unclip_jax.__version__}', prior_model)
  print(out)
