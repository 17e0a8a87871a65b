"""The command line: `unclip-jax generate` and `unclip-jax info`.

What takes long to import (JAX, and all that needs it) is imported by the commands, so that --help
and slips of the fingers are answered at once.
"""

import contextlib
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

import unclip_jax

app = typer.Typer(
  name='unclip-jax',
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
  context_settings={'help_option_names': ['-h', '--help']},
)

_OUTPUT, _MACHINE = 'Output', 'Model and machine'
_PRIOR = "Prior (default: the model's own settings)"
_DECODER, _UPSAMPLER, _VOCABULARY = 'Decoder', 'Upsamplers', 'Vocabulary'
_SAMPLER_HELP = 'ddpm or ddim.'
_ETA_HELP = 'Noise of ddim, from 0 (none) to 1 (as much as ddpm).'

ModelOption = Annotated[
  str,
  typer.Option(
    '--model',
    '-m',
    metavar='FOLDER',
    help='The folder of a model or of a training run. (default: the one in the package)',
    show_default=False,
    rich_help_panel=_MACHINE,
  ),
]


def _option(panel: str, text: str, metavar: str | None = None) -> Any:
  return typer.Option(help=text, metavar=metavar, rich_help_panel=panel, show_default=False)


def _show_version(wanted: bool) -> None:
  if wanted:
    print(f'unclip-jax {unclip_jax.__version__}')
    raise typer.Exit


@app.callback()
def options(
  version: Annotated[
    bool,
    typer.Option(
      '--version', help='Show the version and exit.', callback=_show_version, is_eager=True
    ),
  ] = False,
) -> None:
  """Draw pictures from captions with unCLIP (DALL·E 2), in JAX."""


@app.command(
  epilog='Example: unclip-jax generate "a red apple, flat style" "a rocket" -n 4 -s 7',
)
def generate(
  prompts: Annotated[
    list[str], typer.Argument(metavar='PROMPT', help='What is to be seen; one or several.')
  ],
  num_images: Annotated[
    int, typer.Option('--num-images', '-n', metavar='N', help='Pictures of each prompt.')
  ] = 1,
  seed: Annotated[
    int, typer.Option('--seed', '-s', metavar='N', help='The same seed gives the same pictures.')
  ] = 0,
  first_image: Annotated[
    int, typer.Option(metavar='N', help='Index of the first picture, to continue a series.')
  ] = 0,
  negative_prompt: Annotated[
    str | None, typer.Option(metavar='TEXT', help='What is not to be seen.', show_default=False)
  ] = None,
  out: Annotated[
    str,
    typer.Option(
      '--out',
      '-o',
      metavar='FOLDER',
      help='Where the pictures go. Files of the same name are replaced.',
      rich_help_panel=_OUTPUT,
    ),
  ] = 'out',
  size: Annotated[
    int | None,
    _option(
      _OUTPUT, "Pixels: one of the sizes that 'unclip-jax info' lists. (default: the largest)"
    ),
  ] = None,
  model: ModelOption = 'default',
  dtype: Annotated[
    str, typer.Option(help='float32 or bfloat16.', rich_help_panel=_MACHINE)
  ] = 'float32',
  batch_size: Annotated[
    int | None, _option(_MACHINE, 'Pictures drawn at a time. (default: 4 on a CPU, else 16)')
  ] = None,
  devices: Annotated[
    int, typer.Option(help='Devices that share the work.', rich_help_panel=_MACHINE)
  ] = 1,
  cache: Annotated[
    bool,
    typer.Option(
      '--cache/--no-cache',
      help="Keep compiled programs in the user's cache folder.",
      rich_help_panel=_MACHINE,
    ),
  ] = True,
  prior_steps: Annotated[int | None, _option(_PRIOR, 'Denoising steps.')] = None,
  prior_sampler: Annotated[str | None, _option(_PRIOR, _SAMPLER_HELP)] = None,
  prior_guidance: Annotated[
    float | None, _option(_PRIOR, 'How much the caption is stressed; 1 is as it is.')
  ] = None,
  prior_eta: Annotated[float | None, _option(_PRIOR, _ETA_HELP)] = None,
  prior_candidates: Annotated[
    int | None, _option(_PRIOR, 'Embeddings drawn for a picture; the nearest one is kept.')
  ] = None,
  decoder_steps: Annotated[int | None, _option(_DECODER, 'Denoising steps.')] = None,
  decoder_sampler: Annotated[str | None, _option(_DECODER, _SAMPLER_HELP)] = None,
  decoder_guidance: Annotated[
    float | None, _option(_DECODER, 'How much the caption is stressed; 1 is as it is.')
  ] = None,
  decoder_eta: Annotated[float | None, _option(_DECODER, _ETA_HELP)] = None,
  upsampler_steps: Annotated[int | None, _option(_UPSAMPLER, 'Denoising steps.')] = None,
  upsampler_sampler: Annotated[str | None, _option(_UPSAMPLER, _SAMPLER_HELP)] = None,
  upsampler_eta: Annotated[float | None, _option(_UPSAMPLER, _ETA_HELP)] = None,
) -> None:
  """Draw pictures of captions, one PNG each, and all of them in grid.png."""
  from rich.console import Console

  from unclip_jax.display import StageDisplay
  from unclip_jax.images import make_grid, slugs
  from unclip_jax.systems import settings
  from unclip_jax.systems.pipeline import Progress, Samples
  from unclip_jax.terminal import interrupts, memory_errors, plain_warnings, use_cache

  prior = settings.Sampling(prior_steps, prior_sampler, prior_guidance, prior_eta)
  decoder = settings.Sampling(decoder_steps, decoder_sampler, decoder_guidance, decoder_eta)
  upsampler = settings.Sampling(upsampler_steps, upsampler_sampler, eta=upsampler_eta)
  use_cache(cache)

  with _output_folder(out) as folder, plain_warnings(), memory_errors(), interrupts() as check:
    loaded = unclip_jax.load(model, dtype, devices)
    config = loaded.config
    ups = config.upsamplers[: settings.num_upsamplers(config, size)]
    described = {
      'model': model,
      'size': ups[-1].image_size if ups else config.decoder.image_size,
      'dtype': dtype,
      'negative_prompt': negative_prompt,
      'candidates': config.prior.num_candidates if prior_candidates is None else prior_candidates,
      'prior': settings.describe(config.prior.sampling, prior),
      'decoder': settings.describe(config.decoder.sampling, decoder),
      'upsamplers': [settings.describe(up.sampling, upsampler) for up in ups],
    }
    text = {
      'seed': str(seed),
      'settings': json.dumps(described, ensure_ascii=False),
      'Software': f'unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}',
    }
    names = (name for name in slugs(prompts) for _ in range(num_images))

    def save(samples: Samples) -> None:
      rows = zip(samples.images, samples.prompts, samples.indices, strict=True)
      for image, prompt, index in rows:
        about = {'prompt': prompt, 'index': str(index), **text}
        folder.save(f'{next(names)}-{index:02d}.png', image, about)

    def report(event: Progress) -> None:
      check()
      display(event)

    stages = ['clip', 'prior', 'decoder', *(f'upsampler_{i}' for i in range(len(ups)))]
    with StageDisplay(Console(stderr=True, highlight=False), stages) as display:
      samples = loaded.sample(
        prompts,
        seed,
        num_images,
        first_image=first_image,
        negative_prompt=negative_prompt,
        prior=prior,
        decoder=decoder,
        upsampler=upsampler,
        num_candidates=prior_candidates,
        size=size,
        batch_size=batch_size,
        progress=report,
        on_batch=save,
      )
    # A row for each prompt, or what comes near a square.
    in_rows = len(prompts) > 1 and num_images > 1
    num_columns = num_images if in_rows else math.isqrt(len(samples.images) - 1) + 1
    grid = make_grid(samples.images, num_columns)
    folder.save('grid.png', grid, {'prompt': '\n'.join(prompts), **text})


