"""What the scripts of figures share: options, pictures to begin with, sheets with labels.

A script is a function from a `Setup` to a `Sheet`. It begins from emoji, as the embedded model was
trained on, unless --image and --text name others.
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
from unclip_jax.systems.settings import sizes
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
  """

  model: Unclip
  how: Drawing
  images: list[np.ndarray] | None
  texts: list[str] | None

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


Figure = Callable[[Setup], Sheet]


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


def parse(description: str | None) -> argparse.Namespace:
  """The options of all figures."""
  parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--model', default='default', help="a folder or a hub's owner/name")
  add('--prior-model', help='whose prior to take')
  add('--dtype', default='float32')
  add('--image', nargs='+', metavar='FILE', help='pictures in place of emoji')
  add('--text', nargs='+', help="captions in place of the figure's own")
  add('--steps', type=int, default=50, help='of the decoder, where a picture is inverted (50)')
  add('--seed', type=int, default=0)
  add('--out', type=Path, default=Path('out'), help='folder (out)')
  return parser.parse_args()


def make_setup(args: argparse.Namespace) -> Setup:
  """Opens what the options name."""
  use_cache(True)
  images = args.image and [read_picture(path) for path in args.image]
  model = unclip_jax.load(args.model, args.dtype, prior=args.prior_model)
  return Setup(model, Drawing(num_steps=args.steps, seed=args.seed), images, args.text)


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
  several = [figures] if callable(figures) else figures

  def main() -> None:
    args = parse(description)
    setup = make_setup(args)
    for figure in several:
      save(args.out, figure.__name__, figure(setup), sizes(setup.model.config)[-1])

  run(main)
