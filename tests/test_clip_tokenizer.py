import gzip
import hashlib
import json

import numpy as np
import pytest

from unclip_jax.data.clip_vocabulary import END, MERGES_FILE, START
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import UnclipError

START_ID, END_ID, BANG_ID = 49406, 49407, 0
CAT = [START_ID, 320, 1125, 539, 320, 2368, END_ID]  # OpenAI's README and transformers' tests
LONG = 'Café, 10\u2009km. \N{ROCKET} A\u030a! ' * 12
# What was written, what is read. The ids of OpenAI's simple_tokenizer.py are in KNOWN.
DECODED = {
  'A  Photo\tof a CAT': 'a photo of a cat',
  "it's 10!": "it 's 1 0 !",
  'Cafe\u0301': 'café',
  '日本語 \N{ROCKET}': '日本語 \N{ROCKET}',
  '</w>': '</ w >',
  '!\N{ROCKET}': '!\N{ROCKET}',
  'nul \x00': 'nul \x00',
  '': '',
  ' \n\u3000': '',
}
KNOWN = {
  'A  Photo\tof a CAT': [320, 1125, 539, 320, 2368],
  'hi!': [1883, 256],
  "it's 10!": [585, 568, 272, 271, 256],
  'a dog\u00a0and two cats': [320, 1929, 537, 1237, 3989],
}


@pytest.fixture(scope='module')
def clip() -> Tokenizer:
  return Tokenizer.clip()


@pytest.fixture(scope='module')
def merges() -> list[str]:
  return gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()


@pytest.fixture(scope='module')
def vocab(clip, tmp_path_factory) -> dict[str, int]:
  path = tmp_path_factory.mktemp('clip') / 'tokenizer.json'
  clip.save(path)
  return json.loads(path.read_text())['model']['vocab']


@pytest.fixture
def old_folder(tmp_path, vocab, merges):
  """As transformers 4 saved it: every file, special tokens in both of their forms."""
  write(tmp_path / 'vocab.json', vocab)
  (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')
  token = {'content': END, 'lstrip': False, 'normalized': True, 'special': True}
  config = {'bos_token': START, 'eos_token': token, 'unk_token': token, 'pad_token': END}
  write(tmp_path / 'tokenizer_config.json', config | {'model_max_length': 77})
  write(tmp_path / 'special_tokens_map.json', {'pad_token': token | {'content': '!'}})
  return tmp_path


@pytest.fixture
def new_folder(tmp_path, vocab, merges):
  """As transformers 5 saves it."""
  model = {'type': 'BPE', 'end_of_word_suffix': '</w>', 'vocab': vocab}
  model['merges'] = [merge.split() for merge in merges]
  write(tmp_path / 'tokenizer.json', {'added_tokens': [added(END)], 'model': model})
  config = {'bos_token': START, 'eos_token': END, 'pad_token': '!', 'model_max_length': 77}
  write(tmp_path / 'tokenizer_config.json', config)
  return tmp_path


def added(content):
  return {'id': END_ID, 'content': content, 'special': True}


def write(path, fields):
  path.write_text(json.dumps(fields), encoding='utf-8')


def change(path, **fields):
  """A JSON file with other fields; those that are ... are taken out."""
  merged = json.loads(path.read_text(encoding='utf-8')) | fields
  write(path, {key: value for key, value in merged.items() if value is not ...})


def same(one, other):
  names = ('vocab_size', 'context_length', 'pad_id', 'end_id')
  assert all(getattr(one, name) == getattr(other, name) for name in names)
  texts = [*DECODED, LONG, END, '! !?']
  for left, right in zip(one.encode(texts), other.encode(texts), strict=True):
    np.testing.assert_array_equal(left, right)
  assert [one.normalise(text) for text in texts] == [other.normalise(text) for text in texts]
  ids = one.encode(texts).ids
  assert [one.decode(row) for row in ids] == [other.decode(row) for row in ids]


def test_the_vocabulary_is_openai_s(vocab, merges):
  # Of lines 2 to 48,895 of its file, and of the keys of vocab.json in openai/clip-vit-large-patch14
  # by their ids, which end as follows.
  assert len(merges) == 49152 - 256 - 2
  assert merges[0] == 'i n'
  assert merges[-1] == 'jeky ll</w>'
  digest = hashlib.sha256('\n'.join(merges).encode()).hexdigest()
  assert digest == 'f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a'
  assert sorted(vocab.values()) == list(range(49408))
  ids = {'!': 0, '~': 93, 'Ġ': 220, '!</w>': 256, 'in': 512, 'th': 513, START: START_ID}
  assert {token: vocab[token] for token in ids} == ids
  assert MERGES_FILE.stat().st_size < 220_000


@pytest.mark.parametrize('text', KNOWN)
def test_known_ids(clip, text):
  ids, mask = clip.encode([text])
  assert ids[0][mask[0]].tolist() == [START_ID, *KNOWN[text], END_ID]


@pytest.mark.parametrize('pad_id', [BANG_ID, END_ID])
def test_padding_and_mask(pad_id):
  tokenizer = Tokenizer.clip(context_length=9, pad_id=pad_id)
  assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.context_length) == (pad_id, END_ID, 9)
  ids, mask = tokenizer.encode(['a photo of a cat', ''])
  assert ids.dtype == np.int32
  assert mask.dtype == bool
  assert ids.tolist() == [[*CAT, pad_id, pad_id], [START_ID, END_ID, *[pad_id] * 7]]
  assert mask.tolist() == [[True] * 7 + [False] * 2, [True] * 2 + [False] * 7]
  assert tokenizer.encode([]).ids.shape == (0, 9)


