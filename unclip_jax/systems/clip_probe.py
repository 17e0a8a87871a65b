"""What a CLIP is worth by itself (Radford et al. 2021, section 3), on a folder of pictures.

Pictures in folders by their classes: zero-shot classification by prompts of the folders' names
(section 3.1), and a linear probe where there are others to train on (section 3.2). Pictures with
captions: retrieval, in both directions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.data.examples import Source
from unclip_jax.evaluate import linear_probe, retrieval, zero_shot
from unclip_jax.systems import evaluation
from unclip_jax.systems.feature_networks import ClipJudge
from unclip_jax.systems.picture_sets import batches, read_pictures
from unclip_jax.types import UnclipError

TEMPLATES = ('a photo of a {}.',)  # section 3.1.4
_HELD_OUT = 5  # one of so many of a class chooses the penalty
Entry = dict[str, Any]


class _Embedded(NamedTuple):
  z_i: np.ndarray  # [n, d]
  classes: tuple[str, ...]  # folders, '' where there is none
  captions: tuple[tuple[str, ...], ...]


def probe(
  source: Source,
  train: Source | None,
  judge: ClipJudge,
  templates: Sequence[str] = TEMPLATES,
  batch_size: int = 32,
  tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """All figures of a CLIP that a set of pictures allows.

  Args:
    source: pictures; the folder that one lies in is its class.
    train: pictures in folders of the same names, that a linear probe learns from.
    judge: the CLIP.
    templates: of prompts, with {} for the name of a class.
    batch_size: pictures at a time.
    tell: is told of what is under way.

  Returns:
    {'about', 'figures'}, ready for JSON.

  Raises:
    UnclipError: there are neither classes nor captions, a template has no {}, a class of the
      pictures is not one to learn, or a set is smaller than a figure needs.
  """

  def embed(name: str, pictures: Source) -> _Embedded:
    found, ids, captions = [], [], []
    read = read_pictures(pictures, judge.network.size, 'bicubic', enlarge=True)
    for batch, images in batches(read, batch_size):
      found.append(judge.network.encode(images)[: len(batch)])
      ids += [picture.id for picture in batch]
      captions += [picture.captions for picture in batch]
      tell(f'{name}: {len(ids)} of {len(pictures)}')
    if not found:
      raise UnclipError('there are no pictures to evaluate: give a folder that has some')
    classes = tuple(i.partition('/')[0] if '/' in i else '' for i in ids)
    return _Embedded(np.concatenate(found), classes, tuple(captions))

  measured, figures = embed('pictures', source), []
  names = sorted(set(measured.classes))
  has_classes = '' not in names and len(names) > 1
  reads = judge.encode_text is not None
  if has_classes and reads:
    figures += _zero_shot(measured, names, judge, templates)
  if train is not None:
    if not has_classes:
      raise UnclipError('a linear probe needs pictures in 2 folders or more, which are the classes')
    figures.append(_linear_probe(embed('to learn from', train), measured))
  tell('comparing')
  if any(measured.captions) and reads:
    figures += _retrieval(measured, judge)
  if not figures:
    raise UnclipError(
      'there is nothing to measure: put pictures into 2 folders or more, which are the classes, or '
      'give them captions'
    )
  network = judge.network
  common = {
    'features': network.name,
    'dims': network.dims,
    'preparation': network.preparation,
    'resolution': network.size,
    'resize': 'bicubic',
  }
  return {'about': evaluation.about(), 'figures': [entry | common for entry in figures]}


def notices(results: dict[str, Any], judge: ClipJudge, templates: Sequence[str]) -> list[str]:
  """What is to be said of zero-shot figures: templates in words that a CLIP never saw mislead."""
  if judge.vocabulary is None:
    return []
  if not any(entry['figure'].startswith('zero-shot') for entry in results['figures']):
    return []
  unseen = dict.fromkeys(
    word for text in templates for word in judge.vocabulary.unseen(text.replace('{}', ' '))
  )
  if not unseen:
    return []
  return [
    f'the zero-shot prompts have words that the CLIP never saw, {", ".join(map(repr, unseen))}: '
    "give others by --template, such as 'a {}'"
  ]


def _zero_shot(
  measured: _Embedded, names: list[str], judge: ClipJudge, templates: Sequence[str]
) -> list[Entry]:
  said = [name.replace('_', ' ').replace('-', ' ') for name in names]
  z_t = judge.encode_text(zero_shot.fill_templates(templates, said))
  labels = np.array([names.index(name) for name in measured.classes])
  ks = tuple(k for k in (1, 5) if k < len(names))
  batch = [(measured.z_i, labels)]
  found = zero_shot.zero_shot_accuracy(batch, zero_shot.class_embeddings(z_t, len(names)), ks)
  plural = '' if len(templates) == 1 else 's'
  settings = f'{len(names)} classes, {len(templates)} template{plural}'
  return [
    {
      'figure': f'zero-shot {name.replace("_", " ")}',
      'value': value,
      'count': len(labels),
      'settings': settings,
    }
    for name, value in found.items()
  ]


def _linear_probe(train: _Embedded, measured: _Embedded) -> Entry:
  names = sorted(set(train.classes))
  if unknown := sorted(set(measured.classes) - set(names)):
    raise UnclipError(
      f'there is nothing to learn the class {unknown[0]} from: give pictures of it to --train'
    )
  labels, own = (
    np.array([names.index(name) for name in part.classes]) for part in (train, measured)
  )
  place = np.zeros(len(labels), int)  # of each within its class
  for label in range(len(names)):
    place[labels == label] = np.arange((labels == label).sum())
  held_out = place % _HELD_OUT == _HELD_OUT - 1
  if not held_out.any():
    raise UnclipError(
      f'a linear probe needs at least {_HELD_OUT} pictures of a class to learn from, to choose its '
      'penalty by one of them'
    )
  z_i, num = train.z_i, len(names)
  l2, _ = linear_probe.choose(
    z_i[~held_out], labels[~held_out], z_i[held_out], labels[held_out], num
  )
  fitted = linear_probe.fit(z_i, labels, num, l2)
  return {
    'figure': 'linear probe',
    'value': fitted.accuracy(measured.z_i, own),
    'count': len(own),
    'settings': f'{len(names)} classes learned from {len(labels):,} pictures, l2 {l2:g}',
  }


def _retrieval(measured: _Embedded, judge: ClipJudge) -> list[Entry]:
  has = [i for i, captions in enumerate(measured.captions) if captions]
  z_i = measured.z_i[has]
  texts = [text for i in has for text in measured.captions[i]]
  groups = np.repeat(np.arange(len(has)), [len(measured.captions[i]) for i in has])
  z_t = judge.encode_text(texts)
  entries = []
  for name, queries, gallery, own, theirs in (
    ('captions of pictures', z_i, z_t, np.arange(len(has)), groups),
    ('pictures of captions', z_t, z_i, groups, np.arange(len(has))),
  ):
    ks = tuple(k for k in (1, 5, 10) if k < len(gallery))
    found = retrieval.recall_at(queries, gallery, own, theirs, ks) if ks else {}
    entries += [
      {
        'figure': f'{name}, R@{k}',
        'value': value,
        'count': len(queries),
        'settings': f'among {len(gallery):,}',
      }
      for k, value in found.items()
    ]
  return entries
