"""Checkpoints of a training run, through Orbax.

A checkpoint counts once it is complete: Orbax writes it under another name and renames it at the
end, so that a killed run continues from the last whole one. It is written while training goes on.
"""

import contextlib
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.digest import digest
from unclip_jax.weights.safetensors import named_leaves

State = TypeVar('State')

_DIGEST = 'digest'  # its name among what Orbax keeps with a checkpoint
# In an error where processes were to meet, which Orbax lets them do, and one has died.
_LEFT = re.compile(r'\b(Gloo|NCCL)\b')


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    # Orbax would else take the placement of the machine that saved, which may not exist here.
    sharding = jnp.zeros(()).sharding
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Checkpoints:
  """The checkpoints in a folder; a context manager that waits for the last write.

  One that was damaged since it was written, down to a single bit, is passed over for the one
  before it: each has a digest of its arrays with it.

  Args:
    folder: made if missing; `gs://` and the like work.
    keep: how many of the latest stay.
    say: takes a line where a damaged one is passed over; by default it goes to standard error.

  Raises:
    UnclipError: the folder cannot be made or read.
  """

  def __init__(
    self,
    folder: os.PathLike[str] | str,
    keep: int = 2,
    say: Callable[[str], None] | None = None,
  ) -> None:
    if keep < 1:
      raise ValueError(f'keep must be at least 1, not {keep}')
    self.folder = _absolute(folder)
    self._say = _to_stderr if say is None else say
    try:
      self._manager = ocp.training.Checkpointer(
        self.folder,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
      )
    except OSError as error:
      raise UnclipError(
        f'cannot use {self.folder} for checkpoints ({error.strerror or error}): choose a folder '
        'that can be written'
      ) from error
    self._written: tuple[int, Any] | None = None  # a step, and what says when its write is done
    logging.getLogger('absl').addFilter(_is_no_page)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      self.close()
    except UnclipError:
      if kind is None:  # else another error is on its way already
        raise

  def close(self) -> None:
    """Waits for what is being written.

    Raises:
      UnclipError: it could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()
      logging.getLogger('absl').removeFilter(_is_no_page)

  def wait(self) -> None:
    """Returns once what `save_async` began to write is complete on disk.

    Raises:
      UnclipError: it could not be written, a full disk for instance. Earlier checkpoints stay.
    """
    if self._written is None:
      return
    (step, response), self._written = self._written, None
    try:
      with _quiet():
        response.result()
    except (OSError, ValueError) as error:
      if _LEFT.search(str(error)):
        raise
      with contextlib.suppress(OSError, ValueError), _quiet():
        self._manager.wait()  # which else would raise the same once more as it is closed
      raise self._not_written(step, error) from error

  def check(self) -> None:
    """Raises what `wait` would, without waiting, if the last write has failed by now."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def latest_step(self) -> int | None:
    """Returns the step of the last complete checkpoint, None where there is none."""
    self.wait()
    latest = self._manager.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: Any) -> None:
    """Writes a state (a pytree of arrays); returns once it is complete on disk.

    A step that is there already is left as it is: a run that continues writes the same again.

    Raises:
      UnclipError: this one, or the last of `save_async`, could not be written, a full disk for
        instance. Earlier checkpoints stay.
    """
    self.save_async(step, state)
    self.wait()

  def save_async(self, step: int, state: Any) -> None:
    """As `save`, but returns once the state is copied from its devices: it may be donated then.

    The rest is written while other work goes on. One write at a time: it waits for the last.

    Raises:
      UnclipError: the last one could not be written. That this one cannot is raised by the next
        call of any method.
    """
    self.wait()
    if any(checkpoint.step == step for checkpoint in self._manager.checkpoints):
      return
    custom = {_DIGEST: digest(jax.block_until_ready(state))}
    try:
      response = self._manager.save_async(step, state, force=True, custom_metadata=custom)
    except (OSError, ValueError) as error:
      if _LEFT.search(str(error)):
        raise
      raise self._not_written(step, error) from error
    self._written = (step, response)

  def restore(self, like: State, step: int | None = None) -> State:
    """Reads a state back, each array straight to its place.

    Args:
      like: a pytree of arrays, or of `jax.ShapeDtypeStruct`s, of the state's structure. Leaves
        with a sharding are placed by it, others on the default device.
      step: which; by default the latest that is whole. Later ones that are damaged are moved aside
        then, to the name damaged_STEP, so that their steps can be written again.

    Raises:
      UnclipError: there is no such checkpoint, none is whole, or it is of another architecture; the
        message names the first array that differs.
    """
    self.wait()
    there = sorted((checkpoint.step for checkpoint in self._manager.checkpoints), reverse=True)
    steps = there if step is None else [each for each in there if each == step]
    if not steps:
      which = 'no checkpoint' if step is None else f'no checkpoint of step {step}'
      raise UnclipError(f'there is {which} in {self.folder}: check the folder, or start a new run')
    abstract = jax.tree.map(_with_sharding, like)
    errors: list[UnclipError] = []
    for at in steps:
      try:
        with _quiet():
          state = self._read(at, abstract)
      except UnclipError as error:
        errors.append(error)
        continue
      self._set_aside(steps[: len(errors)], at)
      return state
    raise errors[0]

  def _read(self, step: int, abstract: State) -> State:
    path = self.folder / str(step)
    damaged = UnclipError(
      f'the checkpoint {path} is damaged: bring back a copy of it, or start a new run folder'
    )
    found = _or_none(lambda: self._manager.metadata(step))
    if found is None or not found.metadata:
      raise damaged
    _check_same(named_leaves(abstract), named_leaves(found.metadata), path)
    state = _or_none(lambda: self._manager.load(step, abstract))
    if state is None:
      raise damaged
    wanted, got = (found.custom_metadata or {}).get(_DIGEST), digest(state)
    if wanted and got and wanted != got:
      raise damaged
    return state

  def _set_aside(self, damaged: list[int], used: int) -> None:
    for step in damaged:
      aside = self.folder / f'damaged_{step}'
      self._say(
        f'the checkpoint {self.folder / str(step)} is damaged, and called {aside.name} from now '
        f'on: step {used} is the last that is whole'
      )
      if jax.process_index() == 0:
        aside.rmtree(missing_ok=True)
        (self.folder / str(step)).rename(aside)
    if damaged:
      self._manager.reload()

  def _not_written(self, step: int, error: Exception) -> UnclipError:
    """Removes what there is of it."""
    if jax.process_index() == 0:
      for part in self.folder.glob(f'{step}.orbax-checkpoint-tmp*'):
        part.rmtree(missing_ok=True)
    self._manager.reload()
    return UnclipError(
      f'cannot write the checkpoint of step {step} to {self.folder} '
      f'({_first_line(error)}): free some space or choose another folder'
    )


