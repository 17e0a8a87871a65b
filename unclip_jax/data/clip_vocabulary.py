"""CLIP's byte-level BPE: OpenAI's vocabulary, and the folders that transformers saves it in.

Section 2.4 of the CLIP paper. Text is brought to NFC and lower-cased, its white space collapsed,
then split into runs of letters, single digits, runs of anything else and English contractions. The
last byte of each piece carries the suffix '</w>'. 512 bytes, 48,894 merges and two special tokens
make 49,408 entries.
"""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError

START = '<|startoftext|>'
END = '<|endoftext|>'
CONTEXT_LENGTH = 77
MAX_CONTEXT_LENGTH = 1024
# Lines 2 to 48,895 of OpenAI's bpe_simple_vocab_16e6.txt, a merge a line, through
# gzip.compress(..., 9, mtime=0). The rest of that file is not part of the vocabulary.
MERGES_FILE = Path(__file__).parents[1] / 'assets' / 'clip' / 'merges.txt.gz'
# Of transformers 5. OpenAI's simple_tokenizer.py has the same, and ignores case.
_PIECES = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_SUFFIX = '</w>'
_SPACE = 'Ġ'  # of the alphabet that stands for the 256 bytes
# What the files of transformers name special tokens in.
_SPECIAL = (
  *(f'{name}_token' for name in ('bos', 'eos', 'unk', 'pad', 'sep', 'cls', 'mask')),
  *('added_tokens_decoder', 'additional_special_tokens', 'extra_special_tokens'),
)
# transformers writes int(1e30) where a length is not known, and takes what is above 1e20 for it.
_UNKNOWN_LENGTH = 1e20

Merge = tuple[str, str]


def load_shipped(context_length: int, pad_id: int) -> tokenizers.Tokenizer:
  """OpenAI's vocabulary as a tokenizer of captions.

  Raises:
    UnclipError: a number is out of range.
  """
  text = gzip.decompress(MERGES_FILE.read_bytes()).decode()
  merges = [_split_merge(line) for line in text.splitlines()]
  tokens = [*_byte_tokens(), *map(''.join, merges), START, END]
  if not 0 <= pad_id < len(tokens):
    raise UnclipError(f'pad_id {pad_id}: choose 0 (OpenAI) or {len(tokens) - 1} (transformers)')
  if not _is_length(context_length):
    raise UnclipError(f'context_length {context_length}: choose 3 to {MAX_CONTEXT_LENGTH}')
  vocab = {token: index for index, token in enumerate(tokens)}
  return _build(vocab, merges, context_length, pad_id)


def load_transformers(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """What transformers saved of a CLIPTokenizer; tokenizer.json goes before vocab.json, as there.

  Raises:
    UnclipError: a file is missing or damaged, or holds no tokenizer of CLIP's kind.
  """
  folder = epath.Path(folder)
  vocab_file = folder / 'tokenizer.json'
  if vocab_file.exists():
    fields = _read_json(vocab_file)
    model = fields.get('model')
    if not isinstance(model, dict) or model.get('end_of_word_suffix') != _SUFFIX:
      raise UnclipError(
        f'{vocab_file} holds no BPE with the suffix {_SUFFIX}: not a CLIP tokenizer'
      )
    merges_file, vocab, lines = vocab_file, model.get('vocab'), model.get('merges')
    added = _names(vocab_file, fields.get('added_tokens'))
  else:
    vocab_file, merges_file = folder / 'vocab.json', folder / 'merges.txt'
    vocab = _read_json(vocab_file)
    lines = [line for line in _read(merges_file).splitlines() if line]
    if lines and '#version' in lines[0]:
      del lines[0]
    added_file = folder / 'added_tokens.json'
    added = list(_read_json(added_file)) if added_file.exists() else []
  _check_vocab(vocab_file, vocab)
  merges = [_split_merge(line) for line in lines] if isinstance(lines, list) else []
  _check_merges(merges_file, vocab, merges)
  context_length, pad, named = _read_config(folder)
  if pad not in vocab:
    raise UnclipError(f'{folder}: the padding {pad!r} is not in the vocabulary: choose one that is')
  if others := sorted({*added, *named} - {START, END, pad}):
    raise UnclipError(
      f'{folder} has the special token {others[0]!r}, which a CLIP tokenizer lacks: remove it'
    )
  return _build(vocab, merges, context_length, vocab[pad])


def is_clip(bpe: tokenizers.Tokenizer) -> bool:
  """Whether a tokenizer is of CLIP's kind: words end in its suffix."""
  return bpe.token_to_id(START) is not None and bpe.token_to_id(END) is not None


def transformers_files(bpe: tokenizers.Tokenizer) -> dict[str, str]:
  """The texts of the vocabulary's files as transformers has them, by their names."""
  model = json.loads(bpe.to_str())['model']
  merges = ['#version: 0.2', *(' '.join(merge) for merge in model['merges'])]
  vocab = json.dumps(model['vocab'], ensure_ascii=False)
  return {'vocab.json': vocab, 'merges.txt': '\n'.join(merges)}


def _build(
  vocab: dict[str, int], merges: list[Merge], context_length: int, pad_id: int
) -> tokenizers.Tokenizer:
  # No token for what is unknown: every byte is in the vocabulary.
  bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=_SUFFIX))
  bpe.add_special_tokens([START, END])
  bpe.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      normalizers.Lowercase(),
      normalizers.Strip(),
    ]
  )
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior='removed', invert=True),
      # It splits the special tokens further, as transformers' does: they are text here.
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  # Token by token, before they are joined: a '</w>' that somebody wrote comes back.
  bpe.decoder = decoders.Sequence([decoders.Replace(_SUFFIX, _SPACE), decoders.ByteLevel()])
  bpe.post_processor = processors.TemplateProcessing(
    single=f'{START} $A {END}', special_tokens=[(START, vocab[START]), (END, vocab[END])]
  )
  bpe.enable_truncation(context_length)
  bpe.enable_padding(length=context_length, pad_id=pad_id, pad_token=bpe.id_to_token(pad_id))
  return bpe


