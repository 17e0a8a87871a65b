"""What the commands share: options by their panels, and the folder that pictures go to."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

OUTPUT, MACHINE = 'Output', 'Model and machine'
PROCESSES = 'Several processes that share the --prompts'
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


ModelArgument = Annotated[
  str,
  typer.Argument(
    metavar='MODEL',
    help="A folder, or a hub's owner/name. (default: the package's own)",
    show_default=False,
  ),
]
DtypeOption = Annotated[
  str,
  typer.Option('--dtype', help='float32, bfloat16 or float16.', rich_help_panel=MACHINE),
]
SizeOption = Annotated[
  int | None,
  option(OUTPUT, "Pixels: a size that 'unclip-jax info' lists. (default: the largest)"),
]

# What makes another program, of the settings of `generate`.
_GUIDED = 'Whether there is guidance: 1 is none, others are one program.'
_SAMPLER = 'As of generate.'
PriorStepsOption = Annotated[int | None, option(PRIOR, 'Denoising steps.')]
PriorSamplerOption = Annotated[str | None, option(PRIOR, _SAMPLER)]
PriorGuidanceOption = Annotated[float | None, option(PRIOR, _GUIDED)]
PriorCandidatesOption = Annotated[int | None, option(PRIOR, 'Embeddings drawn for a picture.')]
DecoderStepsOption = Annotated[int | None, option(DECODER, 'Denoising steps.')]
DecoderSamplerOption = Annotated[str | None, option(DECODER, _SAMPLER)]
DecoderGuidanceOption = Annotated[float | None, option(DECODER, _GUIDED)]
UpsamplerStepsOption = Annotated[int | None, option(UPSAMPLER, 'Denoising steps.')]
UpsamplerSamplerOption = Annotated[str | None, option(UPSAMPLER, _SAMPLER)]


def numbers(name: str, text: str) -> list[int]:
  """The whole numbers of an option that takes several, such as '1,4'."""
  parts = text.split(',')
  if not all(part.strip().isdecimal() and int(part) for part in parts):
    raise typer.BadParameter(f'{name} {text!r}: give whole numbers from 1 on, such as 1,4')
  return [int(part) for part in parts]


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
