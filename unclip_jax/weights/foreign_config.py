"""The JSON configs of other implementations, read field by field: none is skipped unseen.

A field that we do not know may change what a network computes, and one that we know may ask for
what ours does not do: both are errors that name it, and never a wrong picture.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError

T = TypeVar('T')
_EMPTY = (None, False, '', [], {})
# Of transformers: what generation and classification know of, of no meaning to an encoder.
# transformers 4 wrote them all into each part of a config.
PRETRAINED_FIELDS = {
  'add_cross_attention', 'bad_words_ids', 'begin_suppress_tokens', 'chunk_size_feed_forward',
  'cross_attention_hidden_size', 'decoder_start_token_id', 'diversity_penalty', 'do_sample',
  'early_stopping', 'encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty',
  'finetuning_task', 'forced_bos_token_id', 'forced_eos_token_id', 'id2label', 'is_decoder',
  'is_encoder_decoder', 'label2id', 'length_penalty', 'max_length', 'min_length',
  'no_repeat_ngram_size', 'num_beam_groups', 'num_beams', 'num_return_sequences',
  'output_attentions', 'output_hidden_states', 'output_scores', 'prefix', 'problem_type',
  'pruned_heads', 'remove_invalid_values', 'repetition_penalty', 'return_dict',
  'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
  'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tie_word_embeddings',
  'tokenizer_class', 'top_k', 'top_p', 'torchscript', 'typical_p', 'use_bfloat16',
}  # fmt: skip


def read_json(path: epath.Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UnclipError: it is missing, cannot be read, or is no JSON object.
  """
  try:
    text = path.read_text(encoding='utf-8')
    git_lfs.refuse_pointer(path, text)
    values = json.loads(text)
  except UnclipError:
    raise
  except FileNotFoundError as error:
    raise UnclipError(f'{path} is missing: copy or download the model again') from error
  except OSError as error:
    raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
  except (RecursionError, ValueError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): download it again') from error
  if not isinstance(values, dict):
    raise UnclipError(f'{path} is not a JSON object: download it again')
  return values


class Fields:
  """The fields of a config, each to be taken, expected or ignored."""

  def __init__(self, values: Mapping[str, Any], where: str):
    """Wraps the values of a config; `where` is what it is from, for messages."""
    self._left = {name: value for name, value in values.items() if not name.startswith('_')}
    self.where = where

  def take(self, name: str, default: T | None = None) -> T:
    """A field's value, of the type of the default; without one, a whole number that must be there.

    A float's field may hold a whole number.

    Raises:
      UnclipError: it is missing, or of another type.
    """
    value = self._left.pop(name, None)
    value = default if value is None else value  # null is how transformers writes a default
    if value is None:
      raise UnclipError(f'{self.where}: the field {name!r} is missing: download it again')
    kind = int if default is None else type(default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
      raise UnclipError(f'{self.where}: {name} is {value!r}, not of type {kind.__name__}')
    return kind(value)

  def take_or_none(self, name: str, default: T) -> T | None:
    """As `take`, for a field where null is not how the default is written.

    Raises:
      UnclipError: it is of another type.
    """
    if name in self._left and self._left[name] is None:
      return self._left.pop(name)
    return self.take(name, default)

  def take_numbers(self, name: str, default: Sequence[float] | None = None) -> tuple[Any, ...]:
    """A field that is a list of numbers.

    Raises:
      UnclipError: it is missing, empty, or something else.
    """
    values = self._left.pop(name, default)
    is_list = isinstance(values, list | tuple) and len(values) > 0
    if not is_list or any(type(value) not in (int, float) for value in values):
      raise UnclipError(f'{self.where}: {name} is {values!r}, not a list of numbers')
    return tuple(values)

  def choose(self, name: str, known: Mapping[Any, T], default: Any = None) -> T:
    """What a field's word means.

    Raises:
      UnclipError: it is none of those known.
    """
    word = self._left.pop(name, default)
    if not isinstance(word, str | int | type(None)) or word not in known:
      words = ', '.join(map(repr, known))
      raise UnclipError(f'{self.where}: {name} is {word!r}: only {words} can be opened')
    return known[word]

  def expect(self, **wanted: Any) -> None:
    """Fields that may be absent or null, or of these values alone.

    Raises:
      UnclipError: one is of another value.
    """
    for name, value in wanted.items():
      found = self._left.pop(name, None)
      if found is not None and found != value:
        raise UnclipError(f'{self.where}: {name} is {found!r}: only {value!r} can be opened')

  def ignore(self, names: Iterable[str]) -> None:
    """Fields without an effect on what is computed."""
    for name in names:
      self._left.pop(name, None)

  def done(self) -> None:
    """Checks that no field is left that says something.

    Raises:
      UnclipError: one is.
    """
    for name, value in self._left.items():
      if value not in _EMPTY:
        raise UnclipError(
          f'{self.where}: the field {name!r} ({value!r}) has no meaning here: the model is of '
          'another kind, or of a newer version'
        )
