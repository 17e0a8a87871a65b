"""A model folder as diffusers writes it: `model_index.json`, and a folder for each component."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_config import Fields, read_json
from unclip_jax.weights.rules import Tensors
from unclip_jax.weights.tensor_files import open_tensors

INDEX_NAME = 'model_index.json'
CONFIG_NAME = 'config.json'
SCHEDULER_CONFIG_NAME = 'scheduler_config.json'
# The first that is there is read: safetensors before pickles, float32 before float16.
_STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model')
_ENDINGS = (
  '.safetensors',
  '.safetensors.index.json',
  '.fp16.safetensors',
  '.fp16.safetensors.index.json',
  '.safetensors.index.fp16.json',
  '.bin',
  '.bin.index.json',
  '.fp16.bin',
  '.bin.index.fp16.json',
  '.bf16.safetensors',
)


class Components(dict[str, epath.Path]):
  """The folders of a pipeline's components, by their names."""

  where = 'the model'

  def __missing__(self, name: str) -> epath.Path:
    raise UnclipError(f'{self.where} has no component {name!r}: copy or download it again')


def read_components(folder: epath.Path) -> tuple[str, Components]:
  """The pipeline's class of `model_index.json`, and the folder of each component that it names.

  Raises:
    UnclipError: the file is missing, or is none of diffusers'.
  """
  path = folder / INDEX_NAME
  values = read_json(path)
  name = values.get('_class_name')
  if not isinstance(name, str):
    raise UnclipError(f'{path} has no _class_name: it is no pipeline of diffusers')
  components = Components()
  components.where = str(path)
  for component, entry in values.items():
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
      if '/' in component or '\\' in component or component.startswith('.'):
        raise UnclipError(f'{path} names a component {component!r}: only folders inside are read')
      components[component] = folder / component
  return name, components


def read_component_config(
  folder: epath.Path, class_name: str | Sequence[str], name: str = CONFIG_NAME
) -> Fields:
  """The config of a component, which has to be of one of these classes.

  Raises:
    UnclipError: it is missing, or of another class.
  """
  path = folder / name
  values = read_json(path)
  names = (class_name,) if isinstance(class_name, str) else tuple(class_name)
  found = values.get('_class_name', names[0])
  if found not in names:
    raise UnclipError(f'{path}: _class_name is {found!r}: only {" or ".join(names)} can be opened')
  return Fields(values, str(path))


class Joined:
  """The tensors of several components, each name after that of its component and a slash."""

  def __init__(self, parts: Mapping[str, Tensors]):
    self._parts = parts

  def names(self) -> list[str]:
    """Of all tensors."""
    return [f'{part}/{name}' for part, file in self._parts.items() for name in file.names()]

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor, without reading it."""
    part, _, rest = name.partition('/')
    return self._parts[part].shape(rest)

  def read(self, name: str) -> np.ndarray:
    """A tensor."""
    part, _, rest = name.partition('/')
    return self._parts[part].read(rest)


@contextlib.contextmanager
def open_components(folders: Mapping[str, epath.Path]) -> Iterator[Joined]:
  """The tensors of components, each in a folder of its own.

  Raises:
    UnclipError: one has no weights, or its files are damaged.
  """
  with contextlib.ExitStack() as stack:
    parts: dict[str, Any] = {
      name: stack.enter_context(open_tensors(find_weights(folder)))
      for name, folder in folders.items()
    }
    yield Joined(parts)


def find_weights(folder: epath.Path) -> epath.Path:
  """The file, or the index of several, that holds the tensors of a component.

  Raises:
    UnclipError: there is none.
  """
  for ending in _ENDINGS:
    for stem in _STEMS:
      if (path := folder / f'{stem}{ending}').exists():
        return path
  raise UnclipError(
    f'{folder} has no weights (such as {_STEMS[0]}.safetensors): copy or download the model again'
  )
