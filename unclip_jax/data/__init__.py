"""What enters training: captioned pictures from where they lie, captions as tokens, words.

Sources (`sources`, `shards`, `folder_source`) give examples, `pictures` and `degradations` turn
these into arrays, `pipeline` into batches; `embeddings` are those of a CLIP, computed once.

Modules are imported when they are first used: what reads data sets takes seconds.
"""

import importlib
from types import ModuleType

__all__ = [
  'degradations',
  'embeddings',
  'examples',
  'folder_source',
  'pictures',
  'pipeline',
  'shards',
  'sources',
  'tokenizer',
  'vocabulary',
]


def __getattr__(name: str) -> ModuleType:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{name}')
