"""Tokenizers of captions, each in one tokenizer.json: small ones of ours, CLIP's, XLM-R's, GPT-2's.

Ours and CLIP's are byte-level BPE: text is lower-cased and brought to NFC, its white space
collapsed. Any Unicode text has a representation, as the alphabet is the 256 bytes (section 2.2 of
the GPT-2 report). Ours ends a caption, CLIP's and XLM-R's also begin it with a special token,
GPT-2's does neither; how, and the padding, are part of the file. XLM-R's is a unigram model,
described in xlm_vocabulary; GPT-2's is in gpt2_vocabulary.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from unclip_jax import git_lfs
from unclip_jax.data import clip_vocabulary, gpt2_vocabulary, xlm_vocabulary
from unclip_jax.types import UnclipError

PAD = '<pad>'
END = '<end>'
MAX_VOCAB_SIZE = 4096


class Tokens(NamedTuple):
  """A batch of tokenised captions.

  Attributes:
    ids: int32 [b, context_length], the end-of-text token after the last, then padding. CLIP's and
      XLM-R's begin with a start-of-text token. GPT-2's have text alone, then padding.
    mask: bool [b, context_length], true up to and including the first end-of-text token, also
      where the padding is the end-of-text token again. GPT-2's is true at text alone.
  """

  ids: np.ndarray
  mask: np.ndarray


class Tokenizer:
  """Turns captions into token ids.

  Attributes:
    vocab_size: number of entries, special tokens included.
    context_length: number of tokens of each caption, special tokens and padding included.
    pad_id: id of the padding. CLIP's may be that of a token, so only the mask tells what is text.
    end_id: id of the end-of-text token; of GPT-2's, which puts none, that of the padding.
  """

  def __init__(self, bpe: tokenizers.Tokenizer):
    """Wraps a tokenizer that truncates, pads, and puts an end-of-text token."""
    # Words such as '<end>' in a prompt are text, not control. transformers takes them for control
    # by default: '<|endoftext|>' ends a prompt there, and '!' is padding where that pads with '!'.
    bpe.encode_special_tokens = True
    self._bpe = bpe
    self.vocab_size: int = bpe.get_vocab_size()
    self.context_length: int = bpe.truncation['max_length']
    self.pad_id: int = bpe.padding['pad_id']
    self.end_id: int = [self.pad_id, *_special_ids(bpe)][-1]

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
  def clip(
    cls, context_length: int = clip_vocabulary.CONTEXT_LENGTH, pad_id: int = 0
  ) -> 'Tokenizer':
    """CLIP's tokenizer with OpenAI's vocabulary of 49,408 entries.

    Args:
      context_length: number of tokens a caption is cut or padded to, at least 3.
      pad_id: 0 in OpenAI's code and Karlo, 49,407 (end-of-text) in transformers.

    Raises:
      UnclipError: a number is out of range.
    """
    return cls(clip_vocabulary.load_shipped(context_length, pad_id))

  @classmethod
  def from_transformers(cls, folder: str | os.PathLike[str]) -> 'Tokenizer':
    """Reads the folder of a CLIPTokenizer that transformers saved.

    It holds tokenizer_config.json beside tokenizer.json, or beside vocab.json and merges.txt. Its
    padding is kept; its length is 77 where it names none (transformers writes 1e30 for that).
    What it encodes is what transformers does with `split_special_tokens=True`: '<|endoftext|>' in
    a prompt is text, and so is '!' where that is the padding.

    Raises:
      UnclipError: a file is missing or damaged, or holds no tokenizer of CLIP's kind.
    """
    return cls(clip_vocabulary.load_transformers(folder))

  @classmethod
  def from_xlm_roberta(
    cls,
    folder: str | os.PathLike[str],
    context_length: int = xlm_vocabulary.CONTEXT_LENGTH,
  ) -> 'Tokenizer':
    """Reads the folder of an XLMRobertaTokenizer that transformers saved, as Kandinsky 2.1 has it.

    It holds tokenizer.json or sentencepiece.bpe.model; the first is read where both are there. What
    it encodes is what transformers does, but for words such as '</s>' in a prompt: they are text.

    Args:
      folder: of the tokenizer.
      context_length: number of tokens a caption is cut or padded to, 3 to 512.

    Raises:
      UnclipError: the number is out of range, a file is missing or damaged, or holds no tokenizer
        of XLM-RoBERTa's kind.
    """
    return cls(xlm_vocabulary.load(folder, context_length))

  @classmethod
  def from_gpt2(
    cls,
    folder: str | os.PathLike[str],
    context_length: int = gpt2_vocabulary.CONTEXT_LENGTH,
  ) -> 'Tokenizer':
    """Reads the vocabulary of GPT-2 as GLIDE does: captions in lower case, no special token added.

    The folder holds vocab.json and merges.txt, as transformers calls them, or encoder.json and
    vocab.bpe, as OpenAI does; `.gz` may follow. They are looked for in this order.

    Args:
      folder: of the files.
      context_length: number of tokens a caption is cut or padded to, 1 to 1,024.

    Raises:
      UnclipError: the number is out of range, a file is missing or damaged, or holds no vocabulary
        of GPT-2's kind.
    """
    return cls(gpt2_vocabulary.load(folder, context_length))

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
      text = path.read_text(encoding='utf-8')
      git_lfs.refuse_pointer(path, text)
      bpe = tokenizers.Tokenizer.from_str(text)
    except UnclipError:
      raise
    except Exception as error:
      raise UnclipError(f'tokenizer {path} cannot be read ({error}): fetch it again') from error
    if not _is_ours(bpe):
      raise UnclipError(
        f'tokenizer {path} lacks a context length, padding to it or an end-of-text token: '
        'not one of ours'
      )
    if xlm_vocabulary.is_xlm_roberta(bpe):
      xlm_vocabulary.restore_scores(bpe, text)
    return cls(bpe)

  def __reduce__(self) -> tuple[object, ...]:
    """Worker processes are given the file's text: the library's own pickles lack some of it."""
    return _from_text, (self._bpe.to_str(pretty=False),)

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

  @property
  def transformers_class(self) -> str:
    """The class that opens what `save_transformers` writes."""
    if xlm_vocabulary.is_xlm_roberta(self._bpe):
      return 'XLMRobertaTokenizerFast'  # without sentencepiece.bpe.model; transformers 5 has it too
    is_clip = clip_vocabulary.is_clip(self._bpe)
    return 'CLIPTokenizer' if is_clip else 'PreTrainedTokenizerFast'

  def save_transformers(self, folder: str | os.PathLike[str]) -> None:
    """Writes the files of a tokenizer of transformers into a folder, which is made if missing.

    Raises:
      UnclipError: they cannot be written.
    """
    folder = epath.Path(folder)
    config = {
      'tokenizer_class': self.transformers_class,
      'model_max_length': self.context_length,
      'pad_token': self._bpe.id_to_token(self.pad_id),
      'eos_token': self._bpe.id_to_token(self.end_id),
    }
    if clip_vocabulary.is_clip(self._bpe):
      files = clip_vocabulary.transformers_files(self._bpe)
      config |= {'bos_token': clip_vocabulary.START, 'unk_token': clip_vocabulary.END}
    elif xlm_vocabulary.is_xlm_roberta(self._bpe):
      files = xlm_vocabulary.transformers_files(self._bpe)
      config |= xlm_vocabulary.TRANSFORMERS_NAMES
    else:
      files = {'tokenizer.json': self._bpe.to_str()}
    files['tokenizer_config.json'] = json.dumps(config, indent=2)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for name, text in files.items():
        (folder / name).write_text(text + '\n', encoding='utf-8')
    except OSError as error:
      raise UnclipError(f'tokenizer {folder} cannot be written: {error.strerror}') from error

  def encode(self, texts: Sequence[str]) -> Tokens:
    """Returns the tokens of captions; of an empty caption these are the special tokens alone.

    A caption that is too long keeps its beginning and ends in the end-of-text token if others do;
    `truncated` tells what was cut.

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
    """Returns the normalised text of one caption's ids, up to the end-of-text token.

    CLIP's pieces come apart: "it's 10!" is decoded as "it 's 1 0 !". What XLM-R's has no piece for
    is left out.
    """
    ids = [int(token) for token in ids]
    # What follows may be padding that is also the id of a word.
    end = ids.index(self.end_id) if self.end_id in ids else len(ids)
    return self._bpe.decode(ids[:end]).strip()

  def normalise(self, text: str) -> str:
    """Returns the text as the model sees it: of single spaces, in lower case and NFC.

    XLM-R's keeps capitals; GPT-2's is only brought to lower case.
    """
    return self._bpe.normalizer.normalize_str(_check_text(text))

  def truncated(self, text: str) -> str | None:
    """Returns the end of `text` that does not fit into the context, None where all of it fits."""
    overflow = self._bpe.encode(_check_text(text)).overflowing
    if not overflow:
      return None
    start = overflow[0].offsets[overflow[0].special_tokens_mask.index(0)][0]
    return text[start:].strip()