@app.command(
  epilog='Example: unclip-jax info --vocabulary --matching fish --pictures fish.png',
)
def info(
  model: ModelOption = 'default',
  vocabulary: Annotated[
    bool,
    typer.Option(
      '--vocabulary',
      help='List the styles, colours and concepts that the model knows.',
      rich_help_panel=_VOCABULARY,
    ),
  ] = False,
  matching: Annotated[
    str | None, _option(_VOCABULARY, 'Only concepts that contain this, such as fish.', 'TEXT')
  ] = None,
  pictures: Annotated[
    str | None,
    _option(_VOCABULARY, 'Draw the concepts listed, once in each style, into a PNG.', 'FILE'),
  ] = None,
) -> None:
  """Describe a model: its stages, sizes and vocabulary; the devices and versions at work."""
  if vocabulary:
    _show_vocabulary(model, matching, pictures)
    return
  if matching is not None or pictures is not None:
    raise typer.BadParameter('--matching and --pictures go with --vocabulary')
  import jax
  from rich.console import Console
  from rich.table import Table

  from unclip_jax.systems import formats, loading, settings
  from unclip_jax.terminal import cache_folder

  loaded = unclip_jax.load(model)
  opened = formats.open_model(loading.find_folder(model))
  config = loaded.config
  sampling, makes = {}, {'clip': f'{config.clip.embed_dim} numbers'}
  if config.prior is not None:
    makes['prior'] = f'{config.prior.embed_dim} numbers'
    candidates = config.prior.num_candidates
    drawn = f', {candidates} candidates' if candidates > 1 else ''
    sampling['prior'] = f'{settings.summary(config.prior.sampling)}{drawn}'
  decoders = {'decoder': config.decoder} if config.decoder is not None else {}
  decoders |= {f'upsampler_{i}': up for i, up in enumerate(config.upsamplers)}
  for name, stage in decoders.items():
    makes[name] = f'{stage.image_size} px'
    sampling[name] = settings.summary(stage.sampling)
  table = Table(box=None, header_style='bold', pad_edge=False)
  table.add_column('stage')
  table.add_column('makes')
  table.add_column('parameters', justify='right')
  table.add_column('files', justify='right')
  table.add_column('sampled by')
  total_parameters = total_bytes = 0
  for name, params in loaded.params.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = sum(path.stat().length for path in opened.stages[name].paths)
    total_parameters, total_bytes = total_parameters + count, total_bytes + size
    row = (f'{count:,}', f'{size / 2**20:.1f} MiB', sampling.get(name, ''))
    table.add_row(name.replace('_', ' '), makes[name], *row)
  table.add_row('all', '', f'{total_parameters:,}', f'{total_bytes / 2**20:.1f} MiB', '')
  console = Console(highlight=False)
  print(f'{model}: {opened.folder}, written by {opened.written_by}\n')
  console.print(table)
  sizes = f'{", ".join(map(str, settings.sizes(config)))} px' if config.decoder else 'none'
  text = config.clip.text
  cache = jax.config.jax_compilation_cache_dir or cache_folder()
  print(
    f'\nsizes     {sizes}\n'
    f'captions  up to {text.context_length} tokens of {loaded.tokenizer.vocab_size:,}\n'
    f'devices   {_devices(jax.devices())}\n'
    f'versions  unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}, '
    f'Python {platform.python_version()}\n'
    f'cache     {cache}'
  )


