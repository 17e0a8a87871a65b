"""Captions of emoji: what is drawn, in which style, on which background, and where.

A caption without a colour means a white background and one without a style means any style, so
that every prompt of these forms has one meaning. All captions are lower case.
"""

import re
from collections.abc import Sequence

import numpy as np

COLOURS = {
  'white': (255, 255, 255),
  'black': (20, 20, 20),
  'grey': (140, 140, 140),
  'red': (214, 40, 40),
  'orange': (245, 135, 30),
  'yellow': (250, 220, 60),
  'green': (50, 160, 75),
  'teal': (60, 190, 190),
  'blue': (45, 100, 220),
  'purple': (125, 60, 175),
  'pink': (250, 165, 200),
  'brown': (120, 78, 45),
}
COLOUR_NAMES = tuple(COLOURS)
WHITE = COLOUR_NAMES.index('white')
STYLES = ('flat', '3d', 'gradient', 'noto', 'twemoji')
RELATIONS = ('left of', 'right of', 'above', 'below')

# Fractions of the captions; a model learns most from those that say everything.
STYLE_NAMED = 0.75
KEYWORD_INSTEAD = 0.04
KEYWORD_BESIDE = 0.06
COLOUR_NAMED = 0.7
GREY_AS_GRAY = 0.5

_STYLED = (
  'a {style} {thing}',
  'a {style} {thing}',
  '{style} {thing}',
  '{a thing}, {style} style',
  '{a thing}, {style} style',
  '{a thing} in {style} style',
  '{thing}, {style} style',
  'a {style} style {thing}',
)
_PLAIN = ('{a thing}', '{a thing}', '{thing}')
_BACKGROUNDS = (
  ' on a {colour} background',
  ' on a {colour} background',
  ' on a {colour} background',
  ', {colour} background',
  ' on {colour}',
  ' with a {colour} background',
)
_STYLED_SCENES = (
  '{first} {relation} {second}, {style} style',
  '{first} {relation} {second} in {style} style',
  '{style first} {relation} {style second}',
  '{style style}, {first} {relation} {second}',
)
_RELATION_WORDS = {
  'left of': ('to the left of', 'left of'),
  'right of': ('to the right of', 'right of'),
  'above': ('above', 'on top of', 'over'),
  'below': ('below', 'under'),
}

# Plural, uncountable and proper names take no article; other names ending in a single s are plural.
_SINGULAR = {
  'abacus', 'aquarius', 'aries', 'bus', 'cactus', 'compass', 'cross', 'dress', 'fleur-de-lis',
  'glass', 'hibiscus', 'hippopotamus', 'kiss', 'lotus', 'minibus', 'minus', 'octopus', 'oncoming',
  'ophiuchus', 'pisces', 'plus', 'princess', 'rhinoceros', 'sagittarius', 'taurus', 'trolleybus',
  'wireless',
}  # fmt: skip
_WITHOUT_ARTICLE = {
  'aquarius', 'aries', 'bacon', 'bread', 'broccoli', 'butter', 'capricorn', 'clapping hands',
  'clinking beer mugs', 'clinking glasses', 'confetti', 'cooked rice', 'curly hair', 'customs',
  'dna', 'fire', 'fog', 'foggy', 'garlic', 'gemini', 'ginger', 'ice', 'leo', 'libra', 'lightning',
  'love-you', 'map of japan', 'meat on bone', 'men holding hands', 'men with bunny ears',
  'men wrestling', 'money with wings', 'mount fuji', 'mrs. claus', 'mx claus', 'no bicycles',
  'no entry', 'no littering', 'no mobile phones', 'no one under eighteen', 'no pedestrians',
  'no smoking', 'non-potable water', 'ophiuchus', 'people holding hands', 'people hugging',
  'people with bunny ears', 'people wrestling', 'performing arts', 'pisces', 'potable water',
  'sagittarius', 'salt', 'santa claus', 'scorpio', 'skull and crossbones', 'spaghetti', 'sushi',
  'sweat droplets', 'taurus', 'tennis', 'thumbs down', 'thumbs up', 'tokyo tower', 'virgo',
  'woman and man holding hands', 'women holding hands', 'women with bunny ears',
  'women wrestling',
}  # fmt: skip
_CONSONANT_SOUND = ('eu', 'ewe', 'one', 'uni', 'us', 'uk', 'ut', 'uf')
_VOWEL_SOUND = ('hour', 'sos', 'atm', 'x-ray', '8', '11', '18', 'ng ', 'mri')
_SUBJECT_END = re.compile(r' (with|of|in|on|over|under|and|holding|blowing|showing|lifting|at) ')