def _from_text(text: str) -> Tokenizer:
  """What `save` has written."""
  bpe = tokenizers.Tokenizer.from_str(text)
  if xlm_vocabulary.is_xlm_roberta(bpe):
    xlm_vocabulary.restore_scores(bpe, text)
  return Tokenizer(bpe)


def _special_ids(bpe: tokenizers.Tokenizer) -> list[int]:
  """What every caption has: end-of-text, and perhaps start-of-text before it; GPT-2's none."""
  empty = bpe.encode('')
  return [token for token, used in zip(empty.ids, empty.attention_mask, strict=True) if used]


def _is_ours(bpe: tokenizers.Tokenizer) -> bool:
  """Whether captions become rows of one length: text with its special tokens, then padding."""
  if bpe.truncation is None or bpe.padding is None:
    return False
  length, num_special = bpe.truncation['max_length'], len(_special_ids(bpe))
  least = 0 if gpt2_vocabulary.is_gpt2(bpe) else 1
  if not least <= num_special <= 2 or length <= num_special:
    return False
  empty = bpe.encode('')
  mask = [1] * num_special + [0] * (length - num_special)
  return empty.attention_mask == mask and max(empty.ids) < bpe.get_vocab_size()


def _check_text(text: str) -> str:
  if not isinstance(text, str):
    raise UnclipError(f'a prompt must be text, not {type(text).__name__} ({text!r})')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UnclipError(f'prompt {text!r} is not valid Unicode: remove the lone surrogate') from error
  return text
