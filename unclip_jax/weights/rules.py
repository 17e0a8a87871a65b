"""How the tensors of other implementations become our parameters, and the way back.

A family of models is a list of `Rule`s: names of ours, names of theirs, and the `Layout` between
them. Reading and writing follow the same list, so that they cannot come apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights import layouts
from unclip_jax.weights.layouts import Arrays, Layout
from unclip_jax.weights.safetensors import named_leaves

_NAMES_SHOWN = 3


class Rule(NamedTuple):
  """Which arrays are the same.

  Attributes:
    ours: names of parameters, keys joined by dots.
    theirs: names of tensors; several where ours are stacked, none where they have no such thing.
    layout: between the two.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  layout: Layout


def dense(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
  """A linear layer, [out, in] -> [in, out]."""
  kernel = Rule((f'{ours}.kernel',), (f'{theirs}.weight',), layouts.transpose(1, 0))
  return [kernel, Rule((f'{ours}.bias',), (f'{theirs}.bias',), layouts.SAME)] if bias else [kernel]


def conv(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
  """A convolution, [out, in, h, w] -> [h, w, in, out]."""
  kernel = Rule((f'{ours}.kernel',), (f'{theirs}.weight',), layouts.transpose(2, 3, 1, 0))
  return [kernel, Rule((f'{ours}.bias',), (f'{theirs}.bias',), layouts.SAME)] if bias else [kernel]


def group_norm(ours: str, theirs: str) -> list[Rule]:
  """A group norm."""
  return [same(f'{ours}.scale', f'{theirs}.weight'), same(f'{ours}.bias', f'{theirs}.bias')]


def layer_norm(ours: str, theirs: str) -> list[Rule]:
  """A layer norm, which is one module deeper in ours."""
  return group_norm(f'{ours}.norm', theirs)


def same(ours: str, theirs: str) -> Rule:
  """One array, as it is."""
  return Rule((ours,), (theirs,), layouts.SAME)


def heads_in(ours: str, theirs: Sequence[str], head_dim: int, bias: bool = True) -> list[Rule]:
  """Projections to heads side by side."""
  names = ('weight', 'kernel'), ('bias', 'bias')
  return [
    Rule((f'{ours}.{mine}',), tuple(f'{t}.{its}' for t in theirs), layouts.heads_in(head_dim))
    for its, mine in names[: 1 + bias]
  ]


def heads_out(ours: str, theirs: str, head_dim: int, bias: bool = True) -> list[Rule]:
  """The projection of heads."""
  kernel = Rule((f'{ours}.kernel',), (f'{theirs}.weight',), layouts.heads_out(head_dim))
  return [kernel, same(f'{ours}.bias', f'{theirs}.bias')] if bias else [kernel]


class Tensors(Protocol):
  """Where tensors are read from, one at a time."""

  def names(self) -> Iterable[str]:
    """Of all tensors, best in the order in which they are read the fastest."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor, without reading it."""

  def read(self, name: str) -> np.ndarray:
    """A tensor."""


def read_params(
  tensors: Tensors, rules: Iterable[Rule], expected: Params, where: str, ignored: Sequence[str] = ()
) -> Params:
  """Reads parameters from the tensors of another implementation.

  Names and shapes are checked before the first is read. While a tensor goes to its device the next
  one is read: the host holds two at a time.

  Args:
    tensors: to read.
    rules: every tensor has to occur in exactly one.
    expected: nested dicts of `jax.ShapeDtypeStruct`s: names, shapes, types and, where they have
      them, shardings.
    where: what the tensors are from, for messages.
    ignored: ends of names of tensors that hold nothing learned.

  Returns:
    The parameters, in the structure of `expected`.

  Raises:
    UnclipError: a tensor is missing, not known, of another shape, or holds a NaN; names it.
  """
  wanted, rules = named_leaves(expected), list(rules)
  _check_names(tensors, rules, where, tuple(ignored))
  for rule in rules:
    _check_shapes(tensors, rule, wanted, where)
  made: dict[str, Array] = {}
  # In the order of the files, which disks and stores are fast at.
  place = {name: place for place, name in enumerate(tensors.names())}
  rules.sort(key=lambda rule: min((place[name] for name in rule.theirs), default=0))
  for rule, sources in zip(rules, _read_ahead(tensors, rules, where), strict=True):
    for name, source in zip(rule.ours, rule.layout.read(sources), strict=True):
      made[name] = _place(source, wanted[name])
  if missing := sorted(wanted.keys() - made.keys()):
    raise ValueError(f'no rule makes {", ".join(missing)}')
  return jax.tree.unflatten(jax.tree.structure(expected), [made[name] for name in wanted])


def write_tensors(params: Params, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
  """The inverse of `read_params`: tensors of another implementation, on the host."""
  ours = named_leaves(params)
  tensors: dict[str, np.ndarray] = {}
  for rule in rules:
    arrays = tuple(np.asarray(jax.device_get(ours[name])) for name in rule.ours)
    for name, array in zip(rule.theirs, rule.layout.write(arrays), strict=True):
      tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
  return tensors


def _read_ahead(tensors: Tensors, rules: Sequence[Rule], where: str) -> Iterator[Arrays]:
  """The tensors of each rule. Those of the next are read while the last are still in use."""

  def read(rule: Rule) -> Arrays:
    return tuple(_read(tensors, name, where) for name in rule.theirs)

  with ThreadPoolExecutor(max_workers=1) as reader:
    coming = None
    for rule in rules:
      last, coming = coming, reader.submit(read, rule)
      if last is not None:
        yield last.result()
    if coming is not None:
      yield coming.result()


def _read(tensors: Tensors, name: str, where: str) -> np.ndarray:
  """A tensor of finite numbers, else UnclipError."""
  tensor = tensors.read(name)
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise UnclipError(f'{where}: {name} is of type {tensor.dtype}, not a floating-point one')
  if not np.isfinite(tensor).all():
    raise UnclipError(f'{where}: {name} holds a NaN or an infinity: download it again')
  return tensor


def _place(source: np.ndarray, leaf: Any) -> Array:
  """An array on its devices.

  The cast keeps the order of the bytes, and JAX lays them out on their way to the device, by blocks
  that fit its cache. A program for each layout would take longer to compile than to run.
  """
  array = jax.device_put(source.astype(leaf.dtype, order='K', copy=False))
  # Waits: the host's copy is free again before another one is read.
  return jax.device_put(array.block_until_ready(), getattr(leaf, 'sharding', None))


def _check_names(
  tensors: Tensors, rules: Sequence[Rule], where: str, ignored: tuple[str, ...]
) -> None:
  known = {name for rule in rules for name in rule.theirs}
  found = set(tensors.names())
  if missing := sorted(known - found):
    raise UnclipError(
      f'{where}: {_list(missing)} missing: its config is that of another model, or it was cut short'
    )
  if unknown := sorted(name for name in found - known if not name.endswith(ignored or ('\0',))):
    raise UnclipError(f'{where}: {_list(unknown)} not known: its config is that of another model')


def _check_shapes(tensors: Tensors, rule: Rule, wanted: Mapping[str, Any], where: str) -> None:
  theirs = tuple(tuple(tensors.shape(name)) for name in rule.theirs)
  if _shapes_made(rule.layout, theirs) != tuple(tuple(wanted[name].shape) for name in rule.ours):
    given = ' and '.join(
      f'{name} of shape {list(shape)}' for name, shape in zip(rule.theirs, theirs, strict=True)
    )
    ours = ' and '.join(f'{name} of shape {list(wanted[name].shape)}' for name in rule.ours)
    raise UnclipError(
      f'{where}: {given} cannot become our {ours}: its config is that of another model'
    )


@cache
def _shapes_made(
  layout: Layout, theirs: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...] | None:
  """The shapes of ours that a layout makes of theirs, None where it cannot."""
  arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in theirs)
  try:
    return tuple(x.shape for x in jax.eval_shape(layout.read, arrays))
  except (TypeError, ValueError):
    return None


def _list(names: Sequence[str]) -> str:
  more = len(names) - _NAMES_SHOWN
  shown = ', '.join(names[:_NAMES_SHOWN]) + (f' and {more} more' if more > 0 else '')
  return f'{shown} {"is" if len(names) == 1 else "are"}'
