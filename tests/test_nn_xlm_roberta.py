"""XLM-RoBERTa by itself: its network, what its config may say, and what its tokenizer refuses."""

import base64
import dataclasses
import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import randomised

from unclip_jax.config_json import from_json, to_json
from unclip_jax.configs import XlmRobertaConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.xlm_roberta import XlmRoberta
from unclip_jax.types import UnclipError
from unclip_jax.weights import multilingual_clip
from unclip_jax.weights.safetensors import named_leaves

CONFIG = XlmRobertaConfig(
  vocab_size=29,
  context_length=7,
  width=15,
  depth=2,
  num_heads=3,
  mlp_width=22,
  num_positions=9,
  pad_id=1,
  embed_dim=5,
)
IDS = np.random.default_rng(0).integers(2, 29, (3, 7)).astype(np.int32)
MASK = np.arange(7)[None] < np.array([[7], [4], [2]])
IDS[~MASK] = CONFIG.pad_id


@pytest.fixture(scope='module')
def variables():
  shapes = jax.eval_shape(XlmRoberta(CONFIG).init, jax.random.key(0), IDS, MASK)
  return randomised(shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(config, dtype, variables, ids, mask):
  return XlmRoberta(config, dtype).apply(variables, ids, mask)


def run(variables, ids=IDS, mask=MASK, dtype=jnp.float32, **changes):
  return apply(dataclasses.replace(CONFIG, **changes), dtype, variables, ids, mask)


def test_shapes_and_types(variables):
  text = run(variables)
  assert text.states.shape == (3, 7, 15)
  assert text.z_t.shape == (3, 5)
  np.testing.assert_array_equal(text.ids, IDS)
  np.testing.assert_array_equal(text.mask, MASK)
  half = run(variables, dtype=jnp.bfloat16)
  assert (half.states.dtype, half.z_t.dtype) == (jnp.bfloat16, jnp.float32)
  for ours, other in ((text.states, half.states), (text.z_t, half.z_t)):
    assert 1e-4 < np.abs(np.asarray(ours) - np.asarray(other, 'f')).mean() / ours.std() < 3e-2
  names = {name for rule in multilingual_clip.rules(CONFIG, 'params.') for name in rule.ours}
  assert names == set(named_leaves(variables))


def test_padding_does_not_change_what_is_there(variables):
  text = run(variables)
  for row, length in ((1, 4), (2, 2)):
    alone = run(variables, IDS[row : row + 1, :length], MASK[row : row + 1, :length])
    np.testing.assert_allclose(alone.states[0], text.states[row, :length], atol=1e-5)
    np.testing.assert_allclose(alone.z_t[0], text.z_t[row], atol=1e-5)
  others = run(variables, np.where(MASK, IDS, 17))
  np.testing.assert_array_equal(others.z_t, text.z_t)
  np.testing.assert_array_equal(others.states[MASK], text.states[MASK])
  assert np.abs(others.states - text.states)[~MASK].max() > 0.1


def test_every_token_matters_everywhere(variables):
  text = run(variables)
  for place in (0, 3):
    changed = IDS.copy()
    changed[:2, place] = 2 + (changed[:2, place] + 1) % 27
    other = run(variables, changed)
    assert (np.abs(other.states - text.states)[:2].max(axis=2) > 1e-3).all()
    assert (np.abs(other.z_t - text.z_t)[:2].max(axis=1) > 1e-3).all()
    np.testing.assert_array_equal(other.states[2], text.states[2])
  # Two tokens in another order are another caption.
  swapped = run(variables, IDS[:, [1, 0, *range(2, 7)]])
  assert (np.abs(swapped.z_t - text.z_t).max(axis=1) > 1e-3).all()


def test_shapes_that_do_not_fit_are_errors(variables):
  with pytest.raises(ValueError, match='mask of shape'):
    run(variables, mask=MASK[:2])
  with pytest.raises(ValueError, match='both must be'):
    run(variables, IDS[0], MASK[0])
  with pytest.raises(ValueError, match='7 tokens do not fit into a context of 6'):
    run(variables, context_length=6)
  with pytest.raises(ValueError, match='9 positions, the first 3 without'):
    run(variables, pad_id=2)
  with pytest.raises(ValueError, match='4 heads do not divide a width of 15'):
    run(variables, num_heads=4)


LARGE = dataclasses.replace(CONFIG, context_length=77, num_positions=79)


def test_configs_come_back():
  assert from_json(XlmRobertaConfig, to_json(LARGE)) == LARGE
  values = multilingual_clip.write_config(LARGE)
  assert multilingual_clip.read_config(values, 'a file') == LARGE
  with pytest.raises(UnclipError, match='captions of 77 tokens, not of 7'):
    multilingual_clip.write_config(CONFIG)


@pytest.mark.parametrize(
  ('field', 'value', 'match'),
  [
    ('hidden_act', 'gelu_new', "hidden_act is 'gelu_new'"),
    ('model_type', 'xlm-roberta', "only 'M-CLIP'"),
    ('position_embedding_type', 'relative_key', 'position_embedding_type'),
    ('transformerDimensions', 16, 'transformerDimensions is 16: only 15'),
    ('imageDimensions', 6, 'imageDimensions is 6: only 5'),
    ('hidden_size', 15.5, 'not of type int'),
    ('num_attention_heads', 2, '2 heads do not divide a width of 15'),
    ('max_position_embeddings', 78, '78 positions'),
    ('is_decoder', True, "'is_decoder'"),
    ('add_cross_attention', True, "'add_cross_attention'"),
    ('rope_theta', 1e4, "'rope_theta'"),
  ],
)
def test_configs_that_ask_for_something_else_are_errors(field, value, match):
  values = multilingual_clip.write_config(LARGE) | {field: value}
  with pytest.raises(UnclipError, match=match) as caught:
    multilingual_clip.read_config(values, 'some/config.json')
  assert str(caught.value).startswith('some/config.json')


# ---- the tokenizer ----

WORDS = [(' ', -9.0), ('▁', -3.0), ('▁a', -2.5), ('▁red', -4.0), ('▁cat', -4.5), ('c', -5.0)]
WORDS += [('r', -5.5), ('e', -5.25), ('d', -5.75), ('<', -6.0), ('/', -6.5), ('s', -7.0)]
WORDS += [('>', -7.5), ('▁日本', -7.25)]
VOCAB = [('<s>', 0.0), ('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), *WORDS, ('<mask>', 0.0)]
RED_CAT = [0, 6, 7, 8, 2]


def json_fields(vocab=VOCAB):
  added = [{'id': 0, 'content': '<s>', 'special': True}]
  return {'added_tokens': added, 'model': {'type': 'Unigram', 'unk_id': 3, 'vocab': vocab}}


def varint(value):
  low, rest = value & 0x7F, value >> 7
  return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def message(*fields):
  """A protobuf message of pairs of a number and a value: bytes, a float or a whole number."""
  data = b''
  for number, value in fields:
    match value:
      case bytes():
        data += varint(number << 3 | 2) + varint(len(value)) + value
      case float():
        data += varint(number << 3 | 5) + struct.pack('<f', value)
      case int():
        data += varint(number << 3) + varint(value)
  return data


def piece(text, score=0.0, kind=1):
  return message((1, text.encode()), (2, score), *([(3, kind)] if kind != 1 else []))


PIECES = [piece('<unk>', kind=2), piece('<s>', kind=3), piece('</s>', kind=3)]
PIECES += [piece(*word) for word in WORDS]
TRAINER = message((1, b'a file'), (3, 1), (4, 8000), (10, 0.9995), (300, 2**40))


def model_bytes(pieces=tuple(PIECES), trainer=TRAINER, normalizer=b''):
  return message(*((1, each) for each in pieces), (2, trainer), (3, normalizer))


def write_json(folder, fields):
  (folder / 'tokenizer.json').write_text(json.dumps(fields), encoding='utf-8')
  return folder


def write_model(folder, data):
  (folder / 'sentencepiece.bpe.model').write_bytes(data)
  return folder


@pytest.fixture(params=['json', 'model'])
def tokenizer(request, tmp_path):
  if request.param == 'json':
    write_json(tmp_path, json_fields())
    write_model(tmp_path, b'not read, as there is tokenizer.json')
  else:
    write_model(tmp_path, model_bytes())
  return Tokenizer.from_xlm_roberta(tmp_path, 9)


def test_known_tokens(tokenizer):
  ids, mask = tokenizer.encode(['a  red\tcat', '', 'a cat \N{ROCKET}'])
  assert ids.dtype == np.int32
  assert mask.dtype == bool
  assert ids.tolist() == [[*RED_CAT, 1, 1, 1, 1], [0, 2, *[1] * 7], [0, 6, 8, 5, 3, 2, 1, 1, 1]]
  assert mask.sum(axis=1).tolist() == [5, 2, 6]
  assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (1, 2, len(VOCAB))
  assert tokenizer.decode(ids[0]) == tokenizer.normalise(' a  red\n\u3000cat') == 'a red cat'
  assert tokenizer.decode(ids[2]) == 'a cat'
  assert tokenizer.encode([]).ids.shape == (0, 9)


def test_special_words_in_a_prompt_are_text(tokenizer):
  ids = tokenizer.encode(['</s> a', ' <s>']).ids
  assert ids.tolist() == [[0, 5, 13, 14, 15, 16, 6, 2, 1], [0, 5, 13, 15, 16, 2, 1, 1, 1]]
  assert tokenizer.decode(ids[0]) == '</s> a'


def test_long_text_is_cut_and_the_cut_is_told(tokenizer):
  text = 'A cat, a red  red cat cat a cat 日本 red'
  ids, mask = tokenizer.encode([text])
  assert mask.all()
  assert ids[0, -1] == 2
  assert tokenizer.truncated('a cat a cat a cat cat 日本 red') == '日本 red'
  assert tokenizer.truncated('a cat a cat a cat cat') is None


def test_saved_equals_loaded(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'ours.json')
  loaded = Tokenizer.load(tmp_path / 'ours.json')
  loaded.save(tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == (tmp_path / 'ours.json').read_bytes()
  texts = ['a red cat', 'cat ' * 20, '</s> \N{ROCKET}']
  np.testing.assert_array_equal(loaded.encode(texts).ids, tokenizer.encode(texts).ids)


def test_scores_keep_their_last_bit(tmp_path):
  score = float(np.float32(-7.2373528480529785))  # one that the library reads as its neighbour
  vocab = [*VOCAB[:-1], ('▁prior', score), VOCAB[-1]]
  Tokenizer.from_xlm_roberta(write_json(tmp_path, json_fields(vocab))).save(tmp_path / 'ours.json')
  Tokenizer.load(tmp_path / 'ours.json').save(tmp_path / 'again.json')
  assert json.loads((tmp_path / 'again.json').read_text())['model']['vocab'][-2][1] == score


# NFKC of one character, the fullwidth a (bytes ef bd 81), as SentencePiece stores such a table: a
# trie in which the child of label c lies at its parent's base ^ c, here 0x100, 0x200 and 0x300.
TRIE = [0] * 0x400
TRIE[0] = 0x100 << 10
TRIE[0x100 ^ 0xEF] = (0x100 ^ 0xEF ^ 0x200) << 10 | 0xEF
TRIE[0x200 ^ 0xBD] = (0x200 ^ 0xBD ^ 0x300) << 10 | 0xBD
TRIE[0x300 ^ 0x81] = (0x300 ^ 0x81 ^ 0x310) << 10 | 1 << 8 | 0x81
TABLE = struct.pack('<I1024I', 4096, *TRIE) + b'a\0'
PRECOMPILED = {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(TABLE).decode()}
STRIP = {'type': 'Strip', 'strip_left': False, 'strip_right': True}
REPLACE = {'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': '▁'}


@pytest.mark.parametrize(
  'normalizer',
  [PRECOMPILED, {'type': 'Sequence', 'normalizers': [PRECOMPILED, STRIP, REPLACE]}, None],
)
def test_the_table_is_carried_along(tmp_path, normalizer):
  if normalizer is None:
    write_model(tmp_path, model_bytes(normalizer=message((1, b'nmt_nfkc'), (2, TABLE), (3, 1))))
  else:
    write_json(tmp_path, json_fields() | {'normalizer': normalizer})
  tokenizer = Tokenizer.from_xlm_roberta(tmp_path, 9)
  assert tokenizer.normalise(' ａ  red ') == 'a red'
  assert tokenizer.encode(['ａ red cat ']).ids[0, :5].tolist() == RED_CAT
  tokenizer.save_transformers(tmp_path / 'again')
  fields = json.loads((tmp_path / 'again' / 'tokenizer.json').read_text())
  assert fields['normalizer']['normalizers'][0] == PRECOMPILED
  assert [tuple(entry) for entry in fields['model']['vocab']] == VOCAB
  again = Tokenizer.from_xlm_roberta(tmp_path / 'again', 9)
  assert again.encode(['ａ </s>']).ids.tolist() == tokenizer.encode(['ａ </s>']).ids.tolist()


def fails(folder, match):
  with pytest.raises(UnclipError, match=match) as caught:
    Tokenizer.from_xlm_roberta(folder)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('length', [2, 513, 77.0, True, None])
def test_absurd_lengths_are_errors(tmp_path, length):
  with pytest.raises(UnclipError, match='choose 3 to 512'):
    Tokenizer.from_xlm_roberta(write_json(tmp_path, json_fields()), length)


def test_missing_files_are_errors(tmp_path):
  fails(tmp_path / 'nowhere', r'nowhere has neither tokenizer\.json nor sentencepiece')
  (tmp_path / 'tokenizer.json').mkdir()
  fails(tmp_path, r'cannot read .*tokenizer\.json')


@pytest.mark.parametrize('content', [b'{"a": 1', b'', b'[' * 200_000, b'{"\xff": 1}'])
def test_damaged_json_is_an_error(tmp_path, content):
  (tmp_path / 'tokenizer.json').write_bytes(content)
  fails(tmp_path, 'is not valid JSON')


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'model': None}, 'holds no unigram model'),
    ({'model': {'type': 'BPE', 'vocab': VOCAB}}, 'holds no unigram model'),
    ({'model': {'type': 'Unigram', 'vocab': {'a': 0}}}, 'holds no unigram model'),
    ({'added_tokens': [{'content': '<cat-toy>'}]}, '<cat-toy>'),
    ({'added_tokens': 3}, 'added_tokens is 3'),
    ({'normalizer': {'type': 'Lowercase'}}, 'Lowercase.* is not that of XLM-RoBERTa'),
    ({'normalizer': {'type': 'Sequence', 'normalizers': ['NFC']}}, 'NFC is not that'),
    ({'normalizer': PRECOMPILED | {'precompiled_charsmap': 'AAA'}}, 'precompiled_charsmap'),
    ({'normalizer': PRECOMPILED | {'precompiled_charsmap': 'AAAA'}}, 'Cannot parse'),
  ],
)
def test_other_tokenizers_are_errors(tmp_path, fields, match):
  fails(write_json(tmp_path, json_fields() | fields), match)


