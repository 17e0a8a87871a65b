"""XLM-RoBERTa's unigram vocabulary, from the folders that transformers saves it in.

Kudo 2018 (subword regularisation, without the sampling): of all ways to cut a word into pieces the
one whose scores have the largest sum. Text is normalised by a table that the vocabulary brings
along (NFKC, near enough), then split at white space; each word begins with '▁'. SentencePiece's ids
are shifted as in fairseq: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then its pieces but for its own
three special ones, and `<mask>` last.
"""

import base64
import binascii
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from unclip_jax import git_lfs
from unclip_jax.types import UnclipError

CONTEXT_LENGTH = 77  # of Kandinsky 2.1, whatever length its tokenizer's folder names
MAX_CONTEXT_LENGTH = 512
JSON_NAME, MODEL_NAME = 'tokenizer.json', 'sentencepiece.bpe.model'
START, PAD, END, UNKNOWN, MASK = _SPECIAL = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')
# What tokenizer_config.json names them in.
TRANSFORMERS_NAMES = {
  'bos_token': START,
  'cls_token': START,
  'eos_token': END,
  'sep_token': END,
  'pad_token': PAD,
  'unk_token': UNKNOWN,
  'mask_token': MASK,
}
# Their names inside: no word has a space, so that '</s>' in a prompt is text, as SentencePiece has
# it. By their own names they would be pieces like others, with the largest score of all.
_HIDDEN = tuple(f' {name}' for name in _SPECIAL)
_SPACE = '▁'
# Of sentencepiece_model.proto: kinds of pieces, and of models.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED = 1, 2, 3, 5
_UNIGRAM = 1

Pieces = list[tuple[str, float]]


def load(folder: str | os.PathLike[str], context_length: int) -> tokenizers.Tokenizer:
  """What transformers saved of an XLMRobertaTokenizer; tokenizer.json goes first, as there.

  Raises:
    UnclipError: a number is out of range, a file is missing or damaged, or holds no tokenizer of
      XLM-RoBERTa's kind.
  """
  if type(context_length) is not int or not 3 <= context_length <= MAX_CONTEXT_LENGTH:
    raise UnclipError(f'context_length {context_length}: choose 3 to {MAX_CONTEXT_LENGTH}')
  folder = epath.Path(folder)
  path = folder / JSON_NAME
  if path.exists():
    pieces, charsmap = _read_json(path)
  elif (folder / MODEL_NAME).exists():
    path = folder / MODEL_NAME
    pieces, charsmap = _read_model(path)
  else:
    raise UnclipError(
      f'{folder} has neither {JSON_NAME} nor {MODEL_NAME}: give the tokenizer folder of a model'
    )
  _check_pieces(path, pieces)
  try:
    return _build(pieces, charsmap, context_length, _HIDDEN)
  except Exception as error:  # what the library raises for any fault of the table
    raise UnclipError(f'{path} cannot be used ({error}): fetch it again') from error


def is_xlm_roberta(tokenizer: tokenizers.Tokenizer) -> bool:
  """Whether a tokenizer is of XLM-RoBERTa's kind: ours are the only unigram models."""
  return isinstance(tokenizer.model, models.Unigram)


def restore_scores(tokenizer: tokenizers.Tokenizer, text: str) -> None:
  """Gives a tokenizer the scores of the file that it was read from.

  The library reads numbers with an error in their last bit. Pieces' scores are float32, so that
  their sums in float64 are exact: with that error, ties would be broken in another way.
  """
  model = json.loads(text)['model']
  vocab = [(piece, score) for piece, score in model['vocab']]
  tokenizer.model = models.Unigram(vocab, model['unk_id'], model['byte_fallback'])


