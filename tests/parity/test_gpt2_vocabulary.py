"""The tokens of GLIDE's captions, against transformers' GPT2Tokenizer and BPE in plain Python."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
import regex
from test_clip_vocabulary import LETTERS, NASTY, WORDS, make_texts
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from unclip_jax.data.tokenizer import Tokenizer

END = '<|endoftext|>'
LENGTH = 128
NUM_PLAIN = 1500  # texts for plain Python, which is slow
# From the report of GPT-2: contractions, letters, numbers, the rest, and spaces.
PIECES = regex.compile(
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
SIGMAS = (
  'ΟΔΟΣ',
  'Σ',
  'ΣΣ',
  'ΑΣ.Σ',
  'Α Σ ΒΣ',
  'ΑΣ\u0301Β',
  "ΑΣ'",
  '1Σ',
  'ΑΣ1',
  'Α\u00adΣ\u00ad',
  '\u037aΣ',
  'Α\u037aΣ',
)


def texts():
  """What Python and the library take for the same letters: those that both have names of."""
  for text in (*NASTY, *SIGMAS, END, f'a{END} b', *make_texts(seed=1)):
    yield ''.join(letter for letter in text if unicodedata.category(letter) != 'Cn')


TEXTS = list(texts())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A vocabulary of 700 entries, learned from words: the end of text is the last."""
  library = Library(models.BPE())
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = trainers.BpeTrainer(
    vocab_size=699,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  corpus = [f' {word.lower()} {word.lower()}  {other.lower()}' for word, other in pairs()]
  library.train_from_iterator(corpus, trainer)
  model = json.loads(library.to_str())['model']
  folder = tmp_path_factory.mktemp('gpt2')
  vocab = {**model['vocab'], END: len(model['vocab'])}
  (folder / 'vocab.json').write_text(json.dumps(vocab), encoding='utf-8')
  lines = ['#version: 0.2', *(' '.join(merge) for merge in model['merges']), '']
  (folder / 'merges.txt').write_text('\n'.join(lines), encoding='utf-8')
  return folder


def pairs():
  return itertools.islice(itertools.product(WORDS, WORDS), 0, None, 7)


@pytest.fixture(scope='module')
def ours(folder):
  return Tokenizer.from_gpt2(folder, LENGTH)


@pytest.fixture(scope='module')
def encoded(ours):
  return ours.encode(TEXTS)


def compare(texts, ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    wrong = np.flatnonzero((one != other).any(axis=1))
    assert not wrong.size, (texts[wrong[0]], one[wrong[0]], other[wrong[0]])


def padded(rows, pad):
  lengths = np.array([[min(len(row), LENGTH)] for row in rows])
  ids = np.array([(row + [pad] * LENGTH)[:LENGTH] for row in rows])
  return ids, np.arange(LENGTH)[None] < lengths


def test_tokens_are_those_of_transformers(folder, ours, encoded):
  theirs = GPT2Tokenizer.from_pretrained(folder)
  # Words such as '<|endoftext|>' are text; ours is of lower case by itself.
  rows = [theirs.encode(text.lower(), split_special_tokens=True) for text in TEXTS]
  compare(TEXTS, encoded, padded(rows, ours.pad_id))
  assert 100 < sum(len(row) > LENGTH for row in rows) < len(rows) / 2
  assert len(np.unique(encoded.ids)) > 500


def test_tokens_are_those_of_plain_python(folder, ours, encoded):
  vocab = json.loads((folder / 'vocab.json').read_text())
  lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')[1:-1]
  ranks = {tuple(line.split(' ')): rank for rank, line in enumerate(lines)}
  letter_of = {byte: letter for letter, byte in LETTERS.items()}

  def encode(text):
    for piece in PIECES.findall(text.lower()):
      letters = [letter_of[byte] for byte in piece.encode()]
      yield from (vocab[token] for token in merge_all(letters, ranks))

  rows = [list(itertools.islice(encode(text[:1000]), LENGTH)) for text in TEXTS[:NUM_PLAIN]]
  compare(TEXTS, [x[:NUM_PLAIN] for x in encoded], padded(rows, ours.pad_id))


def merge_all(tokens, ranks):
  """Merges of the lowest rank first, each wherever it is, until none is left."""
  while True:
    found = [ranks.get(pair, np.inf) for pair in itertools.pairwise(tokens)]
    if not found or min(found) == np.inf:
      return tokens
    best, merged = min(found), []
    for token in tokens:
      if merged and not merged[-1][1] and ranks.get((merged[-1][0], token)) == best:
        merged[-1] = (merged[-1][0] + token, True)
      else:
        merged.append((token, False))
    tokens = [token for token, _ in merged]


def test_what_transformers_opens_gives_the_same_tokens(ours, encoded, tmp_path):
  ours.save_transformers(tmp_path)
  theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
  rows = theirs(TEXTS, padding='max_length', truncation=True, return_tensors='np')
  wanted = [i for i, text in enumerate(TEXTS) if END not in text]
  found = rows.input_ids[wanted], rows.attention_mask[wanted].astype(bool)
  compare([TEXTS[i] for i in wanted], [x[wanted] for x in encoded], found)
