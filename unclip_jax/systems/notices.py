"""What is said of prompts that a model does not take as they are meant: a line each."""

from collections.abc import Callable, Sequence

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary

_SHOWN = 60  # characters of a prompt
_MOST_WORDS = 5


def of_cut(tokenizer: Tokenizer, text: str) -> str | None:
  """A notice where a prompt is longer than the model reads, else None."""
  cut = tokenizer.truncated(text)
  if not cut:
    return None
  return (
    f'the prompt {_shorten(text)!r} is longer than the {tokenizer.context_length} tokens that the '
    f'model reads; this was cut off: {_shorten(cut)!r}'
  )


def of_unseen(
  vocabulary: Vocabulary, text: str, nearest_concept: Callable[[str], str]
) -> str | None:
  """A notice where a prompt has words that training never saw, else None.

  Args:
    vocabulary: of the model.
    text: the prompt.
    nearest_concept: what the model makes of a word that is spelled like none that it knows.
  """
  unseen = vocabulary.unseen(text)
  if not unseen:
    return None
  named = [_shorten(word) for word in unseen[:_MOST_WORDS]]
  nearest = [
    vocabulary.spelled_like(word) or nearest_concept(word) for word in unseen[:_MOST_WORDS]
  ]
  more = f' and {len(unseen) - len(named)} more' if len(unseen) > len(named) else ''
  return (
    f'{_shorten(text)!r}: the model never saw {_quote(named)}{more}; the nearest it knows '
    f'{"is" if len(nearest) == 1 else "are"} {_quote(nearest)}'
  )


def _shorten(text: str) -> str:
  return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'


def _quote(words: Sequence[str]) -> str:
  return ', '.join(map(repr, words))
