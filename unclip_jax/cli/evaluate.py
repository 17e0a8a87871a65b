"""`unclip-jax evaluate`: pictures that were generated, against real ones and their captions."""

from typing import Annotated, Any

import typer

from unclip_jax.cli.options import MACHINE, OUTPUT, DevicesOption, numbers, option

NETWORKS, HOW = 'Networks that look', 'How'

InceptionOption = Annotated[
  str | None,
  option(
    NETWORKS,
    'For FID: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes.',
    'FILE',
  ),
]
PreparationOption = Annotated[
  str,
  typer.Option(
    metavar='NAME',
    help='Whose way of resizing for Inception: torch-fidelity, pytorch-fid or clean-fid.',
    rich_help_panel=NETWORKS,
  ),
]
ResolutionOption = Annotated[
  int | None,
  option(HOW, 'Pixels that pictures are brought to first. (default: as the first was generated)'),
]
ResizeOption = Annotated[
  str,
  typer.Option(help='For that: area, bilinear, bicubic or lanczos.', rich_help_panel=HOW),
]
BatchSizeOption = Annotated[
  int, typer.Option(help='Pictures that are looked at together.', rich_help_panel=MACHINE)
]


def evaluate(
  generated: Annotated[
    list[str],
    typer.Argument(
      metavar='FOLDER',
      help='Pictures; their captions from a list, .txt files, or as generate wrote them. Or .npz '
      'files of --save. Several are one set.',
    ),
  ],
  reference: Annotated[
    list[str] | None,
    typer.Option(
      '--reference',
      '-r',
      metavar='FOLDER',
      help='Real pictures, or an .npz file; may be repeated.',
      show_default=False,
    ),
  ] = None,
  inception: InceptionOption = None,
  inception_as: PreparationOption = 'torch-fidelity',
  clip: Annotated[
    str | None,
    option(
      NETWORKS, "For all else: a CLIP, or a model with one; 'default' is the package's.", 'MODEL'
    ),
  ] = None,
  resolution: ResolutionOption = None,
  resize: ResizeOption = 'bicubic',
  most_kept: Annotated[
    int,
    typer.Option(
      help='Of each folder, for all but FID: pictures that are compared with each other.',
      rich_help_panel=HOW,
    ),
  ] = 10_000,
  kid_size: Annotated[
    int | None, option(HOW, 'Pictures of a subset of KID. (default: 1000, or all)')
  ] = None,
  kid_subsets: Annotated[int, typer.Option(help='Subsets of KID.', rich_help_panel=HOW)] = 100,
  neighbours: Annotated[
    int, typer.Option(help='Of precision and recall.', rich_help_panel=HOW)
  ] = 3,
  recall_at: Annotated[
    str | None, option(HOW, 'The k of R@k. (default: those of 1,5,10 that can be)', 'N,N,...')
  ] = None,
  seed: Annotated[
    int, typer.Option(help='Of what is kept, and of subsets.', rich_help_panel=HOW)
  ] = 0,
  batch_size: BatchSizeOption = 32,
  devices: DevicesOption = 1,
  json: Annotated[str | None, option(OUTPUT, 'All figures.', 'FILE')] = None,
  save: Annotated[
    str | None,
    option(OUTPUT, 'What was seen of FOLDER, to be a --reference or a part later.', 'FILE.npz'),
  ] = None,
) -> None:
  """Compare pictures with real ones and with their captions: FID, KID, CMMD, CLIP score, ..."""
  if inception is None and clip is None:
    raise typer.BadParameter('give --inception, --clip or both: the networks that look at pictures')
  if inception is not None and not reference and save is None:
    raise typer.BadParameter('--inception compares with other pictures: give --reference')
  ks = None if recall_at is None else tuple(numbers('--recall-at', recall_at))
  from unclip_jax.measure import report
  from unclip_jax.sharding import make_mesh
  from unclip_jax.systems import evaluation, evaluation_report, feature_files
  from unclip_jax.systems.feature_networks import open_clip, open_inception
  from unclip_jax.terminal import memory_errors, plain_warnings, use_cache
  from unclip_jax.types import UnclipError

  use_cache(True)
  with plain_warnings(), memory_errors():
    options = evaluation.Options(
      feature_files.resolution_of(generated[0]) if resolution is None else resolution,
      resize,
      batch_size,
      most_kept,
      kid_size,
      kid_subsets,
      neighbours,
      ks,
      seed,
    )
    out = None if json is None else report.check_writable(json)
    if save is not None:
      feature_files.check_name(save)
    parts, others = (feature_files.open_parts(paths or ()) for paths in (generated, reference))
    mesh = make_mesh(devices)
    network = None if inception is None else open_inception(inception, inception_as, mesh)
    judge = None if clip is None else open_clip(clip, mesh)
    networks = evaluation.networks_of(network, judge)
    drawn = feature_files.gather(parts, networks, options, tell)
    if save is not None:
      feature_files.write(save, drawn, networks, options)
    real = feature_files.gather(others, networks, options, tell) if others else None
    tell('comparing')
    figures: list[Any] = []
    if real is not None or save is None or network is None:
      figures = evaluation.evaluate(drawn, real, network, judge, options)
    if not figures and save is None:
      raise UnclipError(
        'there is nothing to compare with: give --reference, or captions, in a .txt beside each '
        'picture or in a list'
      )
    if out is not None:
      folders = {'generated': generated, 'reference': reference}
      report.write_json(out, {'about': evaluation.about() | folders, 'figures': figures})
    if save is not None:
      print(save)
    if figures:
      print(evaluation_report.to_text(figures))
      warn_of(evaluation_report.warnings_of(figures))


def tell(line: str) -> None:
  """What is under way, on one line of a terminal, and nowhere else."""
  import sys

  if sys.stderr.isatty():
    # What is said next begins where this line does.
    print(f'\033[K{line}', end='\r', file=sys.stderr, flush=True)


def warn_of(notices: list[str]) -> None:
  """Says them; within `plain_warnings` each is a line for people."""
  from warnings import warn

  for notice in notices:
    warn(notice, stacklevel=2)
