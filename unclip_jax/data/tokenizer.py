"""A small byte-level BPE for captions, kept in one tokenizer.json.

Text is lower-cased and brought to NFC, its white space collapsed. Any Unicode text has a
representation, as the alphabet is the 256 bytes (section 2.2 of the GPT-2 report).
"""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from unclip_jax.types import UnclipError

PAD = '<pad>'
END = '<end>'
MAX_VOCAB_SIZE = 4096


class Tokens(NamedTuple):
  """A batch of tokenised captions.

  Attributes:
    ids: int32 [b, context_length], the end-of-text token after the last, then padding.
    mask: bool [b, context_length], true up to and including the end-of-text token.
  """

  ids: np.ndarray
  mask: np.ndarray


class Tokenizer:
  """Turns captions into token ids.

  Attributes:
    vocab_size: number of entries, special tokens included.
    context_length: number of tokens of each caption, end-of-text and padding included.
    pad_id: id of the padding.
    end_id: id of the end-of-text token.
  """

  def __init__(self, bpe: tokenizers.Tokenizer):
    """Wraps a tokenizer whose file names a context length and both special tokens."""
    # Words such as '<end>' in a prompt are text, not control.
    bpe.encode_special_tokens = True
    self._bpe = bpe
    self.vocab_size: int = bpe.get_vocab_size()
    self.context_length: int = bpe.truncation['max_length']
    self.pad_id: int = bpe.token_to_id(PAD)
    self.end_id: int = bpe.token_to_id(END)

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int, context_length: int) -> 'Tokenizer':
    """Learns a vocabulary from texts.

    Args:
      texts: a corpus.
      vocab_size: number of entries, between 258 (bytes and special tokens) and 4,096.
      context_length: number of tokens a caption is cut or padded to, at least 2.

    Raises:
      UnclipError: a number is out of range.
    """
    if not 258 <= vocab_size <= MAX_VOCAB_SIZE:
      raise UnclipError(f'vocab_size {vocab_size}: choose 258 to {MAX_VOCAB_SIZE}')
    if context_length < 2:
      raise UnclipError(f'context_length {context_length}: choose 2 or more')
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence(
      [
        normalizers.Lowercase(),
        normalizers.NFC(),
        normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
        normalizers.Strip(),
      ]
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[PAD, END],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    pad_id, end_id = bpe.token_to_id(PAD), bpe.token_to_id(END)
    bpe.post_processor = processors.TemplateProcessing(
      single=f'$A {END}', special_tokens=[(END, end_id)]
    )
    bpe.enable_truncation(context_length)
    bpe.enable_padding(length=context_length, pad_id=pad_id, pad_token=PAD)
    return cls(bpe)

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Tokenizer':
    """Reads a tokenizer.json that `save` wrote.

    Raises:
      UnclipError: the file is missing or is not such a tokenizer.
    """
    path = epath.Path(path)
    if not path.exists():
      raise UnclipError(f'tokenizer {path} is missing: fetch the model folder again')
    try:
      # The library raises plain Exception for any fault of the file.
      bpe = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
    except Exception as error:
      raise UnclipError(f'tokenizer {path} cannot be read ({error}): fetch it again') from error
    missing = bpe.truncation is None or None in (bpe.token_to_id(PAD), bpe.token_to_id(END))
    if missing:
      raise UnclipError(f'tokenizer {path} lacks a context length, {PAD} or {END}: not one of ours')
    return cls(bpe)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the tokenizer as one JSON file; the file appears only once it is complete."""
    path = epath.Path(path)
    partial = path.with_name(path.name + '.partial')
    try:
      partial.write_text(self._bpe.to_str(pretty=False) + '\n', encoding='utf-8')
      partial.replace(path)
    except OSError as error:
      partial.unlink(missing_ok=True)
      raise UnclipError(f'tokenizer {path} cannot be written: {error.strerror}') from error

  def encode(self, texts: Sequence[str]) -> Tokens:
    """Returns the tokens of captions; an empty caption is the end-of-text token alone.

    A caption that is too long keeps its beginning and ends in the end-of-text token; `truncated`
    tells what was cut.

    Args:
      texts: b captions.

    Raises:
      UnclipError: a caption is not a string or not valid Unicode.
    """
    for text in texts:
      _check_text(text)
    encodings = self._bpe.encode_batch(list(texts))
    shape = (len(encodings), self.context_length)
    ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape)
    mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(shape)
    return Tokens(ids, mask)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the normalised text of one caption's ids, without padding and end-of-text."""
    return self._bpe.decode([int(token) for token in ids]).strip()

  def normalise(self, text: str) -> str:
    """Returns the text as the model sees it: lower case, NFC, single spaces."""
    return self._bpe.normalizer.normalize_str(_check_text(text))

  def truncated(self, text: str) -> str | None:
    """Returns the end of `text` that does not fit into the context, None where all of it fits."""
    overflow = self._bpe.encode(_check_text(text)).overflowing
    if not overflow:
      return None
    start = overflow[0].offsets[0][0]
    return text[start:].strip()


def _check_text(text: str) -> str:
  if not isinstance(text, str):
    raise UnclipError(f'a prompt must be text, not {type(text).__name__} ({text!r})')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UnclipError(f'prompt {text!r} is not valid Unicode: remove the lone surrogate') from error
  return text
