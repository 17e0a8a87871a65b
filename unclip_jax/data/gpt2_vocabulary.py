"""GPT-2's byte-level BPE as GLIDE reads captions with it, from the two files of the vocabulary.

Section 2.2 of the GPT-2 report. Text is lower-cased (GLIDE's own step) and split into runs of
letters, of digits and of anything else, each with the space before it, and English contractions.
50,000 merges, the 256 bytes and one special token make 50,257 entries. The special token, the last,
is GLIDE's padding: nothing begins or ends a caption.
"""

import gzip
import json
import os
import zlib
from collections.abc import Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError

END = '<|endoftext|>'
CONTEXT_LENGTH = 128  # of GLIDE
MAX_CONTEXT_LENGTH = 1024
# As transformers calls them and as OpenAI does.
_VOCAB_NAMES = ('vocab.json', 'encoder.json')
_MERGES_NAMES = ('merges.txt', 'vocab.bpe')
# A capital sigma that ends a word, which Python writes in lower case with a letter of its own. The
# library looks at each letter alone.
_CASED = r'[\p{Cased}&&\P{Case_Ignorable}]'
_FINAL_SIGMA = rf'{_CASED}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{_CASED})'


def load(folder: str | os.PathLike[str], context_length: int) -> tokenizers.Tokenizer:
  """The vocabulary in a folder as a tokenizer of captions; its files may be packed by gzip.

  Raises:
    UnclipError: the number is out of range, a file is missing or damaged, or holds no vocabulary of
      GPT-2's kind.
  """
  if type(context_length) is not int or not 1 <= context_length <= MAX_CONTEXT_LENGTH:
    raise UnclipError(f'context_length {context_length}: choose 1 to {MAX_CONTEXT_LENGTH}')
  folder = epath.Path(folder)
  vocab_file, merges_file = _find(folder, _VOCAB_NAMES), _find(folder, _MERGES_NAMES)
  vocab = _read_vocab(vocab_file)
  merges = _read_merges(merges_file, vocab)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Replace(tokenizers.Regex(_FINAL_SIGMA), 'ς'), normalizers.Lowercase()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.enable_truncation(context_length)
  tokenizer.enable_padding(length=context_length, pad_id=vocab[END], pad_token=END)
  return tokenizer


def is_gpt2(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether a tokenizer is of GPT-2's kind: no entry ends a word, and none is put to captions."""
  model, pad = tokenizer.model, tokenizer.padding
  is_plain = isinstance(model, models.BPE) and model.end_of_word_suffix is None
  return is_plain and tokenizer.post_processor is None and pad['pad_token'] == END


def _find(folder: epath.Path, names: Sequence[str]) -> epath.Path:
  for name in names:
    for path in (folder / name, folder / f'{name}.gz'):
      if path.exists():
        return path
  raise UnclipError(
    f'{folder} has no {names[0]}: put the {_VOCAB_NAMES[0]} and {_MERGES_NAMES[0]} of GPT-2 there '
    f'(or {_VOCAB_NAMES[1]} and {_MERGES_NAMES[1]}, as OpenAI calls them)'
  )


def _read_vocab(path: epath.Path) -> dict[str, int]:
  text = _read(path)
  try:
    vocab = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): fetch it again') from error
  if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
    raise UnclipError(f'{path}: the vocabulary must name tokens and their ids: fetch it again')
  if sorted(vocab.values()) != list(range(len(vocab))):
    raise UnclipError(f'{path}: the ids of the vocabulary must be 0 to {len(vocab) - 1}, each once')
  if vocab.get(END) != len(vocab) - 1:
    raise UnclipError(f'{path}: the last entry must be {END}: not the vocabulary of GPT-2')
  # Else some texts would have no tokens.
  if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()):
    raise UnclipError(f'{path} lacks the byte {missing[0]!r}: not the vocabulary of GPT-2')
  try:
    ''.join(vocab).encode()
  except UnicodeEncodeError as error:
    raise UnclipError(f'{path}: the vocabulary has a lone surrogate: fetch it again') from error
  return vocab


def _read_merges(path: epath.Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
  lines = [line for line in _read(path).splitlines() if line]
  if lines and lines[0].startswith('#version'):
    del lines[0]
  merges = []
  for number, line in enumerate(lines, 1):
    left, _, right = line.partition(' ')
    if not (left in vocab and right in vocab and left + right in vocab):
      raise UnclipError(
        f'{path}: merge {number}, {line!r}, does not fit the vocabulary: fetch both again'
      )
    merges.append((left, right))
  # Each merge makes an entry: with some of them missing, texts would have other tokens.
  wanted = len(vocab) - len(pre_tokenizers.ByteLevel.alphabet()) - 1
  if len(merges) != wanted:
    raise UnclipError(
      f'{path} holds {len(merges)} merges, the vocabulary {wanted} entries that they make: fetch '
      'both again'
    )
  return merges


def _read(path: epath.Path) -> str:
  try:
    content = path.read_bytes()
    git_lfs.refuse_pointer(path, content)
    return (gzip.decompress(content) if path.suffix == '.gz' else content).decode()
  except UnclipError:
    raise
  except UnicodeDecodeError as error:
    raise UnclipError(f'{path} is not UTF-8 text ({error.reason}): fetch it again') from error
  except (OSError, EOFError, zlib.error) as error:  # of the file, and of gzip
    raise UnclipError(f'cannot read {path} ({error}): fetch it again') from error
