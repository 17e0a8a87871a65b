"""`unclip-jax compile`: programs compiled ahead of the first picture."""

from typing import Annotated, Any

import typer

from unclip_jax.cli.options import (
  CandidatesOption,
  DevicesOption,
  DtypeOption,
  ModelArgument,
  ModelDevicesOption,
  PriorModelOption,
  SizeOption,
  TileOption,
  numbers,
  with_samplings,
)


@with_samplings
def compile_ahead(
  model: ModelArgument = 'default',
  batch_sizes: Annotated[
    str,
    typer.Option(
      metavar='N,N',
      help='Pictures drawn at a time: one number or several. Without --batch-size, generate draws '
      '1, 2 or 4 of them on a CPU, else 1, 2, 4, 8 or 16.',
    ),
  ] = '1',
  size: SizeOption = None,
  prior_model: PriorModelOption = None,
  dtype: DtypeOption = 'float32',
  devices: DevicesOption = 1,
  model_devices: ModelDevicesOption = 1,
  samplings: Any = None,
  prior_candidates: CandidatesOption = None,
  tile: TileOption = None,
) -> None:
  """Compile what `generate` runs with these settings, into the user's cache; reads no weights.

  Prompts, seeds, guidance scales and etas need no programs of their own.
  """
  import jax
  from rich.console import Console

  from unclip_jax.sharding import filled_size, make_mesh
  from unclip_jax.systems import ahead, loading, requests, settings
  from unclip_jax.terminal import cache_folder, interrupts, plain_warnings, use_cache
  from unclip_jax.types import UnclipError

  sizes = numbers('--batch-sizes', batch_sizes)
  use_cache(True)
  if jax.config.jax_compilation_cache_dir is None:
    raise UnclipError(
      f'programs cannot be kept in {cache_folder()}: set JAX_COMPILATION_CACHE_DIR to a folder '
      'that can be written'
    )
  network_dtype = settings.check_dtype(dtype)
  console = Console(stderr=True, highlight=False)
  with plain_warnings(must_keep=True), interrupts() as check:
    opened = loading.open_model(model, prior_model)
    loading.read_stages(opened, network_dtype, names=())  # of no stage: it checks the config
    config = settings.at_size(opened.config, size)
    mesh = None if devices == model_devices == 1 else make_mesh(devices, model_devices)
    prepared = []
    for batch_size in dict.fromkeys(filled_size(n, mesh) for n in sizes):
      request = requests.example(
        config,
        opened.tokenizer,
        opened.decoder_tokenizer,
        batch_size,
        samplings,
        prior_candidates,
        size,
        opened.eps_power,
        tile,
      )

      def report(stage: str, batch_size: int = batch_size) -> None:
        check()
        console.print(f'{stage.replace("_", " ")}, batch {batch_size}: compiling')

      stages = ahead.compile_stages(config, request, network_dtype, mesh, report)
      prepared += [(batch_size, stage) for stage in stages]
  Console(highlight=False).print(_table(prepared))
  print(f'\ncache  {jax.config.jax_compilation_cache_dir}')


def _table(prepared: list[Any]) -> Any:
  """A line for each stage and batch."""
  from rich.table import Table

  table = Table(box=None, header_style='bold', pad_edge=False)
  table.add_column('stage')
  for name in ('batch', 'seconds', 'arguments', 'temporary', 'cached'):
    table.add_column(name, justify='right')
  for batch_size, stage in prepared:
    table.add_row(
      stage.stage.replace('_', ' '),
      str(batch_size),
      f'{stage.seconds:.1f}',
      f'{stage.argument_bytes / 2**20:.1f} MiB',
      f'{stage.temp_bytes / 2**20:.1f} MiB',
      f'{stage.num_cached} of {stage.num_programs}',
    )
  total = sum(stage.seconds for _, stage in prepared)
  table.add_row('all', '', f'{total:.1f}', '', '', '')
  return table
