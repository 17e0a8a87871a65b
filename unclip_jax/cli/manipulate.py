"""`unclip-jax variations`, `interpolate`, `text-diff`, `pca`, `reconstruct`, `inpaint`, `redraw`.

Each writes a row of pictures as a PNG, the given ones among them, and a JSON file of what it was
made by and what was measured.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import unclip_jax
from unclip_jax.cli.options import (
  DECODER,
  OUTPUT,
  CacheOption,
  DtypeOption,
  ModelOption,
  PriorModelOption,
  SizeOption,
  numbers,
  option,
  output_folder,
)

ImageArgument = Annotated[
  str, typer.Argument(metavar='IMAGE', help='A picture; its middle square is taken.')
]
PromptArgument = Annotated[
  str, typer.Argument(metavar='PROMPT', help='What the whole is to show.', show_default=False)
]

Pictures = list[Any]  # uint8 [h, w, 3] each


class Common(NamedTuple):
  """The options that all these commands have."""

  out: str
  model: str
  prior_model: str | None
  dtype: str
  size: int | None
  steps: int | None
  guidance: float | None
  iterations: int
  seed: int
  cache: bool


_OPTIONS: dict[str, tuple[Any, Any]] = {
  'seed': (
    0,
    Annotated[
      int, typer.Option('--seed', '-s', metavar='N', help='Of all noise, the same along a row.')
    ],
  ),
  'out': (
    'out',
    Annotated[
      str,
      typer.Option(
        '--out',
        '-o',
        metavar='FOLDER',
        help='Where the row goes. Files of the same name are replaced.',
        rich_help_panel=OUTPUT,
      ),
    ],
  ),
  'size': (None, SizeOption),
  'model': ('default', ModelOption),
  'prior_model': (None, PriorModelOption),
  'dtype': ('float32', DtypeOption),
  'cache': (True, CacheOption),
  'steps': (
    None,
    Annotated[
      int | None,
      option(DECODER, 'Denoising steps. (default: 100 to invert, 50 to paint, else as the model)'),
    ],
  ),
  'guidance': (
    None,
    Annotated[
      float | None,
      option(
        DECODER,
        'Guidance scale. (default: 1 where a picture is inverted, of variations up to the '
        "model's own with --eta, else as the model)",
      ),
    ],
  ),
  'iterations': (
    2,
    Annotated[
      int,
      typer.Option(
        help='Of each step of an inversion; 1 is the plain one.', rich_help_panel=DECODER
      ),
    ],
  ),
}


def with_common(command: Callable[..., None]) -> Callable[..., None]:
  """Gives a command the options of `Common`, which it is called with, in place of `common`."""

  @functools.wraps(command)
  def run(**values: Any) -> None:
    common = Common(**{name: values.pop(name) for name in Common._fields})
    command(common=common, **values)

  kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
  own = [p for p in inspect.signature(command).parameters.values() if p.name != 'common']
  added = [
    inspect.Parameter(name, kind, default=default, annotation=annotation)
    for name, (default, annotation) in _OPTIONS.items()
  ]
  run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
  run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
  return run


@with_common
def variations(
  image: ImageArgument,
  n: Annotated[int, typer.Option('-n', metavar='N', help='How many.')] = 4,
  eta: Annotated[
    float, typer.Option(help='From 0, which gives the picture back, to 1, the freest.')
  ] = 1.0,
  common: Any = None,
) -> None:
  """Draw what CLIP sees as it sees a picture: from its inverted noise, with new noise added."""

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    return unclip_jax.manipulate.variations(model, pictures[0], n, eta, how)

  _run('variations', common, [image], {'eta': eta}, draw)


@with_common
def interpolate(
  one: ImageArgument,
  other: ImageArgument,
  n: Annotated[int, typer.Option('-n', metavar='N', help='Frames, both ends among them.')] = 7,
  noise: Annotated[
    str, typer.Option(help='inverted: the ends are the pictures; fixed: the same for all frames.')
  ] = 'inverted',
  common: Any = None,
) -> None:
  """Draw the way from one picture to another."""

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    return unclip_jax.manipulate.interpolate(model, *pictures, n, noise, how)

  _run('interpolate', common, [one, other], {'noise': noise}, draw)


@with_common
def text_diff(
  image: ImageArgument,
  texts: Annotated[
    list[str],
    typer.Argument(
      metavar='[SOURCE] TARGET',
      help='What the picture shows, which --baseline caption alone needs; what it is to show.',
    ),
  ],
  theta: Annotated[
    float, typer.Option(help='How far the last frame is turned to TARGET, above 0 to 1.')
  ] = 0.5,
  n: Annotated[int, typer.Option('-n', metavar='N', help='Frames.')] = 5,
  baseline: Annotated[
    str,
    typer.Option(
      help='What TARGET is told from: caption (SOURCE), dummy ("a photo"), empty (an empty '
      'caption) or none.'
    ),
  ] = 'caption',
  common: Any = None,
) -> None:
  """Draw a picture on its way from one caption to another."""
  *sources, target = texts
  if len(sources) > 1 or (baseline == 'caption' and not sources):
    raise typer.BadParameter(
      f'there are {len(texts)} captions: give SOURCE and TARGET, or TARGET alone with another '
      '--baseline than caption'
    )
  source = sources[0] if sources else None

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    return unclip_jax.manipulate.text_diff(
      model, pictures[0], source, target, theta, n, baseline, how
    )

  asked = {'source': source, 'target': target, 'theta': theta, 'baseline': baseline}
  _run('text-diff', common, [image], asked, draw)


@with_common
def pca(
  images: Annotated[list[str], typer.Argument(metavar='IMAGE', help='One or several pictures.')],
  fit: Annotated[
    str | None,
    typer.Option(
      metavar='FOLDER',
      help='Pictures to take the components of, more than an embedding has numbers. (default: '
      'those of an autoregressive prior)',
      show_default=False,
    ),
  ] = None,
  dims: Annotated[
    str | None,
    typer.Option(
      metavar='N,N,...',
      help='Numbers of components. (default: 5, twice that, and so on to all)',
      show_default=False,
    ),
  ] = None,
  common: Any = None,
) -> None:
  """Draw what few principal components of CLIP's embedding hold of pictures, a row for each."""
  from unclip_jax.data.folder_source import PictureFolder
  from unclip_jax.systems.picture_sets import clip_batches

  counts = None if dims is None else numbers('--dims', dims)
  fitted = None if fit is None else PictureFolder(fit)

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    found = None
    if fitted is not None:
      found = unclip_jax.manipulate.fit_pca(model, clip_batches(model, fitted))
    return unclip_jax.manipulate.pca_reconstruct(model, pictures, counts, found, how)

  _run('pca', common, images, {'fit': fit}, draw, _behind_each)


