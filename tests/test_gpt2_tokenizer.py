import gzip
import json

import gpt2_files
import numpy as np
import pytest
from gpt2_files import END, MERGES

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import UnclipError

VOCAB = gpt2_files.make_vocab()
PAD = len(VOCAB) - 1
LENGTH = 12
# Pieces by the merges above; what no merge makes stays a byte.
PIECES = {
  'The cat': ['t', 'h', 'e', 'Ġcat'],
  ' the cat': ['Ġthe', 'Ġcat'],
  "cat's": ['cat', "'s"],
  'CAT 12': ['cat', 'Ġ', '12'],
  'cat12!!': ['cat', '12', '!!'],
  'in  a': ['in', 'Ġ', 'Ġa'],
  'cat \n': ['cat', 'Ġ', 'Ċ'],
  'ΣΣ Σ': ['Ïĥ', 'ÏĤ', 'Ġ', 'Ïĥ'],  # Σ at the end of a word, and alone, in lower case
  END: ['<', '|', 'e', 'n', 'do', 'f', 't', 'e', 'x', 't', '|', '>'],
  '': [],
}


@pytest.fixture
def folder(tmp_path):
  return gpt2_files.write(tmp_path / 'gpt2')


@pytest.fixture
def tokenizer(folder):
  return Tokenizer.from_gpt2(folder, LENGTH)


def same(one, other):
  names = ('vocab_size', 'context_length', 'pad_id', 'end_id')
  assert all(getattr(one, name) == getattr(other, name) for name in names)
  texts = [*PIECES, 'A Cafe\u0301  \t' * 9]
  for left, right in zip(one.encode(texts), other.encode(texts), strict=True):
    np.testing.assert_array_equal(left, right)
  assert [one.normalise(text) for text in texts] == [other.normalise(text) for text in texts]


@pytest.mark.parametrize('text', PIECES)
def test_pieces(tokenizer, text):
  ids, mask = tokenizer.encode([text])
  pieces = [VOCAB[piece] for piece in PIECES[text]]
  rest = LENGTH - len(pieces)
  assert ids[0].tolist() == [*pieces, *[PAD] * rest]
  assert mask[0].tolist() == [True] * len(pieces) + [False] * rest


def test_numbers(tokenizer):
  assert (tokenizer.vocab_size, tokenizer.context_length) == (256 + len(MERGES) + 1, LENGTH)
  assert tokenizer.pad_id == tokenizer.end_id == PAD


def test_a_long_caption_is_cut_without_an_end(tokenizer):
  ids, mask = tokenizer.encode(['a' + ' cat' * LENGTH])
  assert ids[0].tolist() == [VOCAB['a'], *[VOCAB['Ġcat']] * (LENGTH - 1)]
  assert mask.all()
  assert tokenizer.truncated('a' + ' cat' * LENGTH) == 'cat'
  assert tokenizer.truncated('a' + ' cat' * (LENGTH - 1)) is None


@pytest.mark.parametrize('text', PIECES)
def test_text_comes_back(tokenizer, text):
  (ids,), _ = tokenizer.encode([text])
  assert tokenizer.decode(ids) == text.lower().strip()
  assert tokenizer.normalise(text) == text.lower()


def test_saved_equals_loaded(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.json')
  same(loaded, tokenizer)
  loaded.save(tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == (tmp_path / 'tokenizer.json').read_bytes()


def test_a_file_that_pads_with_another_entry_is_an_error(tokenizer, tmp_path):
  path = tmp_path / 'tokenizer.json'
  tokenizer.save(path)
  fields = json.loads(path.read_text())
  fields['padding'] |= {'pad_token': '!', 'pad_id': VOCAB['!']}
  path.write_text(json.dumps(fields))
  with pytest.raises(UnclipError, match='not one of ours'):
    Tokenizer.load(path)


@pytest.mark.parametrize('packed', [False, True])
def test_names_of_openai(tokenizer, tmp_path, packed):
  folder = gpt2_files.write(tmp_path / 'openai', names=('encoder.json', 'vocab.bpe'))
  if packed:
    for path in list(folder.iterdir()):
      path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
      path.unlink()
  same(Tokenizer.from_gpt2(folder, LENGTH), tokenizer)


def test_header_and_line_ends_of_merges(folder, tokenizer):
  path = folder / 'merges.txt'
  for lines in (['#version: 0.2', *MERGES], MERGES):
    path.write_bytes('\r\n'.join(lines).encode())
    same(Tokenizer.from_gpt2(folder, LENGTH), tokenizer)


@pytest.mark.parametrize('length', [0, 1025, True, 9.0])
def test_lengths_out_of_range_are_errors(folder, length):
  with pytest.raises(UnclipError, match='context_length'):
    Tokenizer.from_gpt2(folder, length)


def test_the_default_length_is_that_of_glide(folder):
  assert Tokenizer.from_gpt2(folder).context_length == 128


@pytest.mark.parametrize('name', ['vocab.json', 'merges.txt'])
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  with pytest.raises(UnclipError, match=rf'has no {name}: put the vocab.json and merges.txt'):
    Tokenizer.from_gpt2(folder)


def changed(**ids):
  return json.dumps(VOCAB | ids)


DAMAGED = {
  ('vocab.json', b'{"a": 0'): 'vocab.json is not valid JSON',
  ('vocab.json', b'[]'): 'must name tokens and their ids',
  ('vocab.json', b'\xff'): 'is not UTF-8',
  ('vocab.json', changed(a='3').encode()): 'must name tokens and their ids',
  ('vocab.json', changed(a=PAD).encode()): 'must be 0 to',
  ('vocab.json', changed(zebra=PAD + 1).encode()): f'the last entry must be {END}',
  ('vocab.json', json.dumps({END: 0}).encode()): "lacks the byte '!'",
  ('merges.txt', b''): 'holds 0 merges, the vocabulary 22',
  ('merges.txt', '\n'.join(MERGES[:-1]).encode()): '21 merges, the vocabulary 22',
  ('merges.txt', '\n'.join([*MERGES[:-1], 'z z']).encode()): "merge 22, 'z z', does not fit",
  ('merges.txt', '\n'.join([*MERGES[:-1], 'at']).encode()): "merge 22, 'at', does not fit",
}


@pytest.mark.parametrize(('name', 'content'), DAMAGED)
def test_a_damaged_file_is_named(folder, name, content):
  (folder / name).write_bytes(content)
  with pytest.raises(UnclipError) as caught:
    Tokenizer.from_gpt2(folder)
  assert name in str(caught.value) and DAMAGED[name, content] in str(caught.value)


def test_a_lone_surrogate_is_an_error(folder):
  entries = [*VOCAB]
  entries[3:3] = ['\ud800']
  (folder / 'vocab.json').write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
  with pytest.raises(UnclipError, match='lone surrogate'):
    Tokenizer.from_gpt2(folder)


CUT_SHORT = gzip.compress(b'{"a": 0}', mtime=0)[:-9]


@pytest.mark.parametrize(
  'content', [b'', b'no gzip', CUT_SHORT], ids=['empty', 'no gzip', 'cut short']
)
def test_a_damaged_packed_file_is_named(folder, content):
  (folder / 'vocab.json').unlink()
  (folder / 'vocab.json.gz').write_bytes(content)
  with pytest.raises(UnclipError, match=r'vocab\.json\.gz'):
    Tokenizer.from_gpt2(folder)
