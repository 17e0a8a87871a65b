"""The tokens of CLIP, against transformers' CLIPTokenizer, on text of many scripts."""

import gzip
import json
import random
import unicodedata

import numpy as np
import pytest
from transformers import CLIPTokenizer

from unclip_jax.data.clip_vocabulary import MERGES_FILE
from unclip_jax.data.tokenizer import Tokenizer

START, END = '<|startoftext|>', '<|endoftext|>'
PADS = {'!': 0, END: 49407}
MERGES = gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# Which letter stands for which byte: OpenAI's bytes_to_unicode.
LETTERS = {chr(byte): byte for byte in VISIBLE}
LETTERS |= {chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*VISIBLE}))}
NUM_TEXTS = 4000
VOCABULARY = """
a an the of photo cat dogs street oil painting 4k hdr trending rocket surrealism rock'n'roll
ISN'T it's IT'S they'll we've I'm you'd we're it\u2019s 's 'S '\u017f 'LL'VE ''re
Straße STRASSE naïve \u0130stanbul \u0131slak ΣΊΣΥΦΟΣ ὈΔΥΣΣΕΎΣ \u01c4 \u01c5 \ufb01\ufb02 \u1e9e
\u212a \u212b \u2126 красное яблоко भारत ক্ষ தமிழ் ประเทศไทย မြန်မာ ខ្មែរ שָׁלוֹם مُحَمَّد 한국어 日本語
中文 \uff76\uff9e \u304b\u3099 1984 ½ ² Ⅷ ٣٤ ४५ ①② 𝟘𝟙 3.14 1,000 10km #1 @home
http://a.b/c?d=e&f=%20 &amp; <b> </w> a</w>b \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467
\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1eb\U0001f1f7 \u2603\ufe0f \U0001f3f4\U000e0067\U000e007f
... ?!?! --- ___ $$$ :-) (^_^) … “” «» ‽ *** ~~ \\ '' ""
"""
WORDS = VOCABULARY.split()
SPACES = ' ', '  ', '\t', '\r\n', '\v\f', '\x1c\x1f', '\x85', '\xa0', '\u2003', '\u2028', '\u3000'
ODD = (  # invisible and combining characters
  '\u200b\u200c\u200d\u2060\ufeff\xad\u180e\u202e\u2066\ufe0f\u034f\x00\x07\x7f\x1b'
  '\u0301\u0300\u0327\u0323\u0345\u0307\u0315\u05b4\u0651\u093c\u3099\u1161\u20dd'
)
RANGES = (  # of code points, surrogates left out
  *((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE00), (0x1100, 0x1200)),
  *((0x1E00, 0x2000), (0x2000, 0x2C00), (0x3040, 0x3400), (0xAC00, 0xD7A4), (0xF900, 0x10000)),
  *((0x10000, 0x11000), (0x1D400, 0x1D800), (0x1F300, 0x1FB00), (0x80, 0xD800), (0xE000, 0x110000)),
)
NASTY = (
  *('', ' ', '\n', "'", "''s", "'s's", "s's", '!', '!!', '! !', 'a!b', '!\N{ROCKET}', '</w>'),
  *('x' * 20_000, '1' * 500, '!' * 500, '\N{ROCKET}' * 99, 'a\u0301' * 300, '\u0301' * 99),
  *('\u1e9b\u0323', '\u0958', '\u212b', '\ufb01', '\u03a3', 'A\u03a3', '\u0130', 'I\u0307'),
  *('\ufdfa', '\U0010ffff', '\ufffe', '\ufffd', '\x00', 'a\x00b', 'a\u200bb', '\ufeffa', 'e\u200d'),
  *('a photo of a cat', ' a  photo\tof\na\u3000cat ', 'A PHOTO OF A CAT', 'a ' * 74, 'a ' * 75),
  *('a ' * 76, 'a ' * 999, '\u1100\u1161\u11a8', '\ud7a3\u11a8', 'q\u0307\u0323', '\x1ca\x1f'),
)
CONTROL = [START, END, f'a{END}b', f'{END}{END} {START}', '<|ENDOFTEXT|>', END * 99, 'a cat! !']


def make_texts(seed):
  """Texts of one to a hundred parts, half of them of one script and half mixed."""
  draw = random.Random(seed)
  for index in range(NUM_TEXTS):
    ranges = RANGES if index % 2 else [draw.choice(RANGES)]
    words, odd = draw.choice(((1, 0), (0.5, 0), (0.2, 0.2), (0, 0)))  # shares of the parts
    text = ''
    for _ in range(draw.choice((1, 3, 9, 27, 100))):
      chance = draw.random()
      if chance < words:
        part = draw.choice(WORDS)
      elif chance < words + odd:
        part = draw.choice(ODD)
      else:
        low, high = draw.choice(ranges)
        part = ''.join(chr(draw.randrange(low, high)) for _ in range(draw.choice((1, 2, 5))))
      part = draw.choice((str, str, str.upper, str.title, lambda part: part * 3))(part)
      form = draw.choice((None, None, None, 'NFD', 'NFKD'))
      text += unicodedata.normalize(form, part) if form else part
      text += draw.choice(SPACES) if draw.random() < 0.6 else ''
    yield text


