"""`unclip-jax plan`: whether a model fits a machine that is not there, and what it takes there."""

import os
from typing import Annotated

import typer

from unclip_jax.cli.options import MACHINE, OUTPUT, ModelDevicesOption, option

TRAINING = 'Training'


def plan(
  stage: Annotated[
    str,
    typer.Argument(metavar='STAGE', help='clip, prior, decoder, upsampler_0, ..., or all.'),
  ],
  preset: Annotated[
    str, typer.Option(metavar='NAME', help='Whose sizes: paper, paper_ar, karlo, emoji, ...')
  ] = 'paper',
  topology: Annotated[
    str | None, option(MACHINE, 'Of a TPU: v5e:16x16, v5p:4x4x8, v6e:8x8, ...', 'CHIP:SHAPE')
  ] = None,
  gpus: Annotated[
    str | None, option(MACHINE, 'a100, h100 or h200, as h100:256: an estimate.', 'NAME:COUNT')
  ] = None,
  devices: Annotated[
    int | None, option(MACHINE, 'Only the first of a topology. (default: all)', 'N')
  ] = None,
  model_devices: ModelDevicesOption = 1,
  batch_size: Annotated[
    int | None,
    option(MACHINE, "Of all devices. (default: the paper's; an image for each, to sample)", 'N'),
  ] = None,
  dtype: Annotated[
    str, typer.Option(help='float32, bfloat16 or float16.', rich_help_panel=MACHINE)
  ] = 'bfloat16',
  fsdp: Annotated[
    bool,
    typer.Option(
      '--fsdp', help='Split parameters and state over all devices.', rich_help_panel=TRAINING
    ),
  ] = False,
  remat: Annotated[
    bool,
    typer.Option('--remat', help='Compute activations twice.', rich_help_panel=TRAINING),
  ] = False,
  accumulate: Annotated[
    int, typer.Option(metavar='N', help='Parts of a batch.', rich_help_panel=TRAINING)
  ] = 1,
  sample: Annotated[
    bool, typer.Option('--sample', help='Plan the drawing of pictures in place of training.')
  ] = False,
  assignments: Annotated[
    list[str] | None,
    typer.Option(
      '--set', metavar='FIELD=VALUE', help='Change a size of the preset.', show_default=False
    ),
  ] = None,
  price: Annotated[
    float | None, option(OUTPUT, 'Dollars of a chip-hour, for what it costs.', 'DOLLARS')
  ] = None,
  json: Annotated[str | None, option(OUTPUT, 'All figures.', 'FILE')] = None,
) -> None:
  """Compile the training step or the sampling of a preset for a machine, without having it.

  It says the memory of a device, its FLOPs, bytes and exchanges, and the least time they take.

  Programs for TPUs are compiled by libtpu, which comes with the extra 'plan'.
  """
  if (topology is None) == (gpus is None):
    raise typer.BadParameter('give either --topology or --gpus')
  if gpus is not None and devices is not None:
    raise typer.BadParameter(f'--gpus {gpus} says how many there are: leave --devices out')
  # The compilers run on the CPU: what else this machine has is not to be taken.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from unclip_jax.systems.plan_run import run
  from unclip_jax.terminal import plain_warnings

  with plain_warnings():
    run(
      stage,
      preset,
      topology=topology,
      gpus=gpus,
      devices=devices,
      model_devices=model_devices,
      batch_size=batch_size,
      dtype=dtype,
      fsdp=fsdp,
      remat=remat,
      accumulate=accumulate,
      sample=sample,
      assignments=assignments or [],
      price=price,
      json=json,
    )
