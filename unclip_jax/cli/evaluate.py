"""`unclip-jax evaluate`: pictures that were generated, against real ones and their captions."""

from typing import Annotated

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
    str,
    typer.Argument(
      metavar='FOLDER',
      help='Pictures; their captions from a list, .txt files, or as generate wrote them.',
    ),
  ],
  reference: Annotated[
    str | None,
    typer.Option('--reference', '-r', metavar='FOLDER', help='Real pictures.', show_default=False),
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
) -> None:
  """Compare pictures with real ones and with their captions: FID, KID, CMMD, CLIP score, ..."""
  if inception is None and clip is None:
    raise typer.BadParameter('give --inception, --clip or both: the networks that look at pictures')
  ks = None if recall_at is None else tuple(numbers('--recall-at', recall_at))
  from unclip_jax.data.folder_source import PictureFolder
  from unclip_jax.measure import report
  from unclip_jax.sharding import make_mesh
  from unclip_jax.systems import evaluation, evaluation_report
  from unclip_jax.systems.feature_networks import open_clip, open_inception
  from unclip_jax.terminal import memory_errors, plain_warnings, use_cache

  use_cache(True)
  with plain_warnings(), memory_errors():
    options = evaluation.Options(
      resolution, resize, batch_size, most_kept, kid_size, kid_subsets, neighbours, ks, seed
    )
    out = None if json is None else report.check_writable(json)
    drawn = PictureFolder(generated)
    real = None if reference is None else PictureFolder(reference)
    mesh = make_mesh(devices)
    network = None if inception is None else open_inception(inception, inception_as, mesh)
    judge = None if clip is None else open_clip(clip, mesh)
    results = evaluation.evaluate(drawn, real, network, judge, options, tell)
    results['about'] |= {'generated': generated, 'reference': reference}
    if out is not None:
      report.write_json(out, results)
    print(evaluation_report.to_text(results['figures']))
    warn_of(evaluation_report.warnings_of(results['figures']))


def tell(line: str) -> None:
  """What is under way, on one line of a terminal, and nowhere else."""
  import sys

  if sys.stderr.isatty():
    print(f'\r\033[K{line}', end='\n' if line == 'comparing' else '', file=sys.stderr, flush=True)


def warn_of(notices: list[str]) -> None:
  """Says them; within `plain_warnings` each is a line for people."""
  from warnings import warn

  for notice in notices:
    warn(notice, stacklevel=2)
