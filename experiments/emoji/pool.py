"""A pool of composed examples in memory, for training loops that draw their batches from arrays.

Of pictures that are too large for it, crops.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from experiments.emoji.compose import CaptionedEmoji, Example, load_sprites
from unclip_jax.data.pictures import PictureConfig, make_picture


class Pool(NamedTuple):
  """Examples as arrays; see compose.Example for the fields.

  Attributes:
    images: uint8 [n, size, size, 3].
    captions: n strings.
    sprite_index: int32 [n].
    second_index: int32 [n].
    is_scene: bool [n].
    relation: int32 [n].
    background: int32 [n].
  """

  images: np.ndarray
  captions: list[str]
  sprite_index: np.ndarray
  second_index: np.ndarray
  is_scene: np.ndarray
  relation: np.ndarray
  background: np.ndarray


class Crops(NamedTuple):
  """Crops of composed examples, and the same small and degraded.

  Attributes:
    images: uint8 [n, crop, crop, 3].
    low: uint8 [n, crop / factor, crop / factor, 3].
    captions: n strings, of the examples.
  """

  images: np.ndarray
  low: np.ndarray
  captions: list[str]


def captioned_emoji(
  size: int,
  num_examples: int,
  seed: int,
  splits: Sequence[str] = ('train',),
  styles: Sequence[str] | None = None,
  groups: Sequence[str] | None = None,
  labels: Sequence[str] = (),
  scene_fraction: float = 0.15,
  jitter: float = 0.04,
  data_dir: Path | None = None,
) -> grain.MapDataset[Example]:
  """Returns a Grain data set of composed examples: element i depends on (seed, i) alone.

  Args:
    size: side of the pictures in pixels.
    num_examples: how many.
    seed: of everything random.
    splits: which splits the pictures belong to. A scene belongs to the strictest of its objects'.
    styles: restricts the styles; None is all.
    groups: restricts emojibase's groups, e.g. ('food-drink',); None is all.
    labels: names of objects that are drawn although their groups are not, e.g. ('rocket',).
    scene_fraction: how many pictures show two objects.
    jitter: largest relative change of scale, and largest shift relative to the picture's side.
    data_dir: the folder of a build; None is the 64 px build that comes with the repository.

  Raises:
    UnclipError: no build there, a shard cut short, or an unknown split, style, group or label.
  """
  sprites = load_sprites(data_dir)
  source = CaptionedEmoji(
    sprites, size, num_examples, seed, splits, styles, groups, labels, scene_fraction, jitter
  )
  return grain.MapDataset.source(source)


def make_pool(
  size: int,
  num_examples: int,
  seed: int,
  splits: Sequence[str] = ('train',),
  styles: Sequence[str] | None = None,
  groups: Sequence[str] | None = None,
  labels: Sequence[str] = (),
  scene_fraction: float = 0.15,
  jitter: float = 0.04,
  data_dir: Path | None = None,
) -> Pool:
  """Composes `num_examples` examples into arrays; arguments and errors as for `captioned_emoji`."""
  dataset = captioned_emoji(
    size, num_examples, seed, splits, styles, groups, labels, scene_fraction, jitter, data_dir
  )
  images = np.empty((num_examples, size, size, 3), np.uint8)
  rows = []
  for index in range(num_examples):
    example = dataset[index]
    images[index] = example.image
    rows.append(example[1:])
  captions, *truth = zip(*rows, strict=True)
  sprite_index, second_index, is_scene, relation, background = truth
  return Pool(
    images,
    list(captions),
    np.array(sprite_index, np.int32),
    np.array(second_index, np.int32),
    np.array(is_scene, bool),
    np.array(relation, np.int32),
    np.array(background, np.int32),
  )


def make_crops(
  examples: Sequence[Example], num_crops: int, config: PictureConfig, seed: int
) -> Crops:
  """Cuts as many crops from each example, and degrades them: crop i depends on (seed, i) alone.

  One example is composed at a time.

  Args:
    examples: pictures of `config.size` pixels, such as `captioned_emoji` composes.
    num_crops: how many, at least one of each example.
    config: of the crops, with a bsr_factor.
    seed: of everything random.
  """
  low_side = config.side // config.bsr_factor
  images = np.empty((num_crops, config.side, config.side, 3), np.uint8)
  low = np.empty((num_crops, low_side, low_side, 3), np.uint8)
  each, captions = -(-num_crops // len(examples)), []
  for i in range(num_crops):
    if i % each == 0:
      example = examples[i // each]
    rng = np.random.default_rng((seed, i))
    images[i], low[i] = make_picture(example.image, example.caption, config, rng)
    captions.append(example.caption)
  return Crops(images, low, captions)
