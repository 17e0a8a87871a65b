"""`unclip-jax probe`: what a CLIP is worth by itself."""

from typing import Annotated

import typer

from unclip_jax.cli.evaluate import BatchSizeOption, tell, warn_of
from unclip_jax.cli.options import OUTPUT, DevicesOption, ModelOption, option


def probe(
  pictures: Annotated[
    str,
    typer.Argument(
      metavar='FOLDER', help='Pictures: in folders, which are the classes, or with captions.'
    ),
  ],
  train: Annotated[
    str | None,
    typer.Option(
      metavar='FOLDER',
      help='Others in folders of the same names, for a linear probe to learn from.',
      show_default=False,
    ),
  ] = None,
  template: Annotated[
    list[str] | None,
    typer.Option(
      metavar='TEXT',
      help="Of zero-shot prompts; may be repeated. (default: 'a photo of a {}.')",
      show_default=False,
    ),
  ] = None,
  model: ModelOption = 'default',
  batch_size: BatchSizeOption = 32,
  devices: DevicesOption = 1,
  json: Annotated[str | None, option(OUTPUT, 'All figures.', 'FILE')] = None,
) -> None:
  """Measure a CLIP: zero-shot classification, a linear probe, retrieval."""
  from unclip_jax.data.folder_source import PictureFolder
  from unclip_jax.measure import report
  from unclip_jax.sharding import make_mesh
  from unclip_jax.systems import clip_probe, evaluation_report, settings
  from unclip_jax.systems.feature_networks import open_clip
  from unclip_jax.terminal import memory_errors, plain_warnings, use_cache

  use_cache(True)
  with plain_warnings(), memory_errors():
    settings.check_count('the batch size', batch_size)
    out = None if json is None else report.check_writable(json)
    source = PictureFolder(pictures)
    others = None if train is None else PictureFolder(train)
    judge = open_clip(model, make_mesh(devices))
    templates = tuple(template or clip_probe.TEMPLATES)
    results = clip_probe.probe(source, others, judge, templates, batch_size, tell)
    results['about'] |= {'pictures': pictures, 'train': train}
    if out is not None:
      report.write_json(out, results)
    print(evaluation_report.probe_to_text(results['figures']))
    warn_of(clip_probe.notices(results, judge, templates))