def make_entries():
  """What the entries of the vocabulary stand for, in texts that are not cut."""
  tokens = [merge.replace(' ', '').removesuffix('</w>') for merge in MERGES]
  words = [bytes(LETTERS[letter] for letter in token).decode(errors='ignore') for token in tokens]
  for start in range(0, len(words), 25):
    yield ' '.join(words[start : start + 25])


TEXTS = [*NASTY, *make_texts(seed=0), *make_entries()]
ALL_TEXTS = [*TEXTS, *CONTROL]


@pytest.fixture(scope='module', params=PADS)
def pad(request):
  return request.param


@pytest.fixture(scope='module')
def old_folder(pad, tmp_path_factory):
  """vocab.json and merges.txt from the shipped merges, by the steps of OpenAI's tokenizer."""
  folder = tmp_path_factory.mktemp('old')
  tokens = [*LETTERS, *(letter + '</w>' for letter in LETTERS)]
  tokens += [*(merge.replace(' ', '') for merge in MERGES), START, END]
  vocab = {token: index for index, token in enumerate(tokens)}
  (folder / 'vocab.json').write_text(json.dumps(vocab), encoding='utf-8')
  lines = ['#version: 0.2', *MERGES, '']
  (folder / 'merges.txt').write_text('\n'.join(lines), encoding='utf-8')
  config = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77, 'pad_token': pad}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def twin(old_folder):
  return CLIPTokenizer.from_pretrained(old_folder)


@pytest.fixture(scope='module')
def text_only(twin):
  """The tokens where the words for control are text, as they are in ours."""
  return encode(twin, ALL_TEXTS, split_special_tokens=True)


def encode(twin, texts, **options):
  rows = twin(texts, padding='max_length', truncation=True, return_tensors='np', **options)
  return rows.input_ids, rows.attention_mask.astype(bool)


def compare(texts, ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    assert one.shape == other.shape
    wrong = np.flatnonzero((one != other).any(axis=1))
    assert not wrong.size, (texts[wrong[0]], one[wrong[0]], other[wrong[0]])


def test_shipped_vocabulary(pad, text_only):
  ours = Tokenizer.clip(pad_id=PADS[pad]).encode(ALL_TEXTS)
  compare(ALL_TEXTS, ours, text_only)
  # The texts reach what they are to test.
  assert len(np.unique(ours.ids)) > 35_000
  assert 0.1 < ours.mask.all(axis=1).mean() < 0.6


def test_vocab_and_merges(old_folder, text_only, tmp_path):
  tokenizer = Tokenizer.from_transformers(old_folder)
  compare(ALL_TEXTS, tokenizer.encode(ALL_TEXTS), text_only)
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.json')
  compare(ALL_TEXTS, loaded.encode(ALL_TEXTS), text_only)


def test_tokenizer_json(twin, text_only, tmp_path):
  twin.save_pretrained(tmp_path)
  assert not (tmp_path / 'vocab.json').exists()
  tokenizer = Tokenizer.from_transformers(tmp_path)
  compare(ALL_TEXTS, tokenizer.encode(ALL_TEXTS), text_only)


def test_a_name_for_no_length(old_folder, twin, tmp_path):
  """A length that nobody gave is saved as 1e30."""
  twin = CLIPTokenizer.from_pretrained(old_folder, model_max_length=None)
  twin.save_pretrained(tmp_path)
  assert json.loads((tmp_path / 'tokenizer_config.json').read_text())['model_max_length'] > 1e20
  assert Tokenizer.from_transformers(tmp_path).context_length == 77


def test_only_special_words_differ(pad, twin):
  """transformers by itself, on texts that do not hold what pads, starts or ends."""
  texts = [text for text in TEXTS if pad not in text]
  assert len(texts) > 2000
  compare(texts, Tokenizer.clip(pad_id=PADS[pad]).encode(texts), encode(twin, texts))


def test_special_words_do_differ(pad, twin):
  """The one difference that is meant: no text of ours is control."""
  ours, (theirs, _) = Tokenizer.clip(pad_id=PADS[pad]).encode(CONTROL).ids, encode(twin, CONTROL)
  assert theirs[0, :3].tolist() == [49406, 49406, 49407]
  assert (ours == 49406).sum(axis=1).tolist() == [1] * len(CONTROL)
  if pad == '!':
    # The 'a cat! !': OpenAI's code also has the word '!' (256), not the padding, there.
    assert ours[-1, :6].tolist() == [49406, 320, 2368, 256, 256, 49407]
    assert theirs[-1, :6].tolist() == [49406, 320, 2368, 0, 0, 49407]


def test_decoded_text(pad, twin):
  # transformers drops what pads also from within a text, and a '</w>' that somebody wrote.
  dropped = ('</w>', '</W>', *('!' if pad == '!' else ''))
  texts = [text for text in TEXTS if not any(word in text for word in dropped)]
  assert len(texts) > 2000
  tokenizer = Tokenizer.clip(pad_id=PADS[pad])
  ids = tokenizer.encode(texts).ids
  decoded = twin.batch_decode(ids, skip_special_tokens=True)
  for text, row, theirs in zip(texts, ids, decoded, strict=True):
    assert tokenizer.decode(row) == theirs, repr(text)


def test_normalised_text(twin):
  tokenizer = Tokenizer.clip()
  for text in TEXTS:
    theirs = twin.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.normalise(text) == theirs.strip(' '), repr(text)
