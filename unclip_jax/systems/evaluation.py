"""Sets of pictures against sets of pictures and against their captions, as figures.

Pictures stream through the feature networks. Moments are of all of them; what compares pictures
with each other (kernels, neighbours, captions) is of as many as are kept, drawn by a seed.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.evaluate import cosines, frechet, kernel, neighbours, retrieval
from unclip_jax.systems.feature_networks import ClipJudge, FeatureNetwork
from unclip_jax.systems.picture_sets import Pictured, batches
from unclip_jax.systems.settings import check_count, check_seed
from unclip_jax.types import UnclipError

_CHUNK = 1024  # features that go into the moments at a time
_MOST_OF_A_SUBSET = 1000  # of KID, as Bińkowski et al. 2018 take
Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """How sets are compared.

  Attributes:
    resolution: pixels a side that all pictures are brought to first; None takes the shorter side of
      the first one that was generated, or what is drawn.
    resize: of that reduction: 'area', 'bilinear', 'bicubic' or 'lanczos', all antialiased.
    batch_size: pictures that go through a network together.
    most_kept: of each set, for what compares pictures with each other.
    kid_size: pictures of a subset; None takes 1000, or all where there are fewer.
    kid_subsets: how many.
    num_neighbours: of precision and recall.
    ks: of R@k; None takes those of 1, 5 and 10 that leave captions to choose from.
    seed: of what is kept, and of subsets.

  Raises:
    UnclipError: a number is out of range.
  """

  resolution: int | None = None
  resize: str = 'bicubic'
  batch_size: int = 32
  most_kept: int = 10_000
  kid_size: int | None = None
  kid_subsets: int = 100
  num_neighbours: int = neighbours.NUM_NEIGHBOURS
  ks: tuple[int, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    for name, least in (
      ('resolution', 1),
      ('batch_size', 1),
      ('most_kept', 2),
      ('kid_size', 2),
      ('kid_subsets', 1),
      ('num_neighbours', 1),
    ):
      if getattr(self, name) is not None:
        check_count(name.replace('_', ' '), getattr(self, name), least)
    check_seed(self.seed)


class Seen(NamedTuple):
  """A set as one network sees it.

  Attributes:
    moments: of all pictures.
    rows: float32 [m, d], the features of those that are kept.
  """

  moments: frechet.Moments
  rows: np.ndarray


class PictureSet(NamedTuple):
  """A set as all networks see it.

  Attributes:
    seen: for each network.
    captions: of the m pictures that are kept, each with any number.
  """

  seen: tuple[Seen, ...]
  captions: tuple[tuple[str, ...], ...]


def look(
  pictures: Iterable[Pictured],
  count: int,
  networks: Sequence[FeatureNetwork],
  options: Options,
  tell: Callable[[int], None] = lambda done: None,
) -> PictureSet:
  """Streams pictures through networks.

  Args:
    pictures: all of one size.
    count: how many there may be, from which those that are kept are drawn.
    networks: to look with.
    options: batches, and how many are kept.
    tell: called with the number of pictures done, after each batch.

  Raises:
    UnclipError: there are no pictures.
  """
  draw = np.random.default_rng(options.seed)
  kept = set(range(count))
  if count > options.most_kept:
    kept = set(draw.choice(count, options.most_kept, replace=False).tolist())
  parts = [_Sums(network.dims) for network in networks]
  captions: list[tuple[str, ...]] = []
  done = 0
  for batch, images in batches(pictures, options.batch_size):
    is_kept = np.array([picture.index in kept for picture in batch])
    for network, sums in zip(networks, parts, strict=True):
      sums.add(network.encode(images)[: len(batch)], is_kept)
    captions += [picture.captions for picture in batch if picture.index in kept]
    done += len(batch)
    tell(done)
  if not done:
    raise UnclipError('there are no pictures to evaluate: give a folder that has some')
  return PictureSet(tuple(sums.finish() for sums in parts), tuple(captions))


def join(parts: Sequence[PictureSet], options: Options) -> PictureSet:
  """One set of several; of what they have kept, `options.most_kept` is drawn.

  Raises:
    UnclipError: there are none.
  """
  seen = []
  captions = tuple(some for part in parts for some in part.captions)
  kept = np.arange(len(captions))
  if len(kept) > options.most_kept:
    draw = np.random.default_rng(options.seed)
    kept = np.sort(draw.choice(kept, options.most_kept, replace=False))
  for of_network in zip(*(part.seen for part in parts), strict=True):
    rows = np.concatenate([some.rows for some in of_network])
    seen.append(Seen(frechet.merge(some.moments for some in of_network), rows[kept]))
  if not seen:
    raise UnclipError('there are no pictures to evaluate: give a folder that has some')
  return PictureSet(tuple(seen), tuple(captions[i] for i in kept))


class _Sums:
  """The features of one network, as they come."""

  def __init__(self, dims: int) -> None:
    self._moments = frechet.moments_of(np.zeros((0, dims)))
    self._waiting: list[np.ndarray] = []
    self._kept = [np.zeros((0, dims), np.float32)]

  def add(self, rows: np.ndarray, is_kept: np.ndarray) -> None:
    self._kept.append(np.float32(rows[is_kept]))
    self._waiting.append(rows)
    if sum(map(len, self._waiting)) >= _CHUNK:
      self._flush()

  def finish(self) -> Seen:
    self._flush()
    return Seen(self._moments, np.concatenate(self._kept))

  def _flush(self) -> None:
    if self._waiting:
      rows = frechet.moments_of(np.concatenate(self._waiting))
      self._moments, self._waiting = frechet.merge([self._moments, rows]), []


# --- Figures.


def distance(network: FeatureNetwork, generated: Seen, reference: Seen) -> Entry:
  """The Fréchet distance of two sets: FID by Inception, FD by CLIP.

  Raises:
    UnclipError: a set has fewer than two pictures.
  """
  a, b = generated.moments, reference.moments
  return {
    'figure': 'FD' if network.kind == 'clip' else 'FID',
    'value': frechet.distance_of_moments(a, b),
    'generated': a.count,
    'reference': b.count,
    'warning': frechet.notice_of_size(a.count, b.count, network.dims),
    **_looked_at_by(network),
  }


def compare(
  network: FeatureNetwork, generated: Seen, reference: Seen, options: Options
) -> list[Entry]:
  """The figures of two sets by one network.

  FID and KID by Inception; by CLIP the same distances, called FD and KD, and CMMD; precision and
  recall by either.

  Raises:
    UnclipError: a set is smaller than a figure needs.
  """
  rows = generated.rows, reference.rows
  kept = {'generated': len(rows[0]), 'reference': len(rows[1])}
  is_clip = network.kind == 'clip'
  size = options.kid_size or min(_MOST_OF_A_SUBSET, *kept.values())
  entries = [distance(network, generated, reference)]
  subsets = kernel.draw_subsets(*kept.values(), size, options.kid_subsets, options.seed)
  spread = kernel.kid(*rows, subsets)
  entries.append(
    {
      'figure': 'KD' if is_clip else 'KID',
      'value': spread.mean,
      'std': spread.std,
      **kept,
      'settings': f'{options.kid_subsets} subsets of {size}',
    }
  )
  if is_clip:
    entries.append({'figure': 'CMMD', 'value': kernel.cmmd(*rows), **kept})
  shares = neighbours.precision_recall(*rows, options.num_neighbours)
  for name, share in shares._asdict().items():
    settings = f'{options.num_neighbours} nearest neighbours'
    entries.append({'figure': name, 'value': share, **kept, 'settings': settings})
  return [entry | _looked_at_by(network) for entry in entries]


def meet_captions(
  judge: ClipJudge, seen: Seen, captions: Sequence[tuple[str, ...]], options: Options
) -> list[Entry]:
  """CLIP score, R@k of captions by pictures, and diversity, of pictures that have captions.

  Of several captions of a picture the first counts.

  Raises:
    UnclipError: there are fewer captions than an R@k that was asked for needs.
  """
  has = np.array([bool(texts) for texts in captions], bool)
  if judge.encode_text is None or not has.any():
    return []
  texts = [some[0] for some in captions if some]
  names, groups = np.unique(texts, return_inverse=True)
  z_i, z_t = seen.rows[has], judge.encode_text(names.tolist())
  count = {'generated': len(z_i)}
  common = {**_looked_at_by(judge.network), 'settings': f'{len(names)} captions'}
  missing = len(has) - len(z_i)
  warning = f'{missing} pictures have no caption, and are left out' if missing else None
  score = cosines.clip_score(z_i, z_t[groups], groups)
  entries: list[Entry] = [{'figure': 'CLIP score', **_interval(score), **count, 'warning': warning}]
  ks = options.ks
  if ks is None:
    ks = tuple(k for k in (1, 5, 10) if k < len(names))
  if ks:
    shares = retrieval.recall_at(z_i, z_t, groups, np.arange(len(names)), ks)
    entries += [{'figure': f'R@{k}', 'value': share, **count} for k, share in shares.items()]
  several = np.bincount(groups)[groups] > 1
  if several.any():
    spread = _interval(cosines.diversity(z_i, groups))
    entries.append({'figure': 'diversity', **spread, 'generated': int(several.sum())})
  return [entry | common for entry in entries]


def _looked_at_by(network: FeatureNetwork) -> Entry:
  return {'features': network.name, 'dims': network.dims, 'preparation': network.preparation}


def _interval(found: retrieval.Interval) -> Entry:
  return {'value': found.mean, 'low': found.low, 'high': found.high}


def networks_of(
  inception: FeatureNetwork | None, judge: ClipJudge | None
) -> tuple[FeatureNetwork, ...]:
  """All that look at pictures, CLIP behind Inception.

  Raises:
    UnclipError: there is none.
  """
  networks = [*([inception] if inception else []), *([judge.network] if judge else [])]
  if not networks:
    raise UnclipError('there is no network to look with: give --inception, --clip or both')
  return tuple(networks)


def evaluate(
  generated: PictureSet,
  reference: PictureSet | None,
  inception: FeatureNetwork | None,
  judge: ClipJudge | None,
  options: Options,
) -> list[Entry]:
  """All figures that two sets of pictures allow; none where there is nothing to compare with.

  Args:
    generated: as `networks_of` the two have seen it.
    reference: real pictures likewise; None compares with captions alone.
    inception: for FID and its like.
    judge: for what CLIP says of them.
    options: how they are compared, the resolution being that of the pictures.

  Returns:
    Entries for JSON. Each states how many pictures it is of, their resolution, the filters that
    they were resized by, the network and, where it is to be read with care, a warning.

  Raises:
    UnclipError: a set is smaller than a figure needs, or as `networks_of`.
  """
  networks = networks_of(inception, judge)
  if reference is None and inception is not None:
    raise UnclipError(
      'Inception compares pictures with others: give their folder by --reference, or leave '
      '--inception out'
    )
  figures: list[Entry] = []
  if reference is not None:
    for network, ours, theirs in zip(networks, generated.seen, reference.seen, strict=True):
      figures += compare(network, ours, theirs, options)
  if judge is not None:
    figures += meet_captions(judge, generated.seen[-1], generated.captions, options)
  common = {'resolution': options.resolution, 'resize': options.resize}
  return [entry | common for entry in figures]


def about() -> dict[str, Any]:
  """When and by what figures are made."""
  return {
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    'device': jax.devices()[0].device_kind,
    'versions': {name: metadata.version(name) for name in ('unclip-jax', 'jax')},
  }