def test_long_text_ends_in_the_end_token():
  text = 'a photo of a cat'
  for length, expected in ((7, CAT), (6, [*CAT[:5], END_ID]), (3, [START_ID, 320, END_ID])):
    ids, mask = Tokenizer.clip(length).encode([text])
    assert ids.tolist() == [expected]
    assert mask.all()
  assert Tokenizer.clip(7).truncated(text) is None
  assert Tokenizer.clip(6).truncated(text) == 'cat'
  assert Tokenizer.clip(3).truncated(text) == 'photo of a cat'


@pytest.mark.parametrize('context_length', range(3, 24))
def test_what_is_kept_and_what_is_cut_make_the_text(context_length):
  tokenizer = Tokenizer.clip(context_length)
  ids = tokenizer.encode([LONG]).ids[0]
  kept, cut = tokenizer.decode(ids), tokenizer.normalise(tokenizer.truncated(LONG))
  # A character whose bytes are cut apart is on both sides.
  pieces = ''.join(kept.rstrip('\ufffd').split()), ''.join(cut.split())
  assert ''.join(pieces) == ''.join(tokenizer.normalise(LONG).split())


@pytest.mark.parametrize('text', DECODED)
@pytest.mark.parametrize('pad_id', [BANG_ID, END_ID])
def test_text_comes_back(text, pad_id):
  tokenizer = Tokenizer.clip(pad_id=pad_id)
  ids, mask = tokenizer.encode([text])
  assert tokenizer.decode(ids[0]) == DECODED[text]
  assert tokenizer.decode(ids[0][mask[0]][:-1]) == DECODED[text]


def test_normalise(clip):
  assert clip.normalise(' A\n\u00a0Cafe\u0301 ') == 'a café'


@pytest.mark.parametrize('text', [START, END, '<|ENDOFTEXT|>', f'a{END}b{START}', '!', 'a ! b'])
def test_special_words_in_a_prompt_are_text(clip, text):
  ids, mask = clip.encode([text])
  inner = ids[0][mask[0]][1:-1]
  assert len(inner)
  assert not np.isin(inner, [START_ID, END_ID, clip.pad_id]).any()
  assert ''.join(clip.decode(ids[0]).split()) == ''.join(text.lower().split())


@pytest.mark.parametrize('prompt', [None, 3, b'a cat', ['a cat'], 'lone \ud800'])
def test_what_is_no_text_is_an_error(clip, prompt):
  with pytest.raises(UnclipError, match='prompt'):
    clip.encode([prompt])


