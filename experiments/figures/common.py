"""What the scripts of figures share: options, pictures to begin with, sheets with labels.

A script is a function from a `Setup` to a `Sheet`, and a `Figure`, which says what of one's own it
takes. It begins from emoji, as the embedded model was trained on, unless --image and --text name
others.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import unclip_jax
from experiments.emoji import captions
from experiments.emoji.common import run
from experiments.emoji.compose import Truth, draw, load_sprites
from experiments.emoji.parser import Parser
from unclip_jax import Unclip
from unclip_jax.images import read_picture
from unclip_jax.manipulate import Drawing, thumbnail
from unclip_jax.systems.settings import picture_size
from unclip_jax.terminal import use_cache
from unclip_jax.types import UnclipError

_GAP, _LINE, _FONT_SIZE = 4, 16, 12  # pixels
_EMOJI_SIZE = 64  # of the build that comes with the repository
# What the embedded model was trained on.
STYLES, GROUPS = ('flat', '3d'), ('animals-nature', 'food-drink')


class Setup(NamedTuple):
  """What a figure is drawn by.

  Attributes:
    model: that draws.
    how: steps and seed of what is drawn from a picture's own noise.
    images: uint8 [h, w, 3] each, of --image; None takes the figure's own emoji.
    texts: of --text; None takes the figure's own.
    fit: of --fit, a folder of pictures to take components of; None takes others.
  """

  model: Unclip
  how: Drawing
  images: list[np.ndarray] | None
  texts: list[str] | None
  fit: str | None = None

  def pictures(self, *emoji: str) -> list[np.ndarray]:
    """The pictures to begin from: those that were given, else emoji by their descriptions."""
    return [make_emoji(text) for text in emoji] if self.images is None else self.images

  def prompts(self, *texts: str) -> list[str]:
    """The captions to begin from: those that were given, else these."""
    return list(texts) if self.texts is None else self.texts


class Sheet(NamedTuple):
  """Pictures in rows, with words.

  Attributes:
    rows: of pictures, uint8 [h, w, 3] each; all rows are of one length.
    names: above each column.
    titles: above each row; '' for none.
    measured: what there is to say of them, ready for json.dumps.
  """

  rows: Sequence[Sequence[np.ndarray]]
  names: Sequence[str]
  titles: Sequence[str]
  measured: Any = None


class Wanted(NamedTuple):
  """How many pictures or captions of one's own a figure takes, in words and as a test."""

  words: str
  fits: Callable[[int], bool]


ONE = Wanted('one', lambda n: n == 1)
ONE_OR_MORE = Wanted('one or more', lambda n: n >= 1)
TWO_OR_MORE = Wanted('two or more', lambda n: n >= 2)
PAIRS = Wanted('an even number', lambda n: n % 2 == 0)


class Figure(NamedTuple):
  """A figure, and what of one's own it can be drawn of.

  Attributes:
    draw: makes it; its name is that of the figure.
    images: how many of --image; None for none.
    texts: how many of --text; None for none.
    texts_per_image: where captions are of the pictures, so many of each: who gives pictures gives
      captions too.
    may_fit: whether it takes --fit.
  """

  draw: Callable[[Setup], Sheet]
  images: Wanted | None = None
  texts: Wanted | None = None
  texts_per_image: int | None = None
  may_fit: bool = False

  @property
  def name(self) -> str:
    """Of the function, and of its file."""
    return self.draw.__name__

  def check(
    self, images: Sequence[str] | None, texts: Sequence[str] | None, fit: str | None
  ) -> None:
    """Raises UnclipError, before any model is opened, where this is not what it takes."""
    for option, given, wanted in (('image', images, self.images), ('text', texts, self.texts)):
      if given is None:
        continue
      if wanted is None:
        raise UnclipError(f'the figure {self.name} takes no --{option}')
      if not wanted.fits(len(given)):
        raise UnclipError(
          f'the figure {self.name} takes {wanted.words} of --{option}, not {len(given)}'
        )
    if fit is not None and not self.may_fit:
      raise UnclipError(f'the figure {self.name} takes no --fit')
    if self.texts is not None and self.images is not None and images is not None:
      if texts is None:
        raise UnclipError(
          f'the captions of the figure {self.name} are of its pictures: give --text with --image'
        )
      if self.texts_per_image is not None and len(texts) != self.texts_per_image * len(images):
        raise UnclipError(
          f'the figure {self.name} takes {self.texts_per_image} of --text for each --image: '
          f'{self.texts_per_image * len(images)}, not {len(texts)}'
        )


