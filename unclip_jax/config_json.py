"""Configs to and from JSON and the command line."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from unclip_jax.types import UnclipError


def to_json(config: Any) -> dict[str, Any]:
  """A config as plain dicts and lists, ready for json.dumps."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type, values: Any, where: str = 'config') -> Any:
  """The inverse of `to_json`.

  Raises:
    UnclipError: on an unknown field, a missing one or a value of another type; names it.
  """
  if not isinstance(values, dict):
    raise UnclipError(f'{where}: expected an object, got {type(values).__name__}')
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if unknown := sorted(set(values) - set(fields)):
    raise UnclipError(f'{where}: unknown field {unknown[0]!r} (it has: {", ".join(fields)})')
  required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
  if missing := sorted(required - set(values)):
    raise UnclipError(f'{where}: field {missing[0]!r} is missing')
  hints = typing.get_type_hints(cls)
  return cls(**{k: _convert(hints[k], v, f'{where}.{k}') for k, v in values.items()})


def override(config: Any, assignments: Sequence[str]) -> Any:
  """Applies `path.to.field=value` assignments, values as JSON (or a bare word).

  Example: `override(config, ['decoder.unet.channels=64', 'decoder.unet.multipliers=[1,2]'])`. As
  Transformers have a width, `decoder.width` is short for `decoder.unet.channels`.

  Raises:
    UnclipError: for a field that does not exist or a value of another type; names it.
  """
  values = to_json(config)
  for assignment in assignments:
    path, equals, text = assignment.partition('=')
    if not equals:
      raise UnclipError(f'--set {assignment!r}: write it as path.to.field=value')
    try:
      value = json.loads(text)
    except json.JSONDecodeError:
      value = text
    *parents, leaf = path.strip().split('.')
    node = values
    for i, name in enumerate([*parents, leaf]):
      key: Any = int(name) if isinstance(node, list) and name.isdigit() else name
      if key == 'width' and isinstance(node, dict) and 'unet' in node:
        node, key = node['unet'], 'channels'
      known = range(len(node)) if isinstance(node, list) else node if isinstance(node, dict) else ()
      if key not in known:
        place = '.'.join([*parents, leaf][:i]) or 'the config'
        raise UnclipError(f'--set {path}: {place} has no field {name!r}; it has: {_names(node)}')
      if i < len(parents):
        node = node[key]
      else:
        node[key] = value
  return from_json(type(config), values, 'config')


def _names(node: Any) -> str:
  if isinstance(node, dict):
    return ', '.join(node)
  return f'0 to {len(node) - 1}' if isinstance(node, list) and node else 'nothing'


def _convert(hint: Any, value: Any, where: str) -> Any:
  """`value` from JSON as the type of a field, or an UnclipError that names the field."""
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
      return None
    options = [o for o in options if o is not type(None)]
    if len(options) > 1 and isinstance(value, dict):
      # Towers differ in their fields: the best match is the one meant, and reports its errors.
      options.sort(key=lambda o: len({f.name for f in dataclasses.fields(o)} ^ set(value)))
    return _convert(options[0], value, where)
  if dataclasses.is_dataclass(hint):
    return from_json(hint, value, where)
  if typing.get_origin(hint) is tuple:
    if not isinstance(value, list):
      raise UnclipError(f'{where}: expected a list, got {value!r}')
    args = typing.get_args(hint)
    if args[-1] is not Ellipsis and len(args) != len(value):
      raise UnclipError(f'{where}: expected {len(args)} values, got {len(value)}')
    return tuple(_convert(args[0], v, f'{where}.{i}') for i, v in enumerate(value))
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise UnclipError(f'{where}: expected {hint.__name__}, got {value!r}')
  return value
