"""`unclip-jax info`: what a model is and knows, and what it runs on."""

import platform
from collections.abc import Sequence
from importlib import metadata
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

import unclip_jax
from unclip_jax.cli.options import VOCABULARY, ModelOption, PriorModelOption, option, output_folder


def info(
  model: ModelOption = 'default',
  prior_model: PriorModelOption = None,
  vocabulary: Annotated[
    bool,
    typer.Option(
      '--vocabulary',
      help='List the styles, colours and concepts that the model knows.',
      rich_help_panel=VOCABULARY,
    ),
  ] = False,
  matching: Annotated[
    str | None, option(VOCABULARY, 'Only concepts that contain this, such as fish.', 'TEXT')
  ] = None,
  pictures: Annotated[
    str | None,
    option(VOCABULARY, 'Draw the concepts listed, once in each style, into a PNG.', 'FILE'),
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

  from unclip_jax.systems import loading, settings
  from unclip_jax.terminal import cache_folder, plain_warnings

  with plain_warnings():
    opened = loading.open_model(model, prior_model)
    # Of no stage: it checks the config, and reads no weights.
    loading.read_stages(opened, 'float32', names=())
  config = opened.config
  where = '' if str(opened.folder) == model else f' {opened.folder},'
  print(f'{model}:{where} written by {opened.written_by}\n')
  Console(highlight=False).print(_table(opened))
  sizes = f'{", ".join(map(str, settings.sizes(config)))} px' if config.decoder else 'none'
  if (multiple := settings.size_multiple(config)) is not None:
    sizes += f', and other multiples of {multiple}'
  if config.default_size is not None:
    sizes += f'; {config.default_size} unless --size asks for another'
  tokenizer = opened.tokenizer or opened.decoder_tokenizer
  cache = jax.config.jax_compilation_cache_dir or cache_folder()
  measured = ', '.join(name.replace('_', ' ') for name in opened.eps_power)
  print(
    f'\nsizes     {sizes}\n'
    f'analytic  {f"for {measured}" if measured else "without its statistics"}\n'
    f'captions  up to {tokenizer.context_length} tokens of {tokenizer.vocab_size:,}\n'
    f'devices   {_devices(jax.devices())}\n'
    f'versions  unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}, '
    f'Python {platform.python_version()}\n'
    f'cache     {cache}'
  )


def _table(opened: Any) -> Any:
  """The stages of an opened model; the parameters are counted by its config."""
  import jax
  from rich.table import Table

  from unclip_jax.systems import loading, settings

  config, makes, sampling = opened.config, {}, {}
  if config.clip is not None:
    makes['clip'] = f'{config.clip.embed_dim} numbers'
  if config.prior is not None:
    makes['prior'] = f'{config.prior.embed_dim} numbers'
    candidates = config.prior.num_candidates
    drawn = f', {candidates} candidates' if candidates > 1 else ''
    sampling['prior'] = f'{settings.summary(config.prior.sampling)}{drawn}'
  decoders = {'decoder': config.decoder} if config.decoder is not None else {}
  decoders |= {f'upsampler_{i}': up for i, up in enumerate(config.upsamplers)}
  for name, stage in decoders.items():
    of_latents = name == 'decoder' and config.autoencoder is not None
    makes[name] = f'{"latents of " if of_latents else ""}{stage.image_size} px'
    sampling[name] = settings.summary(stage.sampling)
  if config.decoder_text is not None:
    makes['decoder_text'] = f'{config.decoder_text.width} numbers a token'
  if config.autoencoder is not None:
    makes['autoencoder'] = f'{settings.sizes(config)[0]} px'
  table = Table(box=None, header_style='bold', pad_edge=False)
  table.add_column('stage')
  table.add_column('makes')
  table.add_column('parameters', justify='right')
  table.add_column('files', justify='right')
  table.add_column('sampled by')
  total_parameters = total_bytes = 0
  for name, params in loading.expected_params(config).items():
    count, files = sum(leaf.size for leaf in jax.tree.leaves(params)), 'missing'
    if name in opened.stages:
      size = sum(map(num_bytes, opened.stages[name].paths))
      total_parameters, total_bytes = total_parameters + count, total_bytes + size
      files = f'{size / 2**20:.1f} MiB'
    row = (f'{count:,}', files, sampling.get(name, ''))
    table.add_row(name.replace('_', ' '), makes.get(name, ''), *row)
  table.add_row('all', '', f'{total_parameters:,}', f'{total_bytes / 2**20:.1f} MiB', '')
  return table


def _show_vocabulary(model: str, matching: str | None, pictures: str | None) -> None:
  """Prints what a model knows; draws it where `pictures` names a file."""
  from unclip_jax.display import format_lists
  from unclip_jax.systems import formats, loading
  from unclip_jax.terminal import plain_warnings
  from unclip_jax.types import UnclipError

  if pictures is not None and not pictures.lower().endswith('.png'):
    raise UnclipError(f'--pictures {pictures!r}: give the name of a file that ends in .png')
  with plain_warnings():
    folder = loading.find_folder(model)
  vocabulary = formats.open_model(folder).vocabulary
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
  from unclip_jax.systems.samples import Progress
  from unclip_jax.terminal import interrupts, memory_errors, plain_warnings, use_cache

  use_cache(True)
  path = epath.Path(pictures)
  console = Console(stderr=True, highlight=False)
  parent = str(path.parent)
  with output_folder(parent) as folder, plain_warnings(), memory_errors(), interrupts() as check:
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


def num_bytes(path: Any) -> int:
  """Of a file, of all files of a checkpoint, or of an index and the files that it names."""
  from unclip_jax.weights.tensor_files import shards

  if path.is_dir():
    return sum(map(num_bytes, path.iterdir()))
  return path.stat().length + sum(shard.stat().length for shard in shards(path))


def _devices(devices: list[Any]) -> str:
  kinds = [device.device_kind for device in devices]
  return ', '.join(f'{kinds.count(kind)} × {kind}' for kind in dict.fromkeys(kinds))