def transformers_files(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
  """The texts of the vocabulary's files as transformers has them, by their names."""
  fields = json.loads(tokenizer.to_str())
  pieces = [(piece, score) for piece, score in fields['model']['vocab']]
  charsmap = _find_charsmap(JSON_NAME, fields['normalizer'])
  context_length = tokenizer.truncation['max_length']
  return {JSON_NAME: _build(pieces, charsmap, context_length, _SPECIAL).to_str()}


def _build(
  pieces: Pieces, charsmap: bytes | None, context_length: int, names: Sequence[str]
) -> tokenizers.Tokenizer:
  """A tokenizer of captions; `names` are what its special tokens are called in it."""
  special = dict(zip(_SPECIAL, names, strict=True))
  vocab = [*((name, 0.0) for name in names[:-1]), *pieces[len(names) - 1 : -1], (names[-1], 0.0)]
  unk_id = _SPECIAL.index(UNKNOWN)
  tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
  )
  table = [] if charsmap is None else [normalizers.Precompiled(charsmap)]
  # Words are split at white space anyhow: the last two steps are for what `normalise` shows.
  tokenizer.normalizer = normalizers.Sequence(
    [*table, normalizers.Replace(tokenizers.Regex(r'\s+'), ' '), normalizers.Strip()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prepend_scheme='always')]
  )
  tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme='always')
  start, end, pad = special[START], special[END], special[PAD]
  start_id, end_id, pad_id = (tokenizer.token_to_id(name) for name in (start, end, pad))
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[start, '$A', end],
    pair=[start, '$A', end, end, '$B', end],
    special_tokens=[(start, start_id), (end, end_id)],
  )
  tokenizer.enable_truncation(context_length)
  tokenizer.enable_padding(length=context_length, pad_id=pad_id, pad_token=pad)
  return tokenizer


def _check_pieces(path: epath.Path, pieces: Pieces) -> None:
  names = [piece for piece, _ in pieces]
  if len(names) < len(_SPECIAL) or (*names[:4], names[-1]) != _SPECIAL:
    raise UnclipError(
      f'{path}: the vocabulary must begin with {" ".join(_SPECIAL[:-1])} and end with {MASK}: not '
      'that of XLM-RoBERTa'
    )
  known: set[str] = {''}
  for index, (piece, score) in enumerate(pieces):
    if piece in known or piece in _HIDDEN:
      raise UnclipError(
        f'{path}: entry {index}, {piece!r}, is empty or there twice: fetch it again'
      )
    if not math.isfinite(score):
      raise UnclipError(f'{path}: the score of {piece!r} is {score}: fetch it again')
    known.add(piece)


def _read_json(path: epath.Path) -> tuple[Pieces, bytes | None]:
  """The pieces of a tokenizer.json, and its table for normalising."""
  content = _read(path)
  try:
    fields = json.loads(content.decode(), parse_int=float)
  except (ValueError, RecursionError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): fetch it again') from error
  match fields:
    case {'model': {'vocab': [*entries], **model}} if model.get('type', 'Unigram') == 'Unigram':
      pass
    case _:
      raise UnclipError(f'{path} holds no unigram model: not a tokenizer of XLM-RoBERTa')
  pieces = []
  for index, entry in enumerate(entries):
    match entry:
      case [str(piece), float(score)] if _is_unicode(piece):
        pieces.append((piece, score))
      case _:
        raise UnclipError(
          f'{path}: entry {index}, {entry!r}, is no piece and score: fetch it again'
        )
  added = fields.get('added_tokens') or []
  if not isinstance(added, list):
    raise UnclipError(f'{path}: added_tokens is {added!r}: fetch it again')
  for token in added:
    if not isinstance(token, dict) or token.get('content') not in _SPECIAL:
      raise UnclipError(f'{path} has the added token {token!r}, which XLM-RoBERTa lacks: remove it')
  return pieces, _find_charsmap(path, fields.get('normalizer'))


