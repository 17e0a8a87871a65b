"""Low-rank adapters (`train.lora`) in safetensors files."""

import json
import os

import jax
import jax.numpy as jnp
from etils import epath
from safetensors import SafetensorError, safe_open

from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.safetensors import load_params, save_params


def save_lora(path: os.PathLike[str] | str, adapters: Params, scale: float, stage: str) -> None:
  """Writes adapters to a safetensors file, with what they are for in its header.

  Args:
    path: the file.
    adapters: of `init_lora`.
    scale: alpha / rank.
    stage: 'prior' or 'decoder'.

  Raises:
    UnclipError: one holds a NaN, or the file cannot be written.
  """
  header = {'unclip_jax_lora': json.dumps({'stage': stage, 'scale': scale})}
  save_params(path, adapters, metadata=header)


def load_lora(path: os.PathLike[str] | str) -> tuple[str, float, Params]:
  """Reads what `save_lora` wrote: the stage, the scale, the adapters.

  Raises:
    UnclipError: the file is missing or damaged, or holds no adapters.
  """
  path = epath.Path(path)
  if not path.exists():
    raise UnclipError(f'there are no adapters {path}: check the path')
  try:
    with safe_open(path, framework='numpy') as file:
      header = json.loads((file.metadata() or {})['unclip_jax_lora'])
      shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
      stage, scale = str(header['stage']), float(header['scale'])
  except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
    raise UnclipError(f'{path} holds no adapters of unclip_jax ({error})') from error
  expected: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for name, shape in shapes.items():
    layer, _, part = name.rpartition('.')
    expected.setdefault(layer, {})[part] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
  for layer, parts in expected.items():
    if set(parts) != {'a', 'b'}:
      raise UnclipError(f'{path}: {layer} has no a and b: copy it again')
  return stage, scale, load_params(path, expected)