def _byte_tokens() -> list[str]:
  """The 256 bytes within a word, then the same at its end, in the order of OpenAI's ids."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  return alphabet + [letter + _SUFFIX for letter in alphabet]


def _split_merge(line: object) -> Merge:
  """The two sides of 'a b' or ['a', 'b']; of anything else a pair that fits no vocabulary."""
  sides = line.split(' ') if isinstance(line, str) else line
  match sides:
    case [str(left), str(right)]:
      return left, right
  return str(line), ''


def _check_vocab(file: epath.Path, vocab: object) -> None:
  if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
    raise UnclipError(f'{file}: the vocabulary must name tokens and their ids: fetch it again')
  if missing := [token for token in (START, END) if token not in vocab]:
    raise UnclipError(f'{file}: the vocabulary lacks {missing[0]}: not a CLIP tokenizer')
  # Else some texts would have no tokens.
  if missing := [token for token in _byte_tokens() if token not in vocab]:
    raise UnclipError(f'{file}: the vocabulary lacks the byte {missing[0]!r}: not a CLIP tokenizer')
  try:
    ''.join(vocab).encode()
  except UnicodeEncodeError as error:
    raise UnclipError(f'{file}: the vocabulary has a lone surrogate: fetch it again') from error
  if sorted(vocab.values()) != list(range(len(vocab))):
    raise UnclipError(f'{file}: the ids of the vocabulary must be 0 to {len(vocab) - 1}, each once')


def _check_merges(file: epath.Path, vocab: dict[str, int], merges: Sequence[Merge]) -> None:
  if not merges:
    raise UnclipError(f'{file} holds no merges: fetch it again')
  for number, (left, right) in enumerate(merges, 1):
    if not (left in vocab and right in vocab and left + right in vocab):
      raise UnclipError(
        f'{file}: merge {number}, {left!r} {right!r}, does not fit the vocabulary: fetch both again'
      )


def _read_config(folder: epath.Path) -> tuple[int, str, list[str]]:
  """The context length, the padding, and all special tokens that are named."""
  path = folder / 'tokenizer_config.json'
  fields = _read_json(path)
  length = fields.get('model_max_length')
  if isinstance(length, int | float) and length > _UNKNOWN_LENGTH:
    length = CONTEXT_LENGTH
  if not _is_length(length):
    raise UnclipError(
      f'{path}: model_max_length is {length!r}: give the context length, 3 to {MAX_CONTEXT_LENGTH}'
    )
  tokens = {name: _names(path, fields.get(name)) for name in _SPECIAL}
  special = folder / 'special_tokens_map.json'
  # As in transformers: a config that lists its added tokens needs no other file, others yield.
  if 'added_tokens_decoder' not in fields and special.exists():
    others = _read_json(special)
    tokens |= {name: _names(special, others[name]) for name in _SPECIAL if name in others}
  pad = next(iter(tokens['pad_token']), END)
  return length, pad, [name for names in tokens.values() for name in names]


def _names(file: epath.Path, value: object) -> list[str]:
  """The contents of a token or of many, in any form that transformers has written them."""
  match value:
    case None:
      return []
    case str():
      return [value]
    case {'content': str(content)}:
      return [content]
    case dict():
      return [name for token in value.values() for name in _names(file, token)]
    case list():
      return [name for token in value for name in _names(file, token)]
  raise UnclipError(f'{file}: {value!r} is no special token: fetch it again')


def _is_length(value: object) -> bool:
  return type(value) is int and 3 <= value <= MAX_CONTEXT_LENGTH


def _read_json(path: epath.Path) -> dict[str, Any]:
  text = _read(path)
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): fetch it again') from error
  if not isinstance(fields, dict):
    raise UnclipError(f'{path} is not a JSON object: fetch it again')
  return fields


def _read(path: epath.Path) -> str:
  if not path.exists():
    raise UnclipError(f'{path} is missing: give the tokenizer folder of a CLIP model')
  try:
    text = path.read_text(encoding='utf-8')
  except OSError as error:
    raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
  except UnicodeDecodeError as error:
    raise UnclipError(f'{path} is not UTF-8 text ({error.reason}): fetch it again') from error
  git_lfs.refuse_pointer(path, text)
  return text
