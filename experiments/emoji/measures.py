"""Plain measures of pictures, beside the judge: what may fool a network does not fool these."""

from collections.abc import Sequence

import numpy as np

from experiments.emoji import captions
from experiments.emoji.compose import Truth

BACKGROUND_LEVELS = 12  # of 255: the most that a background may be off in any channel
OBJECT_LEVELS = 40  # of 255: what differs more from the background belongs to the object
MIN_COVERED = 0.5  # of a real object's silhouette: with less, the object is not there
DISTINCT_LEVELS = 60  # of 255: objects less apart in colour do not tell which is where


def asked_colours(truths: Sequence[Truth]) -> np.ndarray:
  """The backgrounds' colours, float32 [n, 1, 1, 3]."""
  colours = [captions.COLOURS[captions.COLOUR_NAMES[truth.background]] for truth in truths]
  return np.array(colours, np.float32)[:, None, None]


def has_background(images: np.ndarray, truths: Sequence[Truth]) -> np.ndarray:
  """Which pictures (uint8 [n, h, w, 3]) have the asked background, by the median of their rims."""
  width = max(1, images.shape[1] // 32)
  inner = np.zeros(images.shape[1:3], bool)
  inner[width:-width, width:-width] = True
  rim = np.median(images[:, ~inner], axis=1)
  return (np.abs(rim - asked_colours(truths)[:, 0, 0]) <= BACKGROUND_LEVELS).all(axis=-1)


def silhouettes(images: np.ndarray, truths: Sequence[Truth]) -> np.ndarray:
  """Where a picture is not its asked background: bool [n, h, w]."""
  return np.abs(images - asked_colours(truths)).max(axis=-1) > OBJECT_LEVELS


def silhouette_overlap(images: np.ndarray, real: np.ndarray, truths: Sequence[Truth]) -> np.ndarray:
  """Intersection over union of the silhouettes of pictures and of the real ones, [n] in [0, 1]."""
  ours, theirs = silhouettes(images, truths), silhouettes(real, truths)
  union = (ours | theirs).sum(axis=(1, 2))
  return (ours & theirs).sum(axis=(1, 2)) / np.maximum(union, 1)


def colour_distance(images: np.ndarray, real: np.ndarray, truths: Sequence[Truth]) -> np.ndarray:
  """Distance of the mean colours within the real picture's silhouette, [n] in grey levels."""
  where = silhouettes(real, truths)
  return np.linalg.norm(_mean_colour(images, where) - _mean_colour(real, where), axis=-1)


def is_bound(
  images: np.ndarray, real: np.ndarray, truths: Sequence[Truth]
) -> tuple[np.ndarray, np.ndarray]:
  """Whether each object of a scene is there, with its own colour rather than the other's.

  Args:
    images: uint8 [n, h, w, 3], of scenes.
    real: the same scenes as they are to be.
    truths: of the scenes.

  Returns:
    bool [n], and bool [n], where the colours of the two objects are apart enough to tell.
  """
  where, drawn = silhouettes(real, truths), silhouettes(images, truths)
  halves = np.stack([_half(truth.relation, where.shape[1:]) for truth in truths])
  parts = (where & halves, where & ~halves)
  ours = [_mean_colour(images, part) for part in parts]
  theirs = [_mean_colour(real, part) for part in parts]

  def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=-1)

  bound = np.ones(len(truths), bool)
  for i, part in enumerate(parts):
    bound &= apart(ours[i], theirs[i]) < apart(ours[i], theirs[1 - i])
    covered = (drawn & part).sum(axis=(1, 2)) / np.maximum(part.sum(axis=(1, 2)), 1)
    bound &= covered >= MIN_COVERED
  return bound, apart(*theirs) > DISTINCT_LEVELS


def _mean_colour(images: np.ndarray, where: np.ndarray) -> np.ndarray:
  """[n, 3]: the mean over the pixels of `where`, bool [n, h, w]."""
  weights = where[..., None].astype(np.float64)
  return (images * weights).sum(axis=(1, 2)) / np.maximum(weights.sum(axis=(1, 2)), 1)


def _half(relation: int, shape: tuple[int, ...]) -> np.ndarray:
  """The half of a picture in which the first object of a relation stands."""
  y, x = np.mgrid[: shape[0], : shape[1]] / np.array(shape).reshape(2, 1, 1)
  return (x < 0.5, x >= 0.5, y < 0.5, y >= 0.5)[relation]
