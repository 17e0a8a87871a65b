"""What a training run does about a bad loss: it stops with a snapshot, or leaves the step out."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.emoji.options import TrainConfig
from unclip_jax import sharding
from unclip_jax.systems.bad_step import write_bad_step
from unclip_jax.train.guard import BAD, LIMIT, why_bad
from unclip_jax.train.state import Draw, Metrics, TrainState, TrainStep, draw_batch
from unclip_jax.types import Array, Params, UnclipError

MOST_SKIPPED = 16  # in a row: that is no spike, but a loss that has come to another level
SKIPPED_NAME = 'skipped.jsonl'

Watch = Callable[[TrainState, Metrics, Any, Array], dict[str, np.ndarray]]


def make_watch(
  train: TrainConfig,
  folder: Path,
  train_step: TrainStep,
  make_batch: Callable[[Any, Array, Array], Any],
  frozen: Params | None = None,
  captions: Sequence[str] | None = None,
) -> Watch:
  """A function that looks at the metrics of `common.make_updates`: call it before they are logged.

  With `--on-bad-loss stop` it writes `bad_step_N` into the folder, which `experiments.emoji.replay`
  reads, and raises. With `skip` it writes a line of `skipped.jsonl` for each bad step, and stops
  like that after `MOST_SKIPPED` in a row.

  Args:
    train: the options.
    folder: of the stage that is trained.
    train_step: that of `make_updates`, like the next two.
    make_batch: see there.
    frozen: see there.
    captions: of the examples, where a pool has no `ids`.

  Returns:
    (state after, metrics, data, key of the run) -> what is to be logged: the metrics of the good
    steps and, with `skip`, the number of `skipped` ones. It raises UnclipError where the run stops.
  """
  streams, stops, in_a_row = train.streams, train.on_bad_loss == 'stop', 0

  @jax.jit
  def draw(pool: Any, key: Array, step: Array) -> Draw:
    make = (lambda batch, *_: batch) if streams else make_batch
    return draw_batch(pool, key, step, train.batch_size, make)

  def about(step: int, metrics: dict[str, float], data: Any, key: Array) -> dict[str, Any]:
    if streams:
      examples = data.examples(step)
    else:
      indices = sharding.fetch(draw(data, key, jnp.int32(step)).indices)
      texts = captions
      if texts is None:
        texts = {i: train.tokenizer.decode(np.asarray(data['ids'][i])) for i in indices}
      examples = [{'id': int(i), 'caption': texts[i]} for i in indices]
    return {
      'step': step,
      'what': why_bad(metrics),
      'metrics': {name: repr(value) for name, value in metrics.items()},  # JSON has no NaN
      'examples': examples,
    }

  def watch(state: TrainState, metrics: Metrics, data: Any, key: Array) -> dict[str, np.ndarray]:
    nonlocal in_a_row
    rows = {name: np.asarray(values) for name, values in metrics.items()}
    bad, after = rows.pop(BAD) > 0, int(state.step)
    in_a_row = in_a_row + len(bad) if bad.all() else int(bad[::-1].argmin())
    if bad.any() and (stops or in_a_row >= MOST_SKIPPED):
      # The state is that before the first bad step or, but for its number, that before the last.
      step, row = (after, int(bad.argmax())) if stops else (after - 1, len(bad) - 1)
      one = about(step, {name: float(values[row]) for name, values in rows.items()}, data, key)
      drawn = draw(data.batch(step) if streams else data, key, jnp.int32(step))
      batch = drawn.batch if frozen is None else (drawn.batch, frozen)
      before = state if stops else state._replace(step=state.step - 1)
      given = (train_step, before, batch, drawn.key)
      raise UnclipError(_stop(folder / f'bad_step_{step}', given, one, stops))
    found = [
      about(
        after - len(bad) + int(row),
        {name: float(values[row]) for name, values in rows.items()},
        data,
        key,
      )
      for row in np.flatnonzero(bad)
    ]
    if found and jax.process_index() == 0:
      _note(folder / SKIPPED_NAME, found)
    rows.pop(LIMIT, None)
    shown = {} if bad.all() else {name: values[~bad] for name, values in rows.items()}
    return shown if stops else {**shown, 'skipped': bad.sum()}

  return watch


def _stop(folder: Path, given: tuple, about: dict[str, Any], stops: bool) -> str:
  """Writes the snapshot; returns the line that the run ends with."""
  text, remedy = f'{about["what"]} at step {about["step"]}', 'a lower learning rate'
  if stops:
    remedy += ', or --on-bad-loss skip to leave such steps out'
  else:
    text += f', the last of {MOST_SKIPPED} or more bad ones in a row'
  try:
    write_bad_step(folder, *given, about)
  except UnclipError as error:
    return f'{text}: take {remedy} (it is not kept: {error})'
  return f'{text}: take {remedy}; python -m experiments.emoji.replay {folder} shows it again'


def _note(path: Path, found: list[dict[str, Any]]) -> None:
  """Adds lines, in place of those of the same steps that a run had made before it was killed."""
  lines = {}
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(ValueError, KeyError):
        lines[json.loads(line)['step']] = line
  lines |= {one['step']: json.dumps(one, ensure_ascii=False) for one in found}
  part = path.with_name(path.name + '.part')
  part.write_text(''.join(line + '\n' for _, line in sorted(lines.items())))
  part.replace(path)
