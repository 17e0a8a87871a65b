"""Files: weights (`safetensors`), model folders (`folder`), training checkpoints (`checkpoint`).

Those of other programs: their tensors (`tensor_files`), and the tables that carry them into our
parameters and back (`rules`; `karlo` and others, a file a family).

Modules are imported when they are first used: Orbax, which checkpoints need, takes seconds.
"""

import importlib
from types import ModuleType

__all__ = ['checkpoint', 'folder', 'safetensors']


def __getattr__(name: str) -> ModuleType:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{name}')
