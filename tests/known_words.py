"""A vocabulary of few words, and its file, for the tests of what warns of others."""

import json
from pathlib import Path

from unclip_jax.data.vocabulary import Vocabulary, split_words

KNOWN = Vocabulary(
  lists={
    'styles': ('flat', '3d'),
    'colours': ('grey',),
    'concepts': ('berries', 'red apple', 'rocket', 't-rex'),
  },
  words=frozenset(split_words('a an on flat 3d style red apple rocket t rex berries grey gray')),
  prompt='{style} {concept}',
)


def add_vocabulary(folder: Path, content: object) -> Path:
  """Gives a model folder a vocabulary, as a file that anybody may have written."""
  manifest = json.loads((folder / 'unclip.json').read_text())
  (folder / 'unclip.json').write_text(json.dumps(manifest | {'vocabulary': 'words.json'}))
  (folder / 'words.json').write_text(json.dumps(content))
  return folder