@pytest.mark.parametrize(
  ('vocab', 'match'),
  [
    ([], 'must begin with <s> <pad> </s> <unk> and end with <mask>'),
    (VOCAB[:-1], 'must begin with'),
    ([VOCAB[1], VOCAB[0], *VOCAB[2:]], 'must begin with'),
    ([*VOCAB[:-1], ('c', -1.0), VOCAB[-1]], "entry 18, 'c', is empty or there twice"),
    ([*VOCAB[:-1], ('', -1.0), VOCAB[-1]], "'', is empty"),
    ([*VOCAB[:-1], (' <s>', -1.0), VOCAB[-1]], "' <s>', is empty or there twice"),
    ([*VOCAB[:-1], ('x', float('nan')), VOCAB[-1]], "score of 'x' is nan"),
    ([*VOCAB[:-1], ('x', 10**400), VOCAB[-1]], "score of 'x' is inf"),
    ([*VOCAB[:-1], ('x', True), VOCAB[-1]], 'is no piece and score'),
    ([*VOCAB[:-1], 'x', VOCAB[-1]], 'is no piece and score'),
    ([*VOCAB[:-1], ('\ud800', -1.0), VOCAB[-1]], 'is no piece and score'),
  ],
)
def test_vocabularies_that_are_not_xlm_roberta_s_are_errors(tmp_path, vocab, match):
  fails(write_json(tmp_path, json_fields(vocab)), match)


