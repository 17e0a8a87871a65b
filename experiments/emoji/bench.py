"""A model, its judge and the captions it is measured on: what `evaluate` and `sweep` share."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import unclip_jax
from experiments.emoji import held_out, measures
from experiments.emoji.compose import Sprites, in_domain, load_sprites
from experiments.emoji.held_out import Gallery
from experiments.emoji.parser import Parser
from unclip_jax import Unclip
from unclip_jax.evaluate.retrieval import Interval, bootstrap, is_first
from unclip_jax.systems import settings
from unclip_jax.systems.loading import find_folder
from unclip_jax.types import UnclipError

DOMAIN = ('styles', 'groups', 'labels')
Row = dict[str, Interval | float]  # measures by their names
Values = dict[str, np.ndarray]  # the same of each picture


class Bench:
  """A model, its judge, and the captions that it is asked for.

  Attributes:
    model: what generates.
    judge: a model with a CLIP alone.
    sprites: of a build as large as the model's pictures, or the one of the repository.
    gallery: captions of held-out pairs, filled up with others.
    options: of the decoder's training, its domain among them.
    asked: the truths of the held-out pairs, each `num_samples` times.
    labels: of `asked`, the rows of the gallery.
  """

  def __init__(
    self,
    model: Unclip,
    judge: Unclip,
    sprites: Sprites,
    gallery: Gallery,
    options: dict[str, Any],
    num_samples: int,
    seed: int,
  ):
    self.model, self.judge, self.sprites, self.gallery = model, judge, sprites, gallery
    self.options = options
    self.num_samples, self.seed = num_samples, seed
    self.labels = np.repeat(np.arange(gallery.num_asked), num_samples)
    self.asked = [gallery.truths[i] for i in self.labels]
    self.size = settings.picture_size(model.config)
    self._styles_and_grounds = [(sprites.style[t.sprite_index], t.background) for t in self.asked]
    self._on_same_ground = {
      key: np.asarray(judge.encode_text(held_out.captions_on_same_ground(sprites, gallery, truth)))
      for key, truth in dict(zip(self._styles_and_grounds, self.asked, strict=True)).items()
    }
    styles = options['styles'] or sorted(set(sprites.style))
    # [captions, styles, d], the style that was asked for as the first.
    in_styles = [
      held_out.in_styles(sprites, truth, styles) for truth in gallery.truths[: gallery.num_asked]
    ]
    flat = np.asarray(judge.encode_text([caption for row in in_styles for caption in row]))
    self._in_styles = flat.reshape(len(in_styles), len(styles), -1)
    self._captions = np.asarray(judge.encode_text(gallery.captions))
    # For each background that is asked for, all objects on another one, the same for all.
    self._elsewhere = {}
    for background in {truth.background for truth in self.asked}:
      other = held_out.other_background(background)
      pictures = held_out.on_background(gallery.truths, other)
      self._elsewhere[background] = self.judge_images(
        held_out.real_pictures(sprites, pictures, self.size)
      )
    self.real = held_out.real_pictures(sprites, self.asked, self.size)

  def num_unseen(self) -> int:
    """How many of the captions asked for name a concept that training did not show in any style."""
    sprites = self.sprites
    fits = in_domain(sprites, *domain_of(self.options))
    known = set(sprites.concept[fits & (sprites.split == 'train')])
    asked = self.gallery.truths[: self.gallery.num_asked]
    return sum(sprites.concept[truth.sprite_index] not in known for truth in asked)

  def judge_images(self, images: np.ndarray) -> np.ndarray:
    """Features [n, d] of pictures, as the judge sees them."""
    parts = [self.judge.encode_image(images[i : i + 64]) for i in range(0, len(images), 64)]
    return np.concatenate([np.asarray(part) for part in parts])

  def draw(self, captions: Sequence[str], num_images: int, **options: Any) -> np.ndarray:
    """Pictures of captions, `num_images` each."""
    return self.model.sample(list(captions), self.seed, num_images, **options).images

  def row(self, values: Values) -> Row:
    """Means with their intervals."""
    return {name: bootstrap(value, self.labels) for name, value in values.items()}

  def measure(self, images: np.ndarray) -> Values:
    """All measures of pictures [captions * num_samples] of what was asked for, each [n]."""
    features, truths, groups = self.judge_images(images), self.asked, self.labels
    to_size = images.shape[1]
    real = self.real
    if to_size != self.size:
      real = held_out.real_pictures(self.sprites, truths, to_size)
    style_scores = np.einsum('nd,nsd->ns', features, self._in_styles[groups])
    return {
      'R@1 captions': is_first(features, self._captions, groups),
      'R@1 same ground': self._is_first_by(
        features, self._on_same_ground, self._styles_and_grounds
      ),
      'R@1 real, other ground': self._is_first_by(
        features, self._elsewhere, [truth.background for truth in truths]
      ),
      'asked style': style_scores.argmax(axis=1) == 0,
      'background': measures.has_background(images, truths),
      'silhouette IoU': measures.silhouette_overlap(images, real, truths),
      'colour off by': measures.colour_distance(images, real, truths),
    }

  def _is_first_by(
    self, features: np.ndarray, galleries: dict[Any, np.ndarray], keys: Sequence[Any]
  ) -> np.ndarray:
    """Which pictures come first, each in the gallery of its key: bool [n]."""
    result = np.empty(len(features), bool)
    for key, gallery in galleries.items():
      rows = [i for i, own in enumerate(keys) if own == key]
      result[rows] = is_first(features[rows], gallery, self.labels[rows])
    return result

  def diversity(self, images: np.ndarray) -> float:
    """1 - the mean cosine of the judge's features of two samples of a caption."""
    features = self.judge_images(images).reshape(-1, self.num_samples, self._captions.shape[1])
    n = self.num_samples
    within = (features.sum(axis=1) ** 2).sum(axis=-1) - n
    return float(1 - (within / (n * (n - 1))).mean())


