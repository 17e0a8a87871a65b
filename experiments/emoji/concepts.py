"""What an emoji shows: its concept, its words in captions, and the split that it belongs to.

A concept is a code-point sequence without its modifiers (skin tone, gender, direction, variation
selectors), so that no variant of a held-out concept is trained on. The splits are functions of
names alone, through a hash, and therefore never drift.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable

SPLITS = ('train', 'val_pairs', 'val_concepts')  # from the loosest to the strictest
CONCEPT_FRACTION = 1 / 20
PAIR_FRACTION = 1 / 10

# Changing the salt changes what every model may see. It is the first that leaves the examples of
# the documentation (red apple, rocket, cat, birthday cake) in training in every style.
_SALT = 'unclip-jax captioned emoji 39'
_VARIATION_SELECTORS = {'fe0e', 'fe0f'}
_SKIN_TONES = {'1f3fb', '1f3fc', '1f3fd', '1f3fe', '1f3ff'}
_GENDER_SIGNS = {'2640', '2642'}
_DIRECTIONS = {'27a1', '2b05'}
_JOINER = '200d'
# Code points that carry a gender of their own, and the neutral one that Unicode pairs with them.
_NEUTRAL = {
  '1f468': '1f9d1',  # man, woman: person
  '1f469': '1f9d1',
  '1f466': '1f9d2',  # boy, girl: child
  '1f467': '1f9d2',
  '1f474': '1f9d3',  # old man, old woman: older person
  '1f475': '1f9d3',
  '1f934': '1fac5',  # prince, princess: person with crown
  '1f478': '1fac5',
  '1f57a': '1f483',  # man dancing: woman dancing
  '1f385': '1f9d1-200d-1f384',  # Santa Claus, Mrs. Claus: Mx Claus
  '1f936': '1f9d1-200d-1f384',
  '1f930': '1fac4',  # pregnant woman, pregnant man: pregnant person
  '1fac3': '1fac4',
  '1f46b': '1f9d1-200d-1f91d-200d-1f9d1',  # couples holding hands: people holding hands
  '1f46c': '1f9d1-200d-1f91d-200d-1f9d1',
  '1f46d': '1f9d1-200d-1f91d-200d-1f9d1',
}
_COUPLES = {
  '1f9d1-200d-2764-200d-1f48b-200d-1f9d1': '1f48f',  # kiss
  '1f9d1-200d-2764-200d-1f9d1': '1f491',  # couple with heart
}
_GENDERED_ADULTS = {'1f468', '1f469'}
_LEFT_OUT_GROUPS = {'component'}
_LEFT_OUT_SUBGROUPS = {'country-flag', 'subdivision-flag'}


@dataclasses.dataclass(frozen=True)
class Emoji:
  """An emoji apart from any drawing of it.

  Attributes:
    code_points: lower-case hexadecimal code points joined by '-', without variation selectors.
    concept: the same without skin tone, gender and direction.
    label: its name in captions, e.g. 'red apple'.
    keywords: other words for it, e.g. ('apple', 'fruit').
    group: emojibase's group, e.g. 'food-drink'.
  """

  code_points: str
  concept: str
  label: str
  keywords: tuple[str, ...]
  group: str


def normal_form(code_points: str) -> str:
  """Returns a code-point sequence in lower case without its variation selectors."""
  parts = code_points.lower().replace('_', '-').split('-')
  return '-'.join(part.zfill(4) for part in parts if part not in _VARIATION_SELECTORS)


def concept_of(code_points: str) -> str:
  """Returns the concept of a code-point sequence: no skin tone, gender, direction or selector."""
  parts = normal_form(code_points).split('-')
  kept: list[str] = []
  for part in parts:
    if part in _SKIN_TONES and kept:
      continue
    if part in _GENDER_SIGNS | _DIRECTIONS and kept and kept[-1] == _JOINER:
      kept.pop()
      continue
    kept.append(_NEUTRAL.get(part, part))
  concept = '-'.join(kept)
  return _COUPLES.get(concept, concept)


def is_variant(code_points: str) -> bool:
  """Returns whether an emoji is another one's drawing in a gender or direction: 'man pilot'.

  Man, woman, boy, girl and the like are emoji of their own.
  """
  first, *rest = normal_form(code_points).split('-')
  gendered = _JOINER in rest and (first in _NEUTRAL or bool(_GENDERED_ADULTS & set(rest)))
  return gendered or not (_GENDER_SIGNS | _DIRECTIONS).isdisjoint(rest)


def clean_label(label: str) -> str:
  """Returns a label as it stands in captions: lower case, no brackets, quotes or colons."""
  label = unicodedata.normalize('NFC', label).lower().replace('’', "'")
  label = re.sub(r'\(.*?\)|[“”"!]', '', label)
  label = re.sub(r'^(person|man|woman): (.*hair|beard)$', r'\1 with \2', label)
  label = re.sub(r'^(person|man|woman): bald$', r'bald \1', label)
  return re.sub(r'[:,\s]+', ' ', label).strip()


def read_emojibase(records: list[dict], meta: dict) -> dict[str, Emoji]:
  """Returns the emoji of emojibase by code points: without variants and without national flags.

  Args:
    records: emojibase's `en/data.json`.
    meta: emojibase's `meta/groups.json`.
  """
  emojis = {}
  for record in records:
    if 'group' not in record:
      continue
    group = meta['groups'][str(record['group'])]
    subgroup = meta['subgroups'][str(record['subgroup'])]
    if group in _LEFT_OUT_GROUPS or subgroup in _LEFT_OUT_SUBGROUPS:
      continue
    code_points = normal_form(record['hexcode'])
    if is_variant(code_points):
      continue
    label = clean_label(record['label'])
    keywords = (clean_label(tag) for tag in record.get('tags', ()))
    keywords = tuple(dict.fromkeys(word for word in keywords if word and word != label))
    emojis[code_points] = Emoji(code_points, concept_of(code_points), label, keywords, group)
  return emojis


def assign_splits(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
  """Returns the split of each (concept, style) pair.

  A twentieth of the concepts is 'val_concepts' in every style. Of the other concepts' pairs a tenth
  is 'val_pairs', as long as the concept remains in training in another style. The rest is 'train'.

  Args:
    pairs: every (concept, style) that exists, whether or not a build holds it.
  """
  styles_of: dict[str, set[str]] = {}
  for concept, style in pairs:
    styles_of.setdefault(concept, set()).add(style)
  splits = {}
  for concept, styles in styles_of.items():
    rank = {style: _fraction(f'pair {concept} {style}') for style in styles}
    if _fraction(f'concept {concept}') < CONCEPT_FRACTION:
      held_out = dict.fromkeys(styles, 'val_concepts')
    else:
      # One style always stays: without it the concept would be held out altogether.
      anchor = max(styles, key=lambda style: (rank[style], style))
      held_out = {
        style: 'val_pairs' for style in styles if rank[style] < PAIR_FRACTION and style != anchor
      }
    for style in styles:
      splits[concept, style] = held_out.get(style, 'train')
  return splits


def _fraction(name: str) -> float:
  """Returns a number in [0, 1) that depends on the name alone."""
  digest = hashlib.sha256(f'{_SALT} {name}'.encode()).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64
