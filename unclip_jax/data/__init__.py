"""What enters training: captions as tokens, words, stored data sets, degraded conditions.

Modules are imported when they are first used: what reads data sets takes seconds.
"""

import importlib
from types import ModuleType

__all__ = ['degradations', 'sources', 'tokenizer', 'vocabulary']


def __getattr__(name: str) -> ModuleType:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{name}')
