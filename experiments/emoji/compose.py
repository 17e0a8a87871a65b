"""Pictures and captions composed from sprites, each a pure function of (seed, index).

Sprites are premultiplied by their alpha before they are resized, so that transparent pixels never
bleed into the edges.
"""

import dataclasses
import difflib
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.emoji import captions
from experiments.emoji.concepts import SPLITS
from unclip_jax.data.sources import data_source
from unclip_jax.types import UnclipError

SHIPPED = Path(__file__).parent / 'data' / '64px'

OBJECT_SCALE = 0.92  # of the picture's side: a rim of background tells its colour
SCENE_SCALE = 0.46
MAX_LISTED = 20  # names in an error; of more, the nearest
MAX_SHARED = 8  # concepts that may share a keyword
CACHE_BYTES = 512 * 2**20
SCENE_OFFSET = 0.245  # of an object's centre from the picture's


@dataclasses.dataclass(frozen=True)
class Sprites:
  """All sprites of a build in their stored order, the splits one after the other.

  Attributes:
    webp: n encoded images.
    size: side of the images in pixels.
    style, concept, label, group, split: one string a sprite.
    keywords: a list of strings a sprite; words that many concepts share ('button') are left out.
  """

  webp: list[bytes]
  size: int
  style: np.ndarray
  concept: np.ndarray
  label: np.ndarray
  group: np.ndarray
  split: np.ndarray
  keywords: list[list[str]]
  _cache: dict[int, Image.Image] = dataclasses.field(init=False, repr=False, default_factory=dict)

  def __len__(self) -> int:
    return len(self.webp)

  @property
  def margin(self) -> int:
    """Width in pixels of the transparent rim that `padded` adds."""
    return max(4, self.size // 4)

  def padded(self, index: int) -> Image.Image:
    """Returns a sprite, premultiplied, within a transparent rim into which a resize may reach.

    What was decoded is kept while it fits into CACHE_BYTES.
    """
    image = self._cache.get(index)
    if image is None:
      side = self.size + 2 * self.margin
      rgba = np.zeros((side, side, 4), np.uint8)
      inner = slice(self.margin, self.margin + self.size)
      rgba[inner, inner] = decode(self.webp[index])
      image = Image.fromarray(rgba).convert('RGBa')
      if (len(self._cache) + 1) * rgba.nbytes <= CACHE_BYTES:
        self._cache[index] = image
    return image


class Truth(NamedTuple):
  """What a picture shows.

  Attributes:
    caption: in words.
    sprite_index: index into Sprites of the (first) object.
    second_index: of the second object in a scene; in other pictures the same as sprite_index.
    is_scene: whether there are two objects.
    relation: index into captions.RELATIONS of where the first stands; 0 where there is one object.
    background: index into captions.COLOUR_NAMES.
  """

  caption: str
  sprite_index: int
  second_index: int
  is_scene: bool
  relation: int
  background: int


class Example(NamedTuple):
  """A picture, uint8 [size, size, 3], and what it shows; the fields of Truth follow the image's."""

  image: np.ndarray
  caption: str
  sprite_index: int
  second_index: int
  is_scene: bool
  relation: int
  background: int


@functools.lru_cache(maxsize=2)
def load_sprites(data_dir: Path | None = None) -> Sprites:
  """Reads a build into memory; its sprites are decoded when they are drawn.

  Args:
    data_dir: the folder of a build; None is the 64 px build that comes with the repository.

  Raises:
    UnclipError: the folder holds no such build, or a shard is cut short.
  """
  records, split_of = [], []
  for split in SPLITS:
    split_records = list(data_source(data_dir or SHIPPED, split))
    records += split_records
    split_of += [split] * len(split_records)
  keywords = [[_text(word) for word in record['keywords']] for record in records]
  text = {
    name: np.array([_text(record[name]) for record in records])
    for name in ('style', 'concept', 'label', 'group')
  }
  return Sprites(
    webp=[record['sprite'] for record in records],
    size=len(decode(records[0]['sprite'])),
    split=np.array(split_of),
    keywords=_specific(keywords, text['concept']),
    **text,
  )


class CaptionedEmoji:
  """A data source for Grain: `source[index]` is an Example that depends on (seed, index) alone."""

  def __init__(
    self,
    sprites: Sprites,
    size: int,
    num_examples: int,
    seed: int,
    splits: Sequence[str] = ('train',),
    styles: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    scene_fraction: float = 0.15,
    jitter: float = 0.04,
  ):
    """Chooses what is drawn.

    Args:
      sprites: of a build.
      size: side of the pictures in pixels.
      num_examples: length of the source.
      seed: of everything random.
      splits: which splits the pictures belong to. A scene belongs to the strictest of its objects'.
      styles: restricts the styles; None is all.
      groups: restricts emojibase's groups, e.g. ('food-drink',); None is all.
      labels: names of objects that are drawn although their groups are not, e.g. ('rocket',).
      scene_fraction: how many pictures show two objects.
      jitter: largest relative change of scale, and largest shift relative to the picture's side.

    Raises:
      UnclipError: an unknown split, style, group or label, or no sprite fits.
    """
    _check_known('split', splits, SPLITS)
    fits = in_domain(sprites, styles, groups, labels)
    self._strictness = np.array([SPLITS.index(split) for split in sprites.split])
    self._primary = np.flatnonzero(fits & np.isin(sprites.split, splits))
    if not len(self._primary):
      raise UnclipError(f'no sprite of splits {tuple(splits)}, styles {styles}, groups {groups}')
    self._partners = {
      (style, strictness): np.flatnonzero(
        fits & (sprites.style == style) & (self._strictness <= strictness)
      )
      for style in np.unique(sprites.style)
      for strictness in range(len(SPLITS))
    }
    self._sprites = sprites
    self._size, self._num_examples, self._seed = size, num_examples, seed
    self._scene_fraction, self._jitter = scene_fraction, jitter

  def __len__(self) -> int:
    return self._num_examples

  def __getitem__(self, index: int) -> Example:
    rng = np.random.default_rng((self._seed, index))
    truth = self._draw_truth(rng)
    return Example(draw(self._sprites, truth, self._size, rng, self._jitter), *truth)

  def truth(self, index: int) -> Truth:
    """Returns the same as `source[index]` without its picture."""
    return self._draw_truth(np.random.default_rng((self._seed, index)))

  def _draw_truth(self, rng: np.random.Generator) -> Truth:
    sprites = self._sprites
    first = int(self._primary[rng.integers(len(self._primary))])
    background = captions.draw_colour(rng)
    style = sprites.style[first]
    if rng.random() < self._scene_fraction:
      partner = self._draw_partner(rng, first)
      if partner is not None:
        first, second = (first, partner) if rng.random() < 0.5 else (partner, first)
        relation = int(rng.integers(len(captions.RELATIONS)))
        words = (sprites.label[first], sprites.label[second], captions.RELATIONS[relation])
        caption = captions.scene_caption(rng, *words, style, background)
        return Truth(caption, first, second, True, relation, background)
    keywords = sprites.keywords[first]
    caption = captions.object_caption(rng, sprites.label[first], keywords, style, background)
    return Truth(caption, first, first, False, 0, background)

  def _draw_partner(self, rng: np.random.Generator, primary: int) -> int | None:
    """Returns a sprite of the style, of another concept and no stricter split, if there is one."""
    sprites = self._sprites
    partners = self._partners[sprites.style[primary], self._strictness[primary]]
    for _ in range(8):
      partner = int(partners[rng.integers(len(partners))])
      if sprites.concept[partner] != sprites.concept[primary]:
        return partner
    return None


def in_domain(
  sprites: Sprites,
  styles: Sequence[str] | None,
  groups: Sequence[str] | None,
  labels: Sequence[str],
) -> np.ndarray:
  """Which sprites are drawn, bool [n]; arguments as for `CaptionedEmoji`.

  Raises:
    UnclipError: an unknown style, group or label, or labels without groups to add them to.
  """
  _check_known('style', styles or (), np.unique(sprites.style))
  _check_known('group', groups or (), np.unique(sprites.group))
  _check_known('label', labels, np.unique(sprites.label))
  if labels and groups is None:
    raise UnclipError('labels add to groups, and without groups all objects are drawn already')
  fits = np.ones(len(sprites), bool)
  if styles is not None:
    fits &= np.isin(sprites.style, styles)
  if groups is not None:
    fits &= np.isin(sprites.group, groups) | np.isin(sprites.label, labels)
  return fits


def draw(
  sprites: Sprites,
  truth: Truth,
  size: int,
  rng: np.random.Generator | None = None,
  jitter: float = 0.04,
) -> np.ndarray:
  """Draws what `truth` says, uint8 [size, size, 3].

  Args:
    sprites: of a build.
    truth: its objects, their places, and the background.
    size: side of the picture in pixels.
    rng: moves and scales the objects a little; None leaves them where they belong.
    jitter: largest relative change of scale, and largest shift relative to the picture's side.
  """
  colour = np.array(captions.COLOURS[captions.COLOUR_NAMES[truth.background]], np.float32)
  canvas = np.broadcast_to(colour, (size, size, 3)).copy()
  places = [(truth.sprite_index, OBJECT_SCALE, (0.5, 0.5))]
  if truth.is_scene:
    dx, dy = ((-1, 0), (1, 0), (0, -1), (0, 1))[truth.relation]
    places = [
      (sprite, SCENE_SCALE, (0.5 + sign * dx * SCENE_OFFSET, 0.5 + sign * dy * SCENE_OFFSET))
      for sprite, sign in ((truth.sprite_index, 1), (truth.second_index, -1))
    ]
  for sprite, scale, centre in places:
    change, shift_x, shift_y = rng.uniform(-jitter, jitter, 3) if rng is not None else (0, 0, 0)
    # A scene's objects move half as far: they are half as large.
    reach = scale / OBJECT_SCALE
    centre = (centre[0] + shift_x * reach, centre[1] + shift_y * reach)
    _paint(canvas, sprites, sprite, scale * (1 + change), centre)
  return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint(
  canvas: np.ndarray, sprites: Sprites, index: int, scale: float, centre: tuple[float, float]
) -> None:
  """Draws a sprite of `scale` times the picture's side around `centre`."""
  size, source, margin = len(canvas), sprites.padded(index), sprites.margin
  cx, cy = centre
  # The whole pixels of the picture that the sprite touches, and the same box in the sprite.
  x0, x1 = _pixel_range(cx, scale, size)
  y0, y1 = _pixel_range(cy, scale, size)
  step = sprites.size / (scale * size)
  left = margin + (x0 - (cx - scale / 2) * size) * step
  top = margin + (y0 - (cy - scale / 2) * size) * step
  box = (left, top, left + (x1 - x0) * step, top + (y1 - y0) * step)
  patch = source.resize((x1 - x0, y1 - y0), Image.Resampling.HAMMING, box=_clamp(box, source))
  patch = np.asarray(patch, np.float32)
  region = canvas[y0:y1, x0:x1]
  region *= 1 - patch[..., 3:] / 255
  region += patch[..., :3]


def decode(webp: bytes) -> np.ndarray:
  """Returns uint8 [size, size, 4] of an encoded sprite."""
  return np.asarray(Image.open(io.BytesIO(webp)).convert('RGBA'))


def _pixel_range(centre: float, scale: float, size: int) -> tuple[int, int]:
  low = int(np.floor((centre - scale / 2) * size))
  high = int(np.ceil((centre + scale / 2) * size))
  return max(low, 0), min(high, size)


def _clamp(
  box: tuple[float, float, float, float], image: Image.Image
) -> tuple[float, float, float, float]:
  left, top, right, bottom = box
  return max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height)


def _specific(keywords: list[list[str]], concept: np.ndarray) -> list[list[str]]:
  """Leaves out the keywords of many concepts: as a caption, they would name no picture."""
  concepts_of: dict[str, set[str]] = {}
  for words, name in zip(keywords, concept, strict=True):
    for word in words:
      concepts_of.setdefault(word, set()).add(name)
  return [[word for word in words if len(concepts_of[word]) <= MAX_SHARED] for words in keywords]


def _check_known(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
  for name in asked:
    if name not in known:
      near = difflib.get_close_matches(name, known) if len(known) > MAX_LISTED else known
      choices = ', '.join(map(str, near)) or 'those of the data set'
      raise UnclipError(f'unknown {kind} {name!r}: choose from {choices}')


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