def _find_charsmap(path: epath.Path | str, normalizer: Any) -> bytes | None:
  """The table of a normalizer, None where it has none."""
  match normalizer:
    case None:
      return None
    case {'type': 'Precompiled', 'precompiled_charsmap': str(text)}:
      try:
        return base64.b64decode(text, validate=True)
      except binascii.Error as error:
        raise UnclipError(f'{path}: precompiled_charsmap ({error}): fetch it again') from error
    case {'type': 'Sequence', 'normalizers': [*steps]}:
      found = [_find_charsmap(path, step) for step in steps]
      return next((charsmap for charsmap in found if charsmap is not None), None)
    # What versions of transformers do about white space, at which words are split anyhow.
    case {'type': 'Strip'} | {'type': 'Replace', 'content': ' ' | '▁'}:
      return None
  raise UnclipError(
    f'{path}: its normalizer {str(normalizer)[:60]} is not that of XLM-RoBERTa: give another folder'
  )


def _read_model(path: epath.Path) -> tuple[Pieces, bytes | None]:
  """The pieces of a SentencePiece model with fairseq's ids, and its table for normalising."""
  data, entries, specs = _read(path), [], {}
  try:
    for number, value in _fields(data):
      if number == 1:
        entries.append(_read_piece(value))
      elif number in (2, 3):
        specs[number] = dict(_fields(value))
  except (TypeError, ValueError, struct.error) as error:
    raise UnclipError(f'{path} is no SentencePiece model ({error}): fetch it again') from error
  if 2 not in specs or 3 not in specs:
    raise UnclipError(f'{path} is no SentencePiece model, or is cut short: fetch it again')
  if specs[2].get(3, _UNIGRAM) != _UNIGRAM:
    raise UnclipError(f'{path} holds no unigram model: not a tokenizer of XLM-RoBERTa')
  kinds = [kind for _, _, kind in entries]
  if kinds[:3] != [_UNKNOWN, _CONTROL, _CONTROL] or not {*kinds[3:]} <= {_NORMAL, _UNUSED}:
    raise UnclipError(
      f'{path}: only its first three pieces must be special ones: not a tokenizer of XLM-RoBERTa'
    )
  pieces = [(name, 0.0) for name in _SPECIAL[:-1]]
  pieces += [(piece, score) for piece, score, _ in entries[3:]]
  charsmap = specs[3].get(2, b'')
  if not isinstance(charsmap, bytes):
    raise UnclipError(f'{path} is no SentencePiece model: fetch it again')
  return [*pieces, (MASK, 0.0)], charsmap or None


def _read_piece(data: bytes) -> tuple[str, float, int]:
  """The text, the score and the kind of a SentencePiece."""
  fields = dict(_fields(data))
  (score,) = struct.unpack('<f', fields.get(2, bytes(4)))
  return bytes.decode(fields.get(1, b'')), score, int(fields.get(3, _NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Numbers and values of a protobuf message's fields: whole numbers, or the bytes of the others.

  Raises:
    ValueError: it is none, or is cut short.
    TypeError: `data` is a whole number: a field is of another kind than expected.
  """
  position = 0
  while position < len(data):
    key, position = _varint(data, position)
    kind = key & 7
    if kind == 0:
      value, position = _varint(data, position)
      yield key >> 3, value
      continue
    if kind == 2:
      size, position = _varint(data, position)
    elif kind in (1, 5):
      size = 8 if kind == 1 else 4
    else:
      raise ValueError(f'byte {position} begins no field')
    if position + size > len(data):
      raise ValueError('it is cut short')
    yield key >> 3, data[position : position + size]
    position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
  """A whole number, seven bits a byte and the lowest first, and the position after it."""
  value = 0
  for shift in range(0, 70, 7):
    if position >= len(data):
      raise ValueError('it is cut short')
    byte = data[position]
    position += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, position
  raise ValueError(f'byte {position} begins no field')


def _is_unicode(text: str) -> bool:
  return not any('\ud800' <= letter <= '\udfff' for letter in text)


def _read(path: epath.Path) -> bytes:
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
  git_lfs.refuse_pointer(path, content)
  return content
