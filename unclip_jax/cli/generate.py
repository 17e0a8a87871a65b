"""`unclip-jax generate`: pictures of captions."""

import functools
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import unclip_jax
from unclip_jax.cli.options import (
  DECODER,
  MACHINE,
  OUTPUT,
  PROCESSES,
  CacheOption,
  CandidatesOption,
  DevicesOption,
  DtypeOption,
  ModelDevicesOption,
  ModelOption,
  PriorModelOption,
  SizeOption,
  TileOption,
  option,
  output_folder,
  with_samplings,
)

_STAGES = ('clip', 'prior', 'decoder_text', 'decoder', 'autoencoder')
_MOST_WARNINGS = 20  # about the prompts of a file
_NAMES_OF_MODELS = ('model', 'prior_model')


@with_samplings
def generate(
  prompts: Annotated[
    list[str] | None,
    typer.Argument(
      metavar='PROMPT', help='What is to be seen; one or several.', show_default=False
    ),
  ] = None,
  prompts_file: Annotated[
    str | None,
    typer.Option(
      '--prompts',
      metavar='FILE',
      help='A prompt a line, or .jsonl. What --out has of them already is not drawn again.',
      show_default=False,
    ),
  ] = None,
  image: Annotated[
    str | None,
    typer.Option(
      metavar='FILE',
      help='Draw variations of this picture; with a PROMPT its words are seen as well.',
      show_default=False,
    ),
  ] = None,
  mask: Annotated[
    str | None,
    typer.Option(
      metavar='FILE',
      help='With a model that inpaints: a picture that is white where --image is painted anew.',
      show_default=False,
    ),
  ] = None,
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
      rich_help_panel=OUTPUT,
    ),
  ] = 'out',
  size: SizeOption = None,
  model: ModelOption = 'default',
  prior_model: PriorModelOption = None,
  dtype: DtypeOption = 'float32',
  batch_size: Annotated[
    int | None, option(MACHINE, 'Pictures drawn at a time. (default: 4 on a CPU, else 16)')
  ] = None,
  devices: DevicesOption = 1,
  model_devices: ModelDevicesOption = 1,
  offload: Annotated[
    bool,
    typer.Option(
      '--offload',
      help='Keep the parameters in main memory, each stage on the device while it runs.',
      rich_help_panel=MACHINE,
    ),
  ] = False,
  tile: TileOption = None,
  lora: Annotated[
    list[str] | None,
    typer.Option(
      metavar='FILE',
      help='Adapters of a fine-tune that are added to the model; may be repeated.',
      show_default=False,
      rich_help_panel=MACHINE,
    ),
  ] = None,
  lora_strength: Annotated[
    float, typer.Option(help='What adapters are multiplied by.', rich_help_panel=MACHINE)
  ] = 1.0,
  cache: CacheOption = True,
  distributed: Annotated[
    bool,
    typer.Option(
      '--distributed',
      help='Started by Slurm, Open MPI, Kubernetes or on Cloud TPU: find the others.',
      rich_help_panel=PROCESSES,
    ),
  ] = False,
  coordinator: Annotated[
    str | None, option(PROCESSES, 'By hand: where process 0 is found.', 'HOST:PORT')
  ] = None,
  num_processes: Annotated[int | None, option(PROCESSES, 'By hand: how many there are.')] = None,
  process_id: Annotated[
    int | None, option(PROCESSES, 'By hand: which of them this one is, from 0.')
  ] = None,
  samplings: Any = None,
  prior_candidates: CandidatesOption = None,
  noise_level: Annotated[
    int | None, option(DECODER, 'Stable unCLIP: the higher, the more pictures of one image differ.')
  ] = None,
) -> None:
  """Draw pictures of captions or variations of a picture, each a PNG, and all in grid.png."""
  from rich.console import Console

  from unclip_jax.cli.series import draw_series, join_processes, open_series
  from unclip_jax.display import StageDisplay
  from unclip_jax.images import make_grid, read_mask, read_picture, slugs
  from unclip_jax.processes import Processes
  from unclip_jax.systems import settings
  from unclip_jax.systems.samples import Progress, Samples
  from unclip_jax.systems.series import fingerprint, sample_series
  from unclip_jax.terminal import interrupts, memory_errors, plain_warnings, use_cache
  from unclip_jax.types import UnclipError

  by_hand = (coordinator, num_processes, process_id) != (None, None, None)
  if prompts_file is not None and (prompts or image is not None or mask is not None):
    raise typer.BadParameter('--prompts goes without a PROMPT, --image and --mask')
  if prompts_file is None and (distributed or by_hand):
    raise typer.BadParameter('several processes share --prompts: give a file of them')
  if prompts_file is None and not prompts and image is None:
    raise typer.BadParameter('give a PROMPT, --prompts, or the --image that is to be varied')
  if mask is not None and (image is None or not prompts):
    raise typer.BadParameter('--mask goes with an --image, and a PROMPT that says what to paint')
  if lora_strength != 1 and not lora:
    raise typer.BadParameter('--lora-strength goes with --lora')
  use_cache(cache)
  for name, asked in samplings._asdict().items():
    settings.check_words(name, asked)

  # Read first: a mistake in its name, or in a line, should not wait for a large model.
  series, shared_by = None, Processes()
  if prompts_file is not None:
    series = open_series(prompts_file, out, seed, num_images, first_image)
    if distributed or by_hand:
      shared_by = join_processes(coordinator, num_processes, process_id)
  warned = plain_warnings(math.inf if series is None else _MOST_WARNINGS)
  with output_folder(out) as folder, warned, memory_errors(), interrupts() as check:
    picture = None if image is None else read_picture(image)
    anew = None if mask is None else read_mask(mask)
    loaded = unclip_jax.load(
      model, dtype, devices, offload, prior_model, lora or (), lora_strength, model_devices
    )
    is_varied = picture is not None and mask is None
    if is_varied and loaded.config.clip is None:
      raise UnclipError(f'the model {model} varies no pictures: it knows no CLIP (give a --mask?)')
    z_i = loaded.encode_image(picture[None]) if is_varied else None
    config = settings.at_size(loaded.config, size)
    captions = prompts or ['']
    ups = config.upsamplers[: settings.num_upsamplers(config, size)]
    if config.decoder is None:
      raise UnclipError(f'the model {model} has no decoder: it draws no pictures')
    others = {'prior_model': prior_model, 'mask': mask, 'noise_level': noise_level, 'tile': tile}
    if lora:
      others |= {'lora': lora, 'lora_strength': lora_strength}
    described = {
      'model': model,
      'size': settings.picture_size(config, size),
      'dtype': dtype,
      'negative_prompt': negative_prompt,
      **_describe_source(config, image, samplings.prior, prior_candidates),
      'decoder': settings.describe(config.decoder.sampling, samplings.decoder),
      **{name: value for name, value in others.items() if value is not None},
      'upsamplers': [settings.describe(up.sampling, samplings.upsampler) for up in ups],
    }
    text = {
      'seed': str(seed),
      'settings': json.dumps(described, ensure_ascii=False),
      'Software': f'unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}',
    }
    if series is not None:
      draw = functools.partial(
        sample_series,
        loaded,
        negative_prompt=negative_prompt,
        **samplings._asdict(),
        num_candidates=prior_candidates,
        size=size,
        noise_level=noise_level,
        tile=tile,
        batch_size=loaded.batch_size(series.scan.num_images, batch_size),
      )
      # Its parameters say which model it is, wherever it lies.
      kept = {name: described[name] for name in described if name not in _NAMES_OF_MODELS}
      draw_series(series, kept, fingerprint(loaded), text, shared_by, draw, check)
      return
    titles = [
      ' '.join(filter(None, [caption, Path(image).stem if image else ''])) for caption in captions
    ]
    names = (name for name in slugs(titles) for _ in range(num_images))

    def save(samples: Samples) -> None:
      rows = zip(samples.images, samples.prompts, samples.indices, strict=True)
      for image, prompt, index in rows:
        about = {'prompt': prompt, 'index': str(index), **text}
        folder.save(f'{next(names)}-{index:02d}.png', image, about)

    def report(event: Progress) -> None:
      check()
      display(event)

    skipped = ('prior',) if is_varied else ()
    stages = [name for name in _STAGES if getattr(config, name) and name not in skipped]
    stages += [f'upsampler_{i}' for i in range(len(ups))]
    with StageDisplay(Console(stderr=True, highlight=False), stages) as display:
      samples = loaded.sample(
        captions,
        seed,
        num_images,
        first_image=first_image,
        negative_prompt=negative_prompt,
        **samplings._asdict(),
        num_candidates=prior_candidates,
        size=size,
        z_i=z_i,
        image=None if mask is None else picture[None],
        mask=None if anew is None else anew[None],
        noise_level=noise_level,
        tile=tile,
        batch_size=batch_size,
        progress=report,
        on_batch=save,
      )
    # A row for each prompt, or what comes near a square.
    in_rows = len(captions) > 1 and num_images > 1
    num_columns = num_images if in_rows else math.isqrt(len(samples.images) - 1) + 1
    grid = make_grid(samples.images, num_columns)
    folder.save('grid.png', grid, {'prompt': '\n'.join(captions), **text})


def _describe_source(
  config: Any, image: str | None, asked: Any, num_candidates: int | None
) -> dict[str, Any]:
  """Where z_i came from, ready for json.dumps."""
  from unclip_jax.systems import settings

  if image is not None:
    return {'image': image}
  if config.prior is None:
    return {}
  candidates = config.prior.num_candidates if num_candidates is None else num_candidates
  return {'candidates': candidates, 'prior': settings.describe(config.prior.sampling, asked)}
