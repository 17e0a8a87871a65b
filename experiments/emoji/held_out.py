"""The captions that the model is measured on, chosen by hash, and their real pictures."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.emoji import captions
from experiments.emoji.compose import Sprites, Truth, draw, in_domain
from unclip_jax.types import UnclipError


class Gallery(NamedTuple):
  """What a query is to be found among.

  Attributes:
    truths: one a caption; those that are asked for come first.
    num_asked: how many are held-out pairs, from which pictures are generated. The others are
      pairs of the training set, there to be mistaken for.
  """

  truths: list[Truth]
  num_asked: int

  @property
  def captions(self) -> list[str]:
    """Of all, in order."""
    return [truth.caption for truth in self.truths]


def make_gallery(
  sprites: Sprites,
  styles: Sequence[str] | None,
  groups: Sequence[str] | None,
  labels: Sequence[str],
  size: int = 200,
  split: str = 'val_pairs',
) -> Gallery:
  """Captions of a domain, one a concept, in the order of their hashes.

  Held-out pairs come first; where the domain has fewer than `size` of them, pairs of the training
  set fill up the gallery.

  Raises:
    UnclipError: the domain has no held-out pair, or is none.
  """
  fits = in_domain(sprites, styles, groups, labels)
  asked = _one_a_concept(sprites, fits & (sprites.split == split))[:size]
  if not asked:
    raise UnclipError(f'the domain has no pair of {split}: take more styles or groups')
  fits &= ~np.isin(sprites.concept, sprites.concept[asked])
  others = _one_a_concept(sprites, fits & (sprites.split == 'train'))[: size - len(asked)]
  truths = [_truth(sprites, index) for index in [*asked, *others]]
  return Gallery(truths, len(asked))


def real_pictures(sprites: Sprites, truths: Sequence[Truth], size: int) -> np.ndarray:
  """The pictures as they are to be, uint8 [n, size, size, 3]."""
  return np.stack([draw(sprites, truth, size) for truth in truths])


def captions_on_same_ground(sprites: Sprites, gallery: Gallery, asked: Truth) -> list[str]:
  """Captions of all objects of a gallery in the style and on the background of one truth.

  Among them only the object tells which is right; in the gallery's own captions the background
  alone leaves one in a dozen.
  """
  style = sprites.style[asked.sprite_index]
  return [
    _caption(sprites, truth.sprite_index, style, asked.background) for truth in gallery.truths
  ]


def in_styles(sprites: Sprites, truth: Truth, styles: Sequence[str]) -> list[str]:
  """A truth's caption in each of the styles, its own as the first."""
  own = sprites.style[truth.sprite_index]
  return [
    _caption(sprites, truth.sprite_index, style, truth.background)
    for style in (own, *(style for style in styles if style != own))
  ]


def moved(sprites: Sprites, truths: Sequence[Truth], size: int, jitter: float = 0.04) -> np.ndarray:
  """The pictures with their objects moved and scaled a little, uint8 [n, size, size, 3]."""
  rows = enumerate(truths)
  return np.stack([draw(sprites, t, size, np.random.default_rng(i), jitter) for i, t in rows])


def in_another_style(
  sprites: Sprites, truths: Sequence[Truth], styles: Sequence[str] | None
) -> tuple[list[Truth], list[int]]:
  """Training pictures of the truths' objects in other styles, and which truths have one."""
  result, indices = [], []
  fits = in_domain(sprites, styles, None, ()) & (sprites.split == 'train')
  for i, truth in enumerate(truths):
    same = fits & (sprites.concept == sprites.concept[truth.sprite_index])
    others = [int(j) for j in np.flatnonzero(same) if j != truth.sprite_index]
    if others:
      result.append(truth._replace(sprite_index=others[0], second_index=others[0]))
      indices.append(i)
  return result, indices


def on_background(truths: Sequence[Truth], background: int) -> list[Truth]:
  """The same objects on one background, an index into captions.COLOUR_NAMES.

  The captions are left as they are.
  """
  return [truth._replace(background=background) for truth in truths]


def other_background(background: int) -> int:
  """The colour that is half the list away."""
  n = len(captions.COLOUR_NAMES)
  return (background + n // 2) % n


def scenes(
  sprites: Sprites,
  styles: Sequence[str] | None,
  groups: Sequence[str] | None,
  labels: Sequence[str],
  num: int,
) -> list[list[Truth]]:
  """Two objects of the training set each, and the same two in the three other places.

  Returns:
    `num` lists of four truths: the one that is asked for comes first. The opposite place is also
    the scene with its objects exchanged.

  Raises:
    UnclipError: a style of the domain has only one object.
  """
  fits = in_domain(sprites, styles, groups, labels) & (sprites.split == 'train')
  known, result = [_truth(sprites, index) for index in _one_a_concept(sprites, fits)], []
  style_of = sprites.style
  for i in range(num):
    first, background = known[i % len(known)].sprite_index, known[i % len(known)].background
    fellows = [t.sprite_index for t in known if style_of[t.sprite_index] == style_of[first]]
    fellows.remove(first)
    if not fellows:
      raise UnclipError(f'the domain has one object of style {style_of[first]}: scenes need two')
    second = fellows[_hash(f'partner {i} {sprites.concept[first]}') % len(fellows)]
    places = range(len(captions.RELATIONS))
    asked = _hash(f'place {i} {sprites.concept[first]}') % len(places)
    order = [asked, *(place for place in places if place != asked)]
    result.append([_scene(sprites, first, second, place, background) for place in order])
  return result


def _scene(sprites: Sprites, first: int, second: int, relation: int, background: int) -> Truth:
  words = {'left of': 'to the left of', 'right of': 'to the right of'}
  place = words.get(captions.RELATIONS[relation], captions.RELATIONS[relation])
  one, other = (captions.article(sprites.label[i]) + sprites.label[i] for i in (first, second))
  caption = captions.in_style(f'{one} {place} {other}', sprites.style[first], background)
  return Truth(caption, first, second, True, relation, background)


def _truth(sprites: Sprites, index: int) -> Truth:
  background = _hash(f'background {sprites.concept[index]}') % len(captions.COLOUR_NAMES)
  caption = _caption(sprites, index, sprites.style[index], background)
  return Truth(caption, index, index, False, 0, background)


def _caption(sprites: Sprites, index: int, style: str, background: int) -> str:
  label = sprites.label[index]
  return captions.in_style(captions.article(label) + label, style, background)


def _one_a_concept(sprites: Sprites, fits: np.ndarray) -> list[int]:
  """Indices of sprites in the order of their hashes, the first of each concept."""
  name = {int(i): f'{sprites.concept[i]} {sprites.style[i]}' for i in np.flatnonzero(fits)}
  chosen: dict[str, int] = {}
  for index in sorted(name, key=lambda i: _hash(name[i])):
    chosen.setdefault(str(sprites.concept[index]), index)
  return list(chosen.values())


def _hash(name: str) -> int:
  return int.from_bytes(hashlib.sha256(f'evaluation {name}'.encode()).digest()[:8])
