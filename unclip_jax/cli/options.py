"""What the commands share: options by their panels, and the folder that pictures go to."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

OUTPUT, MACHINE = 'Output', 'Model and machine'
PRIOR = "Prior (default: the model's own settings)"
DECODER, UPSAMPLER, VOCABULARY = 'Decoder', 'Upsamplers', 'Vocabulary'

ModelOption = Annotated[
  str,
  typer.Option(
    '--model',
    '-m',
    metavar='MODEL',
    help="A folder, or a hub's owner/name or owner/name@revision. (default: the package's own)",
    show_default=False,
    rich_help_panel=MACHINE,
  ),
]

PriorModelOption = Annotated[
  str | None,
  typer.Option(
    '--prior-model',
    metavar='MODEL',
    help='Whose prior, and CLIP that reads captions, to take: some decoders come without.',
    show_default=False,
    rich_help_panel=MACHINE,
  ),
]


def option(panel: str, text: str, metavar: str | None = None) -> Any:
  """An option without a default that would be shown."""
  return typer.Option(help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


@contextlib.contextmanager
def output_folder(out: str) -> Iterator[Any]:
  """An `OutputFolder` whose files are named in the end, also where the rest went wrong."""
  from unclip_jax.images import OutputFolder

  with OutputFolder(out) as folder:
    try:
      yield folder
    finally:
      for path in folder.paths:
        print(path)