def make_parser(description: str | None, samples: int) -> Parser:
  """The options that `open_bench` reads."""
  parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--run', type=Path, default=Path('runs/emoji_small'), help='what is measured')
  add('--judge', type=Path, default=Path('runs/judge'), help='run of train_judge')
  add('--images', type=Path, default=Path('docs/images'), help='where pictures go')
  add('--data', type=Path, default=None, help='a build as large as the pictures')
  add('--captions', type=int, default=200, help='of the gallery')
  add('--samples', type=int, default=samples, help='of each held-out caption')
  return parser


def open_bench(args: argparse.Namespace, seed: int) -> Bench:
  """The bench that a script's options ask for.

  Raises:
    UnclipError: a model is missing, or an option is out of its range.
  """
  if args.samples < 2 or args.captions < 2:
    raise UnclipError('take at least 2 samples and 2 captions')
  options = read_options(args.run)
  sprites = load_sprites(args.data)
  gallery = held_out.make_gallery(sprites, *domain_of(options), args.captions)
  # Held-out captions have words that the model never saw: no need to hear of each.
  model = dataclasses.replace(unclip_jax.load(str(args.run)), vocabulary=None)
  judge = unclip_jax.load(str(args.judge))
  args.images.mkdir(parents=True, exist_ok=True)
  return Bench(model, judge, sprites, gallery, options, args.samples, seed)


def read_options(run: Path) -> dict[str, Any]:
  """What the decoder of a run, or of a model that comes with its `options.json`, was trained with.

  Raises:
    UnclipError: it is not there or not whole.
  """
  path = run / 'decoder' / 'options.json'
  if not path.exists():
    path = Path(find_folder(str(run))) / 'options.json'
  try:
    options = json.loads(path.read_text())
    return {**options, **dict(zip(DOMAIN, domain_of(options), strict=True))}
  except OSError as error:
    raise UnclipError(
      f'{path} is missing: --run is the folder of a run of train_decoder'
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise UnclipError(f'{path} is not the options of a training: train again') from error


def domain_of(options: dict[str, Any]) -> tuple[Any, Any, Any]:
  """Styles, groups and labels, as `in_domain` takes them."""
  styles, groups, labels = (options[name] for name in DOMAIN)
  return styles, groups, labels


def table(rows: dict[str, Row]) -> str:
  """Rows of measures in Markdown."""
  names = list(dict.fromkeys(name for row in rows.values() for name in row))
  lines = ['| | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 1) + '|']
  for label, row in rows.items():
    cells = [row.get(name, '') for name in names]
    cells = [f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells]
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)
