"""The words of a training's domain: what its captions are made of, and what they can ask for."""

from collections.abc import Sequence

import numpy as np

from experiments.emoji import captions
from experiments.emoji.compose import Sprites, in_domain
from unclip_jax.data.vocabulary import Vocabulary, split_words


def make_vocabulary(
  sprites: Sprites,
  styles: Sequence[str] | None,
  groups: Sequence[str] | None,
  labels: Sequence[str],
  splits: Sequence[str] = ('train',),
) -> Vocabulary:
  """The vocabulary of a model that is trained on some of the sprites.

  Args:
    sprites: of a build.
    styles: as for `CaptionedEmoji`, like the other arguments.
    groups: see styles.
    labels: see styles.
    splits: that are trained on; what only others show is not known.
  """
  drawn = np.flatnonzero(
    in_domain(sprites, styles, groups, labels) & np.isin(sprites.split, splits)
  )
  known_styles = [style for style in captions.STYLES if style in sprites.style[drawn]]
  concepts = np.unique(sprites.label[drawn]).tolist()
  keywords = {word for i in drawn for word in sprites.keywords[i]}
  texts = [*captions.all_wordings(known_styles), 'an', *concepts, *keywords]
  lists = {
    'styles': known_styles,
    'colours': captions.COLOUR_NAMES,
    'relations': captions.RELATIONS,
    'concepts': concepts,
  }
  return Vocabulary(
    lists={name: tuple(items) for name, items in lists.items()},
    words=frozenset(word for text in texts for word in split_words(text)),
    prompt='{concept}, {style} style',
  )