@with_common
def reconstruct(
  images: Annotated[list[str], typer.Argument(metavar='IMAGE', help='One or several pictures.')],
  common: Any = None,
) -> None:
  """Invert pictures and draw them again; says how far off they are."""

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    return unclip_jax.manipulate.reconstruct(model, pictures, how)

  _run('reconstruct', common, images, {}, draw, _below)


@with_common
def inpaint(
  image: ImageArgument,
  prompt: PromptArgument = '',
  mask: Annotated[
    str | None,
    typer.Option(
      metavar='FILE', help='A picture, white where IMAGE is painted anew.', show_default=False
    ),
  ] = None,
  margin: Annotated[
    float | None,
    typer.Option(
      help='Paint around IMAGE instead, so much of its side on each side; best without PROMPT.',
      show_default=False,
    ),
  ] = None,
  n: Annotated[int, typer.Option('-n', metavar='N', help='How many.')] = 4,
  jump: Annotated[
    int, typer.Option(help='Steps that are taken again together.', rich_help_panel=DECODER)
  ] = 5,
  times: Annotated[
    int | None,
    typer.Option(
      help='How often they are taken; 4, or not again by a decoder that knows masks.',
      show_default=False,
      rich_help_panel=DECODER,
    ),
  ] = None,
  common: Any = None,
) -> None:
  """Paint a part of a picture anew, or what is around it, by any model."""
  from unclip_jax.images import read_mask

  if (mask is None) == (margin is None):
    raise typer.BadParameter('give a --mask of what is to be painted, or a --margin')

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    from unclip_jax.manipulate import extend

    picture, anew = (pictures[0], is_anew) if margin is None else extend(pictures[0], margin)
    return unclip_jax.manipulate.inpaint(model, picture, anew, prompt, n, jump, times, None, how)

  is_anew = None if mask is None else read_mask(mask)
  asked = {'prompt': prompt, 'mask': mask, 'margin': margin, 'jump': jump, 'times': times}
  _run('inpaint', common, [image], asked, draw)