def make_emoji(description: str) -> np.ndarray:
  """A picture uint8 [64, 64, 3] of 'LABEL, STYLE, BACKGROUND', as training composed them.

  Of two objects it is 'LABEL above LABEL, STYLE, BACKGROUND', or another relation.
  """
  sprites = load_sprites()
  things, style, background = (part.strip() for part in description.split(','))
  relation = next((name for name in captions.RELATIONS if f' {name} ' in things), None)
  labels = [things] if relation is None else things.split(f' {relation} ')
  found = [np.flatnonzero((sprites.label == x) & (sprites.style == style)) for x in labels]
  if not all(len(indices) for indices in found):
    raise UnclipError(f'the emoji have no {description!r}')
  first, second = int(found[0][0]), int(found[-1][0])
  which = 0 if relation is None else captions.RELATIONS.index(relation)
  colour = captions.COLOUR_NAMES.index(background)
  truth = Truth('', first, second, relation is not None, which, colour)
  return draw(sprites, truth, _EMOJI_SIZE)


def parse(figures: Sequence[Figure], description: str | None) -> argparse.Namespace:
  """The options; of several figures those that are named are drawn, `args.figures`.

  Raises:
    UnclipError: there is no such figure, or it does not take what was given.
  """
  parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  by_name = {figure.name: figure for figure in figures}
  if len(figures) > 1:
    add('names', nargs='*', metavar='NAME', help=f'of {", ".join(by_name)} (all)')
  add('--model', default='default', help="a folder or a hub's owner/name")
  add('--prior-model', help='whose prior to take')
  add('--dtype', default='float32')
  own = {'nargs': '+', 'action': 'extend'}
  add('--image', metavar='FILE', help='pictures in place of emoji', **own)
  add('--text', help="captions in place of the figure's own", **own)
  add('--fit', metavar='FOLDER', help='of pca: pictures to take the components of')
  add('--steps', type=int, default=50, help='of the decoder, where a picture is inverted (50)')
  add('--seed', type=int, default=0)
  add('--out', type=Path, default=Path('out'), help='folder (out)')
  args = parser.parse_args()
  names = getattr(args, 'names', None) or list(by_name)
  if unknown := [name for name in names if name not in by_name]:
    raise UnclipError(f'there is no figure {unknown[0]}: take of {", ".join(by_name)}')
  args.figures = [by_name[name] for name in names]
  if len(args.figures) == 1:
    args.figures[0].check(args.image, args.text, args.fit)
  elif any(given is not None for given in (args.image, args.text, args.fit)):
    raise UnclipError('figures take different pictures and captions: name one of them')
  return args


def make_setup(args: argparse.Namespace) -> Setup:
  """Opens what the options name."""
  use_cache(True)
  images = args.image and [read_picture(path) for path in args.image]
  model = unclip_jax.load(args.model, args.dtype, prior=args.prior_model)
  return Setup(model, Drawing(num_steps=args.steps, seed=args.seed), images, args.text, args.fit)


def save(out: Path, name: str, sheet: Sheet, size: int) -> None:
  """Writes a sheet as NAME.webp, pictures at `size` pixels, and prints what was measured."""
  width = len(sheet.names) * (size + _GAP) + _GAP
  heights = [size + _GAP + (_LINE if title else 0) for title in sheet.titles]
  canvas = Image.new('RGB', (width, sum(heights) + _LINE + _GAP), 'white')
  pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_SIZE)
  for i, text in enumerate(sheet.names):
    pen.text((_GAP + i * (size + _GAP), 0), text, 'black', font)
  y = _LINE
  for row, title, height in zip(sheet.rows, sheet.titles, heights, strict=True):
    if title:
      pen.text((_GAP, y), title, 'black', font)
    for i, picture in enumerate(row):
      place = _GAP + i * (size + _GAP), y + (_LINE if title else 0)
      canvas.paste(Image.fromarray(thumbnail(picture, size)), place)
    y += height
  out.mkdir(parents=True, exist_ok=True)
  path = out / f'{name}.webp'
  canvas.save(path, quality=85, method=6)
  print(path)
  if sheet.measured is not None:
    print(json.dumps(sheet.measured, ensure_ascii=False))


def make(figures: Figure | Sequence[Figure], description: str | None) -> None:
  """Draws one figure, as a script, or several."""
  several = [figures] if isinstance(figures, Figure) else figures

  def main() -> None:
    args = parse(several, description)
    setup = make_setup(args)
    for figure in args.figures:
      save(args.out, figure.name, figure.draw(setup), picture_size(setup.model.config))

  run(main)
