"""`unclip-jax bench`: how fast a model samples on this machine."""

from typing import Annotated

import typer

from unclip_jax.cli.options import (
  MACHINE,
  OUTPUT,
  ModelDevicesOption,
  PriorModelOption,
  numbers,
  option,
)

MEASURED = 'What is measured'


def bench(
  model: Annotated[
    str | None,
    typer.Option(
      '--model',
      '-m',
      metavar='MODEL',
      help="A folder, or a hub's owner/name. (default: the package's own)",
      show_default=False,
      rich_help_panel=MACHINE,
    ),
  ] = None,
  preset: Annotated[
    str | None,
    option(
      MACHINE, 'Random weights of the sizes of a preset in place of a model: karlo, ...', 'NAME'
    ),
  ] = None,
  prior_model: PriorModelOption = None,
  batch_sizes: Annotated[
    str, typer.Option(metavar='N,N,...', help='Images at a time.', rich_help_panel=MEASURED)
  ] = '1',
  devices: Annotated[
    str,
    typer.Option(
      metavar='N,N,...', help='Devices that a batch is spread over.', rich_help_panel=MACHINE
    ),
  ] = '1',
  model_devices: ModelDevicesOption = 1,
  dtype: Annotated[
    str, typer.Option(help='float32, bfloat16 or float16.', rich_help_panel=MACHINE)
  ] = 'float32',
  steps: Annotated[
    str | None,
    option(MEASURED, 'Of prior, decoder and upsamplers, as 25,25,7.', 'N,N,...'),
  ] = None,
  sampler: Annotated[str | None, option(MEASURED, 'Of all stages.', 'NAME')] = None,
  guided: Annotated[
    bool | None,
    typer.Option(
      '--guided/--unguided',
      help='Guidance of prior and decoder. (default: as the model is)',
      show_default=False,
      rich_help_panel=MEASURED,
    ),
  ] = None,
  stages: Annotated[
    str | None,
    option(MEASURED, 'Only these, as prior,decoder,end_to_end.', 'STAGE,...'),
  ] = None,
  rounds: Annotated[
    int, typer.Option(help='How often each is timed.', rich_help_panel=MEASURED)
  ] = 3,
  json: Annotated[str | None, option(OUTPUT, 'All figures.', 'FILE')] = None,
  plot: Annotated[
    str | None, option(OUTPUT, 'A picture of them; needs matplotlib.', 'FILE')
  ] = None,
  profile: Annotated[
    str | None, option(OUTPUT, 'A trace of one run of each stage (jax.profiler).', 'FOLDER')
  ] = None,
) -> None:
  """Measure seconds, FLOPs, bytes and memory of each stage, and from caption to picture."""
  if model is not None and preset is not None:
    raise typer.BadParameter('give --model or --preset, not both')
  options = {
    'batch_sizes': tuple(numbers('--batch-sizes', batch_sizes)),
    'devices': tuple(numbers('--devices', devices)),
    'steps': () if steps is None else tuple(numbers('--steps', steps)),
    'stages': tuple(filter(None, map(str.strip, (stages or '').split(',')))),
  }
  from unclip_jax.systems import bench_subject
  from unclip_jax.systems.bench_run import Outputs, run
  from unclip_jax.terminal import memory_errors, plain_warnings

  asked = bench_subject.Options(
    model_devices=model_devices,
    dtype=dtype,
    sampler=sampler,
    guided=guided,
    rounds=rounds,
    profile=profile,
    **options,
  )
  with plain_warnings(), memory_errors():
    outputs = Outputs.checked(json, plot, profile)
    if preset is None:
      subject = bench_subject.of_model(model or 'default', dtype, prior_model)
    else:
      subject = bench_subject.of_preset(preset)
    run(subject, asked, outputs)