@pytest.mark.parametrize(
  ('data', 'match'),
  [
    (b'', 'cut short'),
    (b'not a model', 'is no SentencePiece model'),
    (model_bytes()[:-1], 'cut short'),
    (model_bytes()[:-2], 'cut short'),
    (model_bytes()[:-30], 'cut short'),
    (message(*((1, each) for each in PIECES)), 'cut short'),
    (b'\x0b' + model_bytes(), 'begins no field'),
    (b'\xff' * 11, 'begins no field'),
    (message((1, 7)), 'is no SentencePiece model'),
    (model_bytes([*PIECES, message((1, b'\xff'))]), 'is no SentencePiece model'),
    (model_bytes([*PIECES, message((1, 3))]), 'is no SentencePiece model'),
    (model_bytes([*PIECES, message((1, b'x'), (2, b'no float'))]), 'is no SentencePiece model'),
    (model_bytes(trainer=message((3, 2))), 'holds no unigram model'),
    (model_bytes(normalizer=message((2, 3))), 'is no SentencePiece model'),
    (model_bytes(normalizer=message((2, b'a table'))), 'Cannot parse'),
    (model_bytes(PIECES[1:]), 'only its first three pieces'),
    (model_bytes([*PIECES, piece('<toy>', kind=4)]), 'only its first three pieces'),
    (model_bytes([*PIECES, piece('<0x00>', kind=6)]), 'only its first three pieces'),
    (model_bytes([*PIECES, piece('c')]), 'there twice'),
    (model_bytes([*PIECES, piece('x', float('inf'))]), "score of 'x' is inf"),
  ],
)
def test_damaged_models_are_errors(tmp_path, data, match):
  fails(write_model(tmp_path, data), match)


def test_no_cut_of_a_model_goes_unseen(tmp_path):
  data = model_bytes(normalizer=message((1, b'nfkc')))
  for length in range(len(data)):
    fails(write_model(tmp_path, data[:length]), r'sentencepiece\.bpe\.model is no Sentence')