def save_tree(folder: os.PathLike[str] | str, params: Params, dtype: Any = None) -> None:
  """Writes parameters as one Orbax checkpoint, in place of one that may be there.

  Args:
    folder: of the checkpoint.
    params: nested dicts of arrays.
    dtype: what floating arrays of two or more axes are cast to, biases kept; None keeps theirs.

  Raises:
    UnclipError: an array holds a NaN or an infinity, or it could not be written, a full disk for
      instance.
  """

  def cast(name: str, leaf: Any) -> Any:
    is_matrix = leaf.ndim > 1 and not name.endswith('bias')
    is_cast = dtype is not None and is_matrix and jnp.issubdtype(leaf.dtype, jnp.floating)
    leaf = jnp.asarray(leaf, dtype if is_cast else leaf.dtype)
    if not jnp.isfinite(leaf).all():
      raise UnclipError(f'{name} does not fit into {leaf.dtype}: take bfloat16 or float32')
    return leaf

  folder = _absolute(folder)
  leaves = [cast(name, leaf) for name, leaf in named_leaves(params).items()]
  try:
    ocp.save(folder, jax.tree.unflatten(jax.tree.structure(params), leaves), overwrite=True)
  except (OSError, ValueError) as error:
    raise UnclipError(
      f'cannot write {folder} ({_first_line(error)}): free some space or choose another folder'
    ) from error


def load_tree(folder: os.PathLike[str] | str, expected: Params) -> Params:
  """Reads what `save_tree` wrote, each array straight to its device.

  Args:
    folder: of the checkpoint.
    expected: nested dicts of `jax.ShapeDtypeStruct`s: names, shapes and types wanted.

  Raises:
    UnclipError: it is missing, damaged, or of another architecture; names the first array that
      differs.
  """
  folder = _absolute(folder)
  abstract = jax.tree.map(_with_sharding, expected)
  with _quiet():
    found = _or_none(lambda: ocp.metadata(folder).metadata)
    if not found:
      raise UnclipError(f'{folder} is missing or damaged: copy or convert it again')
    wanted, there = named_leaves(abstract), named_leaves(found)
    as_there = {
      name: jax.ShapeDtypeStruct(leaf.shape, there[name].dtype if name in there else leaf.dtype)
      for name, leaf in wanted.items()
    }
    _check_same(as_there, there, folder)
    params = _or_none(lambda: ocp.load(folder, abstract))
    if params is None:
      raise UnclipError(f'{folder} is damaged: copy or convert it again')
  for name, leaf in named_leaves(params).items():
    if not jnp.isfinite(leaf).all():
      raise UnclipError(f'{folder}: {name} holds a NaN or an infinity: convert it again')
  return params


def _absolute(folder: os.PathLike[str] | str) -> epath.Path:
  """Orbax refuses relative paths; remote ones are absolute already."""
  folder = epath.Path(folder)
  return folder if '://' in str(folder) else folder.resolve()


def _or_none(read: Callable[[], State]) -> State | None:
  """Orbax and TensorStore let errors of many types through: each means a damaged checkpoint."""
  try:
    return read()
  except Exception:
    return None


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def _is_no_page(record: logging.LogRecord) -> bool:
  """Whether it is none of the pages that Orbax's threads print as a write fails."""
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back the pages that Orbax prints on a damaged checkpoint: our error says it in a line."""
  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
  levels = [logger.level for logger in loggers]
  hook = sys.unraisablehook
  try:
    sys.unraisablehook = lambda _: None
    for logger in loggers:
      logger.setLevel(logging.CRITICAL)
    yield
  except UnclipError:
    gc.collect()  # The tasks that Orbax abandoned complain when they are collected.
    raise
  finally:
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)


def _check_same(expected: dict[str, Any], found: dict[str, Any], path: epath.Path) -> None:
  """Compares names, shapes and types, which Orbax would partly cast or report by handler names."""
  remedy = 'it belongs to another configuration, use that one or start a new run folder'
  for name, leaf in expected.items():
    if name not in found:
      raise UnclipError(f'the checkpoint {path} has no {name}: {remedy}')
    if tuple(found[name].shape) != tuple(leaf.shape) or found[name].dtype != leaf.dtype:
      raise UnclipError(
        f'the checkpoint {path} has {name} as {found[name].dtype}{list(found[name].shape)}, '
        f'wanted is {leaf.dtype}{list(leaf.shape)}: {remedy}'
      )
  for name in found:
    if name not in expected:
      raise UnclipError(f'the checkpoint {path} has a {name} that is not wanted: {remedy}')


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