def article(name: str) -> str:
  """Returns 'a ', 'an ' or, before plurals, substances and proper names, nothing."""
  head = _SUBJECT_END.split(name)[0].split(' ')[-1]
  plural = head.endswith('s') and head not in _SINGULAR and not head.endswith("'s")
  if plural or name in _WITHOUT_ARTICLE:
    return ''
  vowel = name[0] in 'aeiou' and not name.startswith(_CONSONANT_SOUND)
  return 'an ' if vowel or name.startswith(_VOWEL_SOUND) else 'a '


def object_caption(
  rng: np.random.Generator, label: str, keywords: list[str], style: str, colour: int
) -> str:
  """Returns a caption of one object.

  Args:
    rng: chooses the wording, and what is left unsaid.
    label: the object's name.
    keywords: other words for it.
    style: one of STYLES.
    colour: index of the background in COLOUR_NAMES. Other than white it is always named.
  """
  draw = rng.random()
  keyword = _pick(rng, keywords) if keywords else label
  thing = keyword if draw < KEYWORD_INSTEAD else label
  if rng.random() < STYLE_NAMED:
    caption = _fill(_pick(rng, _STYLED), thing, style)
  else:
    caption = _fill(_pick(rng, _PLAIN), thing, style)
  if KEYWORD_INSTEAD <= draw < KEYWORD_INSTEAD + KEYWORD_BESIDE and keyword != label:
    caption = f'{caption}, {keyword}'
  return caption + _background(rng, colour)


def scene_caption(
  rng: np.random.Generator, first: str, second: str, relation: str, style: str, colour: int
) -> str:
  """Returns a caption of two objects: `first` stands `relation` (one of RELATIONS) `second`.

  The other arguments are as for `object_caption`.
  """
  words = _pick(rng, _RELATION_WORDS[relation])
  named = rng.random() < STYLE_NAMED
  template = _pick(rng, _STYLED_SCENES) if named else '{first} {relation} {second}'
  caption = (
    template.replace('{first}', article(first) + first)
    .replace('{second}', article(second) + second)
    .replace('{style first}', _fill('a {style} {thing}', first, style))
    .replace('{style second}', _fill('a {style} {thing}', second, style))
    .replace('{style style}', f'{style} style')
    .replace('{relation}', words)
    .replace('{style}', style)
  )
  return caption + _background(rng, colour)


def in_style(things: str, style: str, colour: int) -> str:
  """Returns the one caption that says all of what is drawn: 'a cat, 3d style on a red background'.

  Args:
    things: one or two objects, with their articles.
    style: one of STYLES.
    colour: index of the background in COLOUR_NAMES.
  """
  name = COLOUR_NAMES[colour]
  return f'{things}, {style} style on {article(name)}{name} background'


def draw_colour(rng: np.random.Generator) -> int:
  """Returns the index of a background: white where captions name none, else any colour."""
  return int(rng.integers(len(COLOURS))) if rng.random() < COLOUR_NAMED else WHITE


def all_wordings(styles: Sequence[str] = STYLES) -> list[str]:
  """Returns the words of every template, and the names of colours and of these styles."""
  templates = (*_STYLED, *_PLAIN, *_BACKGROUNDS, *_STYLED_SCENES)
  words = [re.sub(r'{.*?}', '', template) for template in templates]
  return [*words, *COLOUR_NAMES, 'gray', *styles, *sum(_RELATION_WORDS.values(), ())]


def _fill(template: str, thing: str, style: str) -> str:
  article_of_thing = article(thing)
  if template.startswith('a {style}') and not article_of_thing:
    template = template.removeprefix('a ')
  return (
    template.replace('{a thing}', article_of_thing + thing)
    .replace('{thing}', thing)
    .replace('{style}', style)
  )


def _background(rng: np.random.Generator, colour: int) -> str:
  # White is named now and then, so that naming it works too.
  if colour == WHITE and rng.random() < 0.8:
    return ''
  name = COLOUR_NAMES[colour]
  if name == 'grey' and rng.random() < GREY_AS_GRAY:
    name = 'gray'
  phrase = _pick(rng, _BACKGROUNDS).replace('{colour}', name)
  return phrase.replace(' a orange', ' an orange')


def _pick(rng: np.random.Generator, options):
  return options[int(rng.integers(len(options)))]