def main(args: list[str] | None = None) -> None:
  """Runs the command line; a mistake of the user's is one line on stderr, and status 1 or 2."""
  try:
    status = app(args, prog_name='unclip-jax', standalone_mode=False)
  except Exception as error:
    from unclip_jax.types import UnclipError

    if isinstance(error, UnclipError):
      message, status = str(error), 1
    elif type(error).__name__ == 'NoArgsIsHelpError':
      error.show()
      sys.exit(2)
    elif hasattr(error, 'format_message'):  # typer's usage errors, click's or its own
      message, status = f'{error.format_message()} (see unclip-jax --help)', 2
    else:
      raise
    print(f'unclip-jax: error: {message}', file=sys.stderr)
  sys.exit(status or 0)


def _show_vocabulary(model: str, matching: str | None, pictures: str | None) -> None:
  """Prints what a model knows; draws it where `pictures` names a file."""
  from unclip_jax.display import format_lists
  from unclip_jax.systems import formats, loading
  from unclip_jax.types import UnclipError

  if pictures is not None and not pictures.lower().endswith('.png'):
    raise UnclipError(f'--pictures {pictures!r}: give the name of a file that ends in .png')
  vocabulary = formats.open_model(loading.find_folder(model)).vocabulary
  if vocabulary is None:
    raise UnclipError(
      f'the model {model} has no vocabulary: export one of its stages again, or take another model'
    )
  lists, concepts = dict(vocabulary.lists), vocabulary.concepts
  if matching is not None:
    concepts = [concept for concept in concepts if matching.lower() in concept.lower()]
    lists[f'concepts with {matching!r}'] = concepts
    del lists['concepts']
  if not concepts:
    raise UnclipError(f'no concept contains {matching!r}: leave out --matching to see them all')
  print(format_lists(lists, get_terminal_size().columns))
  if pictures is not None:
    _draw_vocabulary(model, concepts, pictures)


def _draw_vocabulary(model: str, concepts: Sequence[str], pictures: str) -> None:
  """Draws concepts once in each style, at the decoder's own size, as one labelled sheet."""
  from etils import epath
  from rich.console import Console

  from unclip_jax.display import StageDisplay
  from unclip_jax.images import make_sheet
  from unclip_jax.systems.pipeline import Progress
  from unclip_jax.terminal import interrupts, memory_errors, plain_warnings, use_cache

  use_cache(True)
  path = epath.Path(pictures)
  console = Console(stderr=True, highlight=False)
  parent = str(path.parent)
  with _output_folder(parent) as folder, plain_warnings(), memory_errors(), interrupts() as check:
    loaded = unclip_jax.load(model)
    known = loaded.vocabulary
    prompts = [known.ask(concept, style) for concept in concepts for style in known.styles]
    console.print(f'drawing {len(prompts):,} pictures')

    def report(event: Progress) -> None:
      check()
      display(event)

    with StageDisplay(console, ['clip', 'prior', 'decoder']) as display:
      samples = loaded.sample(prompts, size=loaded.config.decoder.image_size, progress=report)
    rows = samples.images.reshape(len(concepts), len(known.styles), *samples.images.shape[1:])
    title = 'from left to right: ' + ', '.join(known.styles)
    folder.save(path.name, make_sheet(rows, concepts, title), {'prompt': '\n'.join(prompts)})


@contextlib.contextmanager
def _output_folder(out: str) -> Iterator[Any]:
  """An `OutputFolder` whose files are named in the end, also where the rest went wrong."""
  from unclip_jax.images import OutputFolder

  with OutputFolder(out) as folder:
    try:
      yield folder
    finally:
      for path in folder.paths:
        print(path)


def _devices(devices: list[Any]) -> str:
  kinds = [device.device_kind for device in devices]
  return ', '.join(f'{kinds.count(kind)} × {kind}' for kind in dict.fromkeys(kinds))
