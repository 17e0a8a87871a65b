"""A training step that went wrong, in a folder: all that it takes to see it go wrong again.

  about.json      what is known of it
  inputs/         an Orbax checkpoint: the state before it, its batch and its key
  program.bin     the step as jax.export serialises it: StableHLO

Neither the script that trained nor its data are needed.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export

from unclip_jax.processes import any_process
from unclip_jax.train.state import Batch, Metrics, TrainState, TrainStep
from unclip_jax.types import Array, UnclipError
from unclip_jax.weights.checkpoint import Checkpoints
from unclip_jax.weights.safetensors import named_leaves, reach, write_atomically

ABOUT_NAME, INPUTS_NAME, PROGRAM_NAME = 'about.json', 'inputs', 'program.bin'


class BadStep(NamedTuple):
  """What `write_bad_step` wrote.

  Attributes:
    about: as it was given.
    inputs: the arrays of state, batch and key by their names, such as `state.params.w`.
    program: the step as a function of `inputs`; gives the metrics.
  """

  about: dict[str, Any]
  inputs: dict[str, Array]
  program: export.Exported

  def run(self) -> dict[str, float]:
    """Makes the step again, on one device, and returns its metrics."""
    return {name: float(value) for name, value in self.program.call(self.inputs).items()}


def write_bad_step(
  folder: os.PathLike[str] | str,
  train_step: TrainStep,
  state: TrainState,
  batch: Batch,
  key: Array,
  about: Mapping[str, Any],
) -> None:
  """Writes a step into a folder, in place of one that may be there; several processes all call it.

  Args:
    folder: made if missing.
    train_step: of `make_train_step`, without a guard.
    state: the one before the step.
    batch: what the step was given.
    key: the one that the step folds with `state.step`.
    about: what JSON can hold, shown by whoever reads the folder.

  Raises:
    UnclipError: it cannot be written.
  """
  folder = reach(folder)
  given = {'state': state, 'batch': batch, 'key': jax.random.key_data(key)}
  structure, impl = jax.tree.structure(given), jax.random.key_impl(key)
  inputs = named_leaves(given)

  def program(inputs: dict[str, Array]) -> Metrics:
    given = jax.tree.unflatten(structure, [inputs[name] for name in names])
    key = jax.random.wrap_key_data(given['key'], impl=impl)
    return train_step(given['state'], given['batch'], key)[1]

  names = list(inputs)
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs.items()}
  lowered = export.export(jax.jit(program))(shapes)
  text = json.dumps(dict(about), indent=2, ensure_ascii=False) + '\n'
  reason = None
  if jax.process_index() == 0:
    try:
      folder.rmtree(missing_ok=True)
    except OSError as error:
      reason = error.strerror or error
  # None begins to write before that is done.
  if any_process(reason is not None):
    raise UnclipError(f'cannot write {folder} ({reason or "says process 0"})')
  with Checkpoints(folder / INPUTS_NAME) as checkpoints:
    checkpoints.save(0, inputs)
  if jax.process_index() > 0:
    return
  write_atomically(folder / PROGRAM_NAME, functools.partial(_write, bytes(lowered.serialize())))
  write_atomically(folder / ABOUT_NAME, functools.partial(_write, text.encode()))


def read_bad_step(folder: os.PathLike[str] | str) -> BadStep:
  """Reads what `write_bad_step` wrote, its arrays onto the default device.

  A program is code: open only what comes from somebody whom you trust.

  Raises:
    UnclipError: the folder holds no bad step, is damaged, or the program is for another platform.
  """
  folder = reach(folder)
  if not (folder / ABOUT_NAME).exists():
    raise UnclipError(f'{folder} holds no bad step: it has no {ABOUT_NAME}; check the path')
  try:
    about = json.loads((folder / ABOUT_NAME).read_text())
    program = export.deserialize(bytearray((folder / PROGRAM_NAME).read_bytes()))
  except Exception as error:  # as many kinds as there are ways to damage a file
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(f'{folder} is damaged ({reason}): bring back a copy of it') from error
  here = export.default_export_platform()
  if here not in program.platforms:
    raise UnclipError(
      f'{folder} is of a run on {program.platforms[0]}, this machine has {here}: look at it there'
    )
  (shapes,), _ = jax.tree.unflatten(
    program.in_tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
  )
  with Checkpoints(folder / INPUTS_NAME) as checkpoints:
    inputs = checkpoints.restore(shapes)
  return BadStep(about, inputs, program)


def _write(content: bytes, part: Path) -> None:
  part.write_bytes(content)
