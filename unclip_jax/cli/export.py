"""`unclip-jax export`: all stages as one program, for other machines."""

from typing import Annotated, Any

import typer

import unclip_jax
from unclip_jax.cli.options import (
  MACHINE,
  CandidatesOption,
  DtypeOption,
  PriorModelOption,
  SizeOption,
  option,
  with_samplings,
)


@with_samplings
def export(
  model: Annotated[
    str, typer.Argument(metavar='MODEL', help="A folder, a hub's owner/name, or 'default'.")
  ],
  out: Annotated[str, typer.Argument(metavar='FOLDER', help='A new folder for the program.')],
  platforms: Annotated[
    str | None, option(MACHINE, "cpu, cuda, rocm or tpu. (default: this machine's)", 'NAME,NAME')
  ] = None,
  batch_size: Annotated[
    int, typer.Option(metavar='N', help='Pictures that the program draws at a time.')
  ] = 1,
  size: SizeOption = None,
  prior_model: PriorModelOption = None,
  dtype: DtypeOption = 'float32',
  samplings: Any = None,
  prior_candidates: CandidatesOption = None,
) -> None:
  """Write all stages of a model as one program, with its parameters, for any platform.

  `unclip_jax.load_exported` opens the folder; prompts, seeds, guidance scales and etas are free.
  """
  from unclip_jax.systems.exported import write_exported
  from unclip_jax.systems.fused import fuse
  from unclip_jax.terminal import plain_warnings

  names = None if platforms is None else [name.strip() for name in platforms.split(',')]
  with plain_warnings():
    loaded = unclip_jax.load(model, dtype, prior=prior_model)
    fused = fuse(
      loaded,
      batch_size,
      **samplings._asdict(),
      num_candidates=prior_candidates,
      size=size,
    )
    write_exported(fused, out, names, f'unclip_jax {unclip_jax.__version__}')
  print(out)