@pytest.mark.parametrize(('context_length', 'pad_id'), [(77, BANG_ID), (9, END_ID)])
def test_saved_equals_loaded(tmp_path, context_length, pad_id):
  tokenizer = Tokenizer.clip(context_length, pad_id)
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.json')
  same(loaded, tokenizer)
  assert (loaded.pad_id, loaded.context_length) == (pad_id, context_length)
  loaded.save(tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == (tmp_path / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize(
  'sections',
  [
    {'padding': None},
    {'post_processor': None},
    {'truncation': {'max_length': 76}},
    {'truncation': {'max_length': 2}, 'padding': {'strategy': {'Fixed': 2}}},
    {'padding': {'strategy': 'BatchLongest'}},
    {'padding': {'direction': 'Left'}},
    {'padding': {'pad_id': 49408}},
  ],
)
def test_files_that_do_not_make_rows_are_errors(clip, tmp_path, sections):
  path = tmp_path / 'tokenizer.json'
  clip.save(path)
  fields = json.loads(path.read_text())
  write(path, fields | {key: part and fields[key] | part for key, part in sections.items()})
  with pytest.raises(UnclipError, match='not one of ours'):
    Tokenizer.load(path)


def test_sizes_out_of_range_are_errors():
  for context_length in (2, 1025, True):
    with pytest.raises(UnclipError, match='context_length'):
      Tokenizer.clip(context_length)
  for pad_id in (-1, 49408):
    with pytest.raises(UnclipError, match='pad_id'):
      Tokenizer.clip(pad_id=pad_id)


def test_old_folder(old_folder, clip):
  # The map goes before a config that does not list its added tokens.
  same(Tokenizer.from_transformers(old_folder), clip)
  change(old_folder / 'tokenizer_config.json', added_tokens_decoder={END_ID: added(END)})
  same(Tokenizer.from_transformers(old_folder), Tokenizer.clip(pad_id=END_ID))
  (old_folder / 'special_tokens_map.json').unlink()
  change(old_folder / 'tokenizer_config.json', pad_token={'content': '!'}, model_max_length=16)
  same(Tokenizer.from_transformers(old_folder), Tokenizer.clip(context_length=16))


def test_new_folder(new_folder, clip):
  same(Tokenizer.from_transformers(new_folder), clip)
  change(new_folder / 'tokenizer_config.json', pad_token=None, model_max_length=int(1e30))
  same(Tokenizer.from_transformers(new_folder), Tokenizer.clip(pad_id=END_ID))
  (new_folder / 'vocab.json').write_text('not read, as there is tokenizer.json')
  fields = json.loads((new_folder / 'tokenizer.json').read_text())
  fields['model']['merges'] = [' '.join(pair) for pair in fields['model']['merges']]
  write(new_folder / 'tokenizer.json', fields)
  same(Tokenizer.from_transformers(new_folder), Tokenizer.clip(pad_id=END_ID))


def test_header_and_line_ends_of_merges(old_folder, merges, clip):
  path = old_folder / 'merges.txt'
  path.write_bytes('\r\n'.join(['"bpe_simple#version: 0.2', *merges]).encode())
  same(Tokenizer.from_transformers(old_folder), clip)
  path.write_bytes('\n'.join(merges).encode())
  same(Tokenizer.from_transformers(old_folder), clip)


def test_a_smaller_vocabulary(old_folder, vocab, merges):
  """What checkpoints for tests have; the ids are the file's, not OpenAI's."""
  tokens = [START, END, *list(vocab)[:512], *(merge.replace(' ', '') for merge in merges[:9])]
  write(old_folder / 'vocab.json', {token: index for index, token in enumerate(tokens)})
  (old_folder / 'merges.txt').write_text('\n'.join(merges[:9]), encoding='utf-8')
  tokenizer = Tokenizer.from_transformers(old_folder)
  assert (tokenizer.vocab_size, tokenizer.end_id) == (523, 1)
  assert tokenizer.pad_id == tokens.index('!')
  ids, mask = tokenizer.encode(['the'])
  assert [tokens[index] for index in ids[0][mask[0]]] == [START, 'the</w>', END]


@pytest.mark.parametrize('name', ['vocab.json', 'merges.txt', 'tokenizer_config.json'])
def test_missing_files_are_errors(old_folder, name):
  (old_folder / name).unlink()
  fails(old_folder, f'{name} is missing')


def test_a_missing_folder_is_an_error(tmp_path):
  fails(tmp_path / 'nowhere', r'nowhere.vocab\.json is missing')
  (tmp_path / 'tokenizer.json').mkdir()
  fails(tmp_path, r'cannot read .*tokenizer\.json')


@pytest.mark.parametrize('name', ['vocab.json', 'tokenizer_config.json', 'special_tokens_map.json'])
@pytest.mark.parametrize(
  ('content', 'match'),
  [
    (b'{"a": 1', 'is not valid JSON'),
    (b'[]', 'is not a JSON object'),
    (b'', 'is not valid JSON'),
    (b'[' * 200_000, 'is not valid JSON'),
    (b'{"\xff": 1}', 'is not UTF-8'),
  ],
)
def test_damaged_json_is_an_error(old_folder, name, content, match):
  (old_folder / name).write_bytes(content)
  fails(old_folder, f'{name} {match}')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({START: ...}, r'lacks <\|startoftext\|>'),
    ({END: ...}, r'lacks <\|endoftext\|>'),
    ({'a</w>': ...}, "lacks the byte 'a</w>'"),
    ({'<new>': 49409}, 'must be 0 to 49408'),
    ({'<new>': 7}, 'must be 0 to 49408'),
    ({'<new>': -1}, 'must be 0 to 49408'),
    ({'cat': ...}, 'must be 0 to 49406'),
    ({'<new>': '49408'}, 'must name tokens and their ids'),
    ({'<new>': True}, 'must name tokens and their ids'),
    ({'\ud800': 49408}, 'lone surrogate'),
  ],
)
def test_vocabularies_that_are_not_clip_s_are_errors(old_folder, fields, match):
  change(old_folder / 'vocab.json', **fields)
  fails(old_folder, rf'vocab\.json.*{match}')


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    ('#version: 0.2\n', 'holds no merges'),
    ('', 'holds no merges'),
    ('i n\nq qqq\n', "merge 2, 'q' 'qqq', does not fit"),
    ('i n\nin\n', "merge 2, 'in' '', does not fit"),
    ('i n t\n', "merge 1, 'i n t' '', does not fit"),
    ('z \N{ROCKET}\n', 'merge 1, .* does not fit'),
    ('z qqz\n', 'merge 1, .* does not fit'),
    ('z !\n', 'merge 1, .* does not fit'),  # both sides are there, 'z!' is not
  ],
)
def test_merges_that_do_not_fit_are_errors(old_folder, content, match):
  (old_folder / 'merges.txt').write_text(content, encoding='utf-8')
  fails(old_folder, rf'merges\.txt.*{match}')


