import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from experiments.emoji import captions, compose, vocabulary
from experiments.emoji.concepts import SPLITS
from unclip_jax.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from unclip_jax.types import UnclipError

SHIPPED = Path(vocabulary.__file__).parent / 'tokenizer.json'
TEXTS = ['a red apple, flat style', 'a rocket on a blue background', 'a cat left of a rocket'] * 4


@pytest.fixture(scope='module')
def tokenizer() -> Tokenizer:
  return Tokenizer.train(TEXTS, vocab_size=300, context_length=16)


@pytest.mark.parametrize(
  'text',
  [
    '',
    'a red apple',
    'ein grüner Apfel',
    'красное яблоко',
    'تفاحة حمراء',
    '赤いりんご',
    '\N{RED APPLE}\N{ZERO WIDTH JOINER}\N{ROCKET}',
    'nul \x00 and bell \x07',
    '<end> and <pad>',
    '\U0010ffff',
  ],
)
def test_any_text_comes_back(text):
  shipped = Tokenizer.load(SHIPPED)
  decoded = shipped.decode(_kept(shipped, text))
  assert decoded == unicodedata.normalize('NFC', text.lower())


def test_equal_texts_have_equal_tokens(tokenizer):
  ids = tokenizer.encode(['Caf\u00e9  au\tlait ', 'cafe\u0301 au lait']).ids
  np.testing.assert_array_equal(ids[0], ids[1])
  assert tokenizer.normalise(' A\n\u00a0B ') == 'a b'


def test_ends_and_padding(tokenizer):
  ids, mask = tokenizer.encode(['a red apple', ''])
  assert ids.shape == mask.shape == (2, tokenizer.context_length)
  assert ids.dtype == np.int32
  assert mask.dtype == bool
  for row, used in zip(ids, mask.sum(axis=1), strict=True):
    assert row[used - 1] == tokenizer.end_id
    assert (row[used:] == tokenizer.pad_id).all()
    assert tokenizer.end_id not in row[: used - 1]
  assert mask[1].sum() == 1


def test_special_words_in_a_prompt_are_text(tokenizer):
  ids = tokenizer.encode(['<end> a <pad>']).ids[0]
  assert (ids == tokenizer.end_id).sum() == 1
  assert ids[0] not in (tokenizer.end_id, tokenizer.pad_id)


def test_long_text_is_cut_and_the_cut_is_told(tokenizer):
  text = 'A red apple, flat style. ' * 6
  ids, mask = tokenizer.encode([text])
  assert mask.all()
  assert ids[0, -1] == tokenizer.end_id
  cut = tokenizer.truncated(text)
  assert text.strip().endswith(cut)
  kept = tokenizer.decode(ids[0][:-1])
  assert ''.join((kept + cut.lower()).split()) == ''.join(text.lower().split())
  assert tokenizer.truncated('a red apple') is None


def test_batch_size_changes_nothing(tokenizer):
  together = tokenizer.encode(TEXTS).ids
  alone = np.concatenate([tokenizer.encode([text]).ids for text in TEXTS])
  np.testing.assert_array_equal(together, alone)
  assert tokenizer.encode([]).ids.shape == (0, tokenizer.context_length)


def test_saved_equals_loaded(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.json')
  texts = [*TEXTS, '<end>', 'x' * 99]
  np.testing.assert_array_equal(tokenizer.encode(texts).ids, loaded.encode(texts).ids)
  names = ('vocab_size', 'context_length', 'pad_id', 'end_id')
  assert all(getattr(tokenizer, name) == getattr(loaded, name) for name in names)
  assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.json']


def test_training_is_deterministic(tokenizer, tmp_path):
  for name in ('a', 'b'):
    Tokenizer.train(TEXTS, 300, 16).save(tmp_path / name)
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


@pytest.mark.parametrize('prompt', [None, 3, b'a cat', ['a cat'], 'lone \ud800'])
def test_what_is_no_text_is_an_error(tokenizer, prompt):
  with pytest.raises(UnclipError, match='prompt'):
    tokenizer.encode([prompt])


def test_bad_files_are_errors(tokenizer, tmp_path):
  path = tmp_path / 'tokenizer.json'
  with pytest.raises(UnclipError, match=r'tokenizer\.json is missing'):
    Tokenizer.load(path)
  tokenizer.save(path)
  whole = path.read_text()
  path.write_text(whole[:-100])
  with pytest.raises(UnclipError, match=r'tokenizer\.json cannot be read'):
    Tokenizer.load(path)
  path.write_text(json.dumps(json.loads(whole) | {'truncation': None}))
  with pytest.raises(UnclipError, match='context length'):
    Tokenizer.load(path)
  with pytest.raises(UnclipError, match='cannot be written'):
    tokenizer.save(tmp_path / 'missing' / 'tokenizer.json')


@pytest.mark.parametrize(('vocab_size', 'context_length'), [(257, 16), (4097, 16), (300, 1)])
def test_sizes_out_of_range_are_errors(vocab_size, context_length):
  with pytest.raises(UnclipError, match='choose'):
    Tokenizer.train(TEXTS, vocab_size, context_length)


def test_shipped_tokenizer_holds_the_captions():
  shipped = Tokenizer.load(SHIPPED)
  assert shipped.vocab_size <= MAX_VOCAB_SIZE
  source = compose.CaptionedEmoji(compose.load_sprites(), 8, 1500, seed=5, splits=SPLITS)
  texts = [source.truth(index).caption for index in range(len(source))]
  assert not any(shipped.truncated(text) for text in texts)
  for word in (*captions.COLOUR_NAMES, 'flat', '3d', 'noto', 'twemoji', 'background', 'style'):
    assert shipped.encode([word]).mask.sum() <= 3, word


def _kept(tokenizer: Tokenizer, text: str) -> list[int]:
  ids, mask = tokenizer.encode([text])
  return [int(token) for token in ids[0][mask[0]] if token != tokenizer.end_id]
