"""`unclip-jax demo`: a page to play with."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import unclip_jax
from unclip_jax.cli.options import (
  MACHINE,
  CacheOption,
  DevicesOption,
  DtypeOption,
  ModelOption,
  PriorModelOption,
  option,
)

_HERE = ('127.0.0.1', 'localhost', '::1')


def demo(
  host: Annotated[
    str, typer.Option(metavar='ADDRESS', help='What it is bound to; 0.0.0.0 is open to all.')
  ] = '127.0.0.1',
  port: Annotated[int, typer.Option(metavar='N', min=1, max=65535, help='Of the page.')] = 7860,
  waiting: Annotated[
    int,
    typer.Option(
      metavar='N', min=1, help='Requests that wait at most; others are asked to come back later.'
    ),
  ] = 20,
  model: ModelOption = 'default',
  prior_model: PriorModelOption = None,
  dtype: DtypeOption = 'float32',
  batch_size: Annotated[
    int | None, option(MACHINE, 'Pictures drawn at a time. (default: 1 on a CPU, else 4)')
  ] = None,
  devices: DevicesOption = 1,
  cache: CacheOption = True,
) -> None:
  """Open a page: generate, variations, interpolation, text diffs, inpainting."""
  from unclip_jax.demo.page import serve, wait
  from unclip_jax.demo.work import Studio
  from unclip_jax.terminal import use_cache

  use_cache(cache)
  loaded = unclip_jax.load(model, dtype, devices, prior=prior_model)
  # Where it lies is nobody's business.
  studio = Studio(loaded, Path(model).name or model, batch_size)
  with serve(studio, host, port, waiting) as url:
    if host not in _HERE:
      print('unclip-jax: warning: all who reach this machine can use the page', file=sys.stderr)
    print(f'the page is at {url} (Ctrl-C ends it)', flush=True)
    wait()