@pytest.mark.parametrize('length', [..., None, 2, 0, -77, 1025, 77.0, '77', True, [77]])
def test_absurd_lengths_are_errors(old_folder, length):
  change(old_folder / 'tokenizer_config.json', model_max_length=length)
  fails(old_folder, r'tokenizer_config\.json: model_max_length is ')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'pad_token': '[PAD]'}, r"padding '\[PAD\]' is not in the vocabulary"),
    ({'pad_token': {'content': '[PAD]'}}, r"padding '\[PAD\]' is not in the vocabulary"),
    ({'pad_token': 3}, '3 is no special token'),
    ({'bos_token': '<s>'}, "special token '<s>'"),
    ({'additional_special_tokens': [{'content': '<style>'}]}, "special token '<style>'"),
    ({'extra_special_tokens': {'image_token': '<image>'}}, "special token '<image>'"),
    ({'added_tokens_decoder': {'49408': added('<cat-toy>')}}, "special token '<cat-toy>'"),
  ],
)
def test_special_tokens_that_clip_lacks_are_errors(old_folder, fields, match):
  (old_folder / 'special_tokens_map.json').unlink()
  change(old_folder / 'tokenizer_config.json', **fields)
  fails(old_folder, match)


def test_added_tokens_are_errors(old_folder, new_folder):
  fields = json.loads((new_folder / 'tokenizer.json').read_text())
  write(new_folder / 'tokenizer.json', fields | {'added_tokens': [added('<cat-toy>')]})
  fails(new_folder, "special token '<cat-toy>'")
  (new_folder / 'tokenizer.json').unlink()
  write(old_folder / 'added_tokens.json', {'<dog-toy>': 49408})
  fails(old_folder, "special token '<dog-toy>'")


@pytest.mark.parametrize(
  'fields', [{'model': ...}, {'model': None}, {'model': {'type': 'BPE', 'vocab': {}, 'merges': []}}]
)
def test_other_tokenizers_are_errors(new_folder, fields):
  change(new_folder / 'tokenizer.json', **fields)
  fails(new_folder, r'tokenizer\.json holds no BPE')


def fails(folder, match):
  with pytest.raises(UnclipError, match=match) as caught:
    Tokenizer.from_transformers(folder)
  assert '\n' not in str(caught.value)