@with_common
def redraw(
  image: ImageArgument,
  prompt: PromptArgument = '',
  strength: Annotated[
    float, typer.Option(help='How far the picture is noised before, above 0 to 1.')
  ] = 0.3,
  n: Annotated[int, typer.Option('-n', metavar='N', help='How many.')] = 4,
  common: Any = None,
) -> None:
  """Draw a picture anew from what noise leaves of it."""

  def draw(model: Any, how: Any, pictures: Sequence[Any]) -> Any:
    return unclip_jax.manipulate.image_to_image(model, pictures[0], prompt, strength, n, None, how)

  _run('redraw', common, [image], {'prompt': prompt, 'strength': strength}, draw)


def _read(path: str) -> Any:
  from unclip_jax.images import read_picture

  return read_picture(path)


def _between(given: Pictures, drawn: Pictures) -> tuple[Pictures, int]:
  """One row: what was drawn behind the first that was given and before the second."""
  return [*given[:1], *drawn, *given[1:]], len(given) + len(drawn)


def _below(given: Pictures, drawn: Pictures) -> tuple[Pictures, int]:
  return [*given, *drawn], len(given)


def _behind_each(given: Pictures, drawn: Pictures) -> tuple[Pictures, int]:
  """A row for each that was given."""
  n = len(drawn) // len(given)
  rows = [(one, *drawn[i * n : (i + 1) * n]) for i, one in enumerate(given)]
  return [picture for row in rows for picture in row], n + 1


def _run(
  name: str,
  common: Common,
  paths: Sequence[str],
  asked: dict[str, Any],
  draw: Callable[[Any, Any, Sequence[Any]], Any],
  arrange: Callable[[Pictures, Pictures], tuple[Pictures, int]] = _between,
) -> None:
  """Reads the pictures, opens the model, draws the row, and writes it.

  `arrange` takes the pictures that were given and those that were drawn, and says what stands where
  in how many columns.
  """
  import numpy as np

  from unclip_jax.images import make_grid, slug
  from unclip_jax.manipulate import Drawing, thumbnail
  from unclip_jax.terminal import interrupts, memory_errors, plain_warnings, use_cache

  use_cache(common.cache)
  how = Drawing(common.steps, common.guidance, common.iterations, common.seed, common.size)
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(output_folder(common.out))
    for context in (plain_warnings(), memory_errors(), interrupts()):
      stack.enter_context(context)
    # Read first: a mistake in a name should not wait for a large model.
    pictures = [_read(path) for path in paths]
    model = unclip_jax.load(common.model, common.dtype, prior=common.prior_model)
    row = draw(model, how, pictures)
    given = [thumbnail(picture, row.images.shape[1]) for picture in pictures]
    images, columns = arrange(given, list(row.images))
    about = {
      'command': name,
      'images': list(paths),
      **{key: value for key, value in asked.items() if value is not None},
      'model': common.model,
      'prior_model': common.prior_model,
      'dtype': common.dtype,
      **dataclasses.asdict(how),
      'num_images': len(row.images),
      'measured': row.measured,
      'software': f'unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}',
    }
    text = json.dumps(about, indent=2, ensure_ascii=False)
    title = slug(' '.join([name, *(Path(path).stem for path in paths)]))
    folder.save(f'{title}.png', make_grid(np.stack(images), columns), {'settings': text})
    folder.save_text(f'{title}.json', text + '\n')
  for what, value in row.measured.items():
    print(f'{what.replace("_", " ")}: {value}', file=sys.stderr)
