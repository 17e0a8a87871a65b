"""What the commands share: options by their panels, and the folder that pictures go to."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
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
  option(OUTPUT, "Pixels: a size that 'unclip-jax info' lists. (default: the model's own)"),
]

_SAMPLER_HELP = 'ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, unipc, plms or analytic.'
_GUIDANCE_HELP = 'How much the caption is stressed; 1 is as it is.'
_ETA_HELP = 'Noise of ddim and analytic, from 0 (none) to 1 (as much as ddpm).'
_VARIANCE_HELP = 'Of ddpm: fixed_small, fixed_large or learned.'
_SPACING_HELP = (
  'Of the timesteps: strided, trailing, log_snr, leading, linspace, inner, karlo or fast27.'
)
_RESCALE_HELP = 'From 0 to 1: how much of the contrast that guidance adds is taken back.'
_INTERVAL_HELP = 'Guide between these shares of the noise schedule only, from 0 to 1: faster.'
# Of each stage: the end of an option's name, the field of `Sampling`, its type, and its help.
_SAMPLING: tuple[tuple[str, str, Any, str], ...] = (
  ('steps', 'num_steps', int, 'Denoising steps.'),
  ('sampler', 'sampler', str, _SAMPLER_HELP),
  ('variance', 'variance', str, _VARIANCE_HELP),
  ('eta', 'eta', float, _ETA_HELP),
  ('spacing', 'spacing', str, _SPACING_HELP),
  ('guidance', 'guidance_scale', float, _GUIDANCE_HELP),
  ('guidance_rescale', 'guidance_rescale', float, _RESCALE_HELP),
  ('guidance_interval', 'guidance_interval', tuple[float, float], _INTERVAL_HELP),
)
_PANELS = {'prior': PRIOR, 'decoder': DECODER, 'upsampler': UPSAMPLER}


def with_samplings(command: Callable[..., None]) -> Callable[..., None]:
  """Gives a command the options of how prior, decoder and upsamplers are sampled.

  They stand where its parameter `samplings` stands, a `requests.Samplings` that it is called with.
  """
  fields: dict[str, tuple[str, str]] = {}
  added = []
  for stage, panel in _PANELS.items():
    for name, field, kind, text in _SAMPLING:
      if stage == 'upsampler' and name.startswith('guidance'):
        continue
      metavar = 'LOW HIGH' if name == 'guidance_interval' else None
      annotation = Annotated[kind | None, option(panel, text, metavar)]
      fields[f'{stage}_{name}'] = stage, field
      added.append(_parameter(f'{stage}_{name}', annotation))

  @functools.wraps(command)
  def run(**values: Any) -> None:
    from unclip_jax.systems.requests import Samplings
    from unclip_jax.systems.settings import Sampling

    asked: dict[str, dict[str, Any]] = {stage: {} for stage in _PANELS}
    for name, (stage, field) in fields.items():
      asked[stage][field] = values.pop(name)
    command(samplings=Samplings(*(Sampling(**asked[stage]) for stage in _PANELS)), **values)

  parameters = list(inspect.signature(command).parameters.values())
  place = [parameter.name for parameter in parameters].index('samplings')
  parameters[place : place + 1] = added
  run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
  run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
  return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
  kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
  return inspect.Parameter(name, kind, default=None, annotation=annotation)


CandidatesOption = Annotated[
  int | None, option(PRIOR, 'Embeddings drawn for a picture; the nearest one is kept.')
]
TileOption = Annotated[
  int | None,
  option(MACHINE, 'Pixels a side that an autoencoder decodes at a time. (default: all)'),
]
CacheOption = Annotated[
  bool,
  typer.Option(
    '--cache/--no-cache',
    help="Keep compiled programs in the user's cache folder.",
    rich_help_panel=MACHINE,
  ),
]
DevicesOption = Annotated[
  int, typer.Option('--devices', help='Devices that share the work.', rich_help_panel=MACHINE)
]
ModelDevicesOption = Annotated[
  int,
  typer.Option(
    '--model-devices',
    help='How many of them share one copy of the parameters, for a model too large for one.',
    rich_help_panel=MACHINE,
  ),
]


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
