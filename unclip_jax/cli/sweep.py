"""`unclip-jax sweep`: what guidance gives and costs."""

import math
from typing import Annotated

import typer

from unclip_jax.cli.evaluate import (
  HOW,
  NETWORKS,
  BatchSizeOption,
  InceptionOption,
  PreparationOption,
  ResizeOption,
  tell,
  warn_of,
)
from unclip_jax.cli.options import MACHINE, OUTPUT, DevicesOption, ModelOption, option

_DRAWN = 'What is drawn'


def sweep(
  reference: Annotated[str, typer.Argument(metavar='FOLDER', help='Real pictures.')],
  prompts: Annotated[
    str | None, option(_DRAWN, 'Captions, one a line. (default: those of FOLDER)', 'FILE')
  ] = None,
  guidance: Annotated[
    str, typer.Option(metavar='X,X,...', help='The scales.', rich_help_panel=_DRAWN)
  ] = '1,1.5,2,3,4,6',
  stage: Annotated[
    str, typer.Option(help='Whose guidance: decoder or prior.', rich_help_panel=_DRAWN)
  ] = 'decoder',
  num: Annotated[
    int | None, option(_DRAWN, 'Pictures at each scale. (default: one for each caption)', 'N')
  ] = None,
  seed: Annotated[int, typer.Option('--seed', '-s', rich_help_panel=_DRAWN)] = 0,
  model: ModelOption = 'default',
  dtype: Annotated[
    str, typer.Option(help='Of the model: float32, bfloat16 or float16.', rich_help_panel=MACHINE)
  ] = 'float32',
  inception: InceptionOption = None,
  inception_as: PreparationOption = 'torch-fidelity',
  clip: Annotated[
    str | None,
    option(NETWORKS, "Whose CLIP judges, and measures without --inception. (default: the model's)"),
  ] = None,
  resolution: Annotated[
    int | None, option(HOW, 'Pixels that pictures are compared at. (default: as drawn)')
  ] = None,
  resize: ResizeOption = 'bicubic',
  batch_size: BatchSizeOption = 32,
  devices: DevicesOption = 1,
  json: Annotated[str | None, option(OUTPUT, 'All figures.', 'FILE')] = None,
  plot: Annotated[
    str | None, option(OUTPUT, 'A picture of them; needs matplotlib.', 'FILE')
  ] = None,
) -> None:
  """Draw at several guidance scales: distance to real pictures against CLIP score."""
  scales = _scales(guidance)
  from unclip_jax.data.folder_source import PictureFolder
  from unclip_jax.measure import report
  from unclip_jax.sharding import make_mesh
  from unclip_jax.systems import evaluation, evaluation_report, prompt_file, unclip
  from unclip_jax.systems import guidance_sweep as of_guidance
  from unclip_jax.systems.feature_networks import open_clip, open_inception
  from unclip_jax.terminal import memory_errors, plain_warnings, use_cache

  use_cache(True)
  with plain_warnings(), memory_errors():
    options = evaluation.Options(resolution, resize, batch_size)
    if plot is not None:
      report.check_can_plot(plot)
    out, picture = (None if path is None else report.check_writable(path) for path in (json, plot))
    real = PictureFolder(reference)
    captions = None
    if prompts is not None:
      captions = tuple(line.prompt for line in prompt_file.read_lines(prompts))
    mesh = make_mesh(devices)
    network = None if inception is None else open_inception(inception, inception_as, mesh)
    judge = open_clip(clip or model, mesh)
    subject = of_guidance.Subject(
      unclip.load(model, dtype, devices), stage, scales, captions, num, seed
    )
    results = of_guidance.sweep(subject, real, network, judge, options, tell)
    results['about'] |= {'model': model, 'reference': reference}
    if out is not None:
      report.write_json(out, results)
    if picture is not None:
      evaluation_report.plot_sweep(picture, results)
    print(evaluation_report.sweep_to_text(results))
    warn_of(of_guidance.notices(results, clip is None))


def _scales(text: str) -> tuple[float, ...]:
  try:
    scales = tuple(float(part) for part in text.split(','))
  except ValueError:
    scales = ()
  if not scales or not all(math.isfinite(scale) and scale >= 0 for scale in scales):
    raise typer.BadParameter(f'--guidance {text!r}: give numbers from 0 on, such as 1,1.5,3')
  return scales
