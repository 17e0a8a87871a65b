"""The words that a model was trained on, kept in one vocabulary.json.

  {"lists": {"styles": ["flat", ...], "concepts": ["ant", ...], ...},   what people are shown
   "words": ["a", "ant", "background", ...],      all that the captions of training are made of
   "prompt": "{concept}, {style} style"}          how a concept is asked for in a style

There may be other lists beside styles and concepts. Words are compared in lower case, without
punctuation: 't-rex' is two of them.
"""

import dataclasses
import difflib
import json
import os
import unicodedata
from collections.abc import Mapping
from typing import Any

from etils import epath

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError

CONCEPTS, STYLES = 'concepts', 'styles'
_KEYS = {'lists', 'words', 'prompt'}
# Of difflib's ratio: 'bleu' is blue (0.75). Words that no list shows must be nearer.
_SPELLED_ALIKE = 0.75
_SPELLED_ALIKE_UNLISTED = 0.8


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What a model knows.

  Attributes:
    lists: name -> what is shown under it; 'styles' and 'concepts' are there and not empty.
    words: as `split_words` gives them.
    prompt: a caption with {concept} and perhaps {style} to be filled in.
  """

  lists: Mapping[str, tuple[str, ...]]
  words: frozenset[str]
  prompt: str

  @property
  def concepts(self) -> tuple[str, ...]:
    """The objects that can be asked for."""
    return self.lists[CONCEPTS]

  @property
  def styles(self) -> tuple[str, ...]:
    """The styles that they can be asked for in."""
    return self.lists[STYLES]

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Vocabulary':
    """Reads a vocabulary.json.

    Raises:
      UnclipError: it cannot be read, or is not as above; the message names the file.
    """
    path = epath.Path(path)
    try:
      text = path.read_text(encoding='utf-8')
      git_lfs.refuse_pointer(path, text)
      fields = json.loads(text)
    except UnclipError:
      raise
    except OSError as error:
      raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
    except (ValueError, RecursionError) as error:
      raise UnclipError(f'{path} is not valid JSON ({error}): download it again') from error
    if wrong := _what_is_wrong(fields):
      raise UnclipError(f'{path}: {wrong}: correct it or download it again')
    return cls(
      {name: tuple(items) for name, items in fields['lists'].items()},
      frozenset(word for text in fields['words'] for word in split_words(text)),
      fields['prompt'],
    )

  def to_json(self) -> dict[str, Any]:
    """The content of its file."""
    lists = {name: list(items) for name, items in self.lists.items()}
    return {'lists': lists, 'words': sorted(self.words), 'prompt': self.prompt}

  def ask(self, concept: str, style: str) -> str:
    """The prompt for a concept in a style."""
    return self.prompt.replace('{concept}', concept).replace('{style}', style)

  def unseen(self, text: str) -> list[str]:
    """The words of a prompt that training never saw, once each; plurals count as seen."""
    words = dict.fromkeys(split_words(text))
    return [word for word in words if self.words.isdisjoint((word, *_inflected(word)))]

  def spelled_like(self, word: str) -> str | None:
    """The word that `word` may be a slip of the fingers for: one that is listed before others."""
    texts = {text for items in self.lists.values() for text in items}
    listed = texts | {part for text in texts for part in split_words(text)}
    for known, cutoff in ((listed, _SPELLED_ALIKE), (self.words, _SPELLED_ALIKE_UNLISTED)):
      near = difflib.get_close_matches(word, sorted(known), 5, cutoff)
      # A slip seldom takes the first letter.
      if near:
        return max(near, key=lambda text: (text[0] == word[0], _alikeness(text, word)))
    return None


def _alikeness(one: str, other: str) -> float:
  return difflib.SequenceMatcher(None, other, one).ratio()


def split_words(text: str) -> list[str]:
  """The words of a text: letters, numbers and symbols such as emoji, in lower case, NFC."""
  text = unicodedata.normalize('NFC', text.lower()).replace("'", '').replace('’', '')
  categories = map(unicodedata.category, text)
  kept = (
    character if category[0] in 'LMN' or category == 'So' else ' '
    for character, category in zip(text, categories, strict=True)
  )
  return ''.join(kept).split()


def _inflected(word: str) -> tuple[str, ...]:
  """What may be the plural or the singular of a word."""
  endings = (('', 's'), ('', 'es'), ('y', 'ies'))
  plurals = [word.removesuffix(one) + many for one, many in endings if word.endswith(one)]
  singulars = [word.removesuffix(many) + one for one, many in endings if word.endswith(many)]
  return (*plurals, *singulars)


def _what_is_wrong(fields: object) -> str | None:
  if not isinstance(fields, dict) or fields.keys() != _KEYS:
    return f'it must be a JSON object of {", ".join(sorted(_KEYS))}'
  lists, prompt = fields['lists'], fields['prompt']
  if not isinstance(lists, dict):
    return 'lists must be a JSON object'
  for name in (CONCEPTS, STYLES):
    if not lists.get(name):
      return f'lists has no {name}'
  for name, texts in (*lists.items(), ('words', fields['words'])):
    if not name.isprintable() or not _are_texts(texts):
      return f'{name!r} must be a list of texts, none of them empty or with control characters'
  if not _are_texts([prompt]) or '{concept}' not in prompt:
    return 'prompt must be a text with {concept} in it'
  return None


def _are_texts(texts: object) -> bool:
  return isinstance(texts, list) and all(
    isinstance(text, str) and text.strip() and text.isprintable() for text in texts
  )
