"""Kandinsky 2.1's text encoder against diffusers, and its tokenizer against transformers."""

import functools
import itertools
import json
import struct
import unicodedata

import jax
import numpy as np
import pytest
import tokenizers
import torch
import twins
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from safetensors.numpy import load_file, save_file
from test_clip_vocabulary import NASTY, VOCABULARY, make_texts
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaTokenizer
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from unclip_jax.configs import XlmRobertaConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.xlm_roberta import XlmRoberta
from unclip_jax.types import UnclipError
from unclip_jax.weights import multilingual_clip
from unclip_jax.weights.rules import read_params, write_tensors

TOLERANCE = 1e-5
POOLER = 'transformer.pooler.dense'

CONFIGS = {
  'three heads': XlmRobertaConfig(
    vocab_size=37,
    context_length=9,
    width=21,
    depth=3,
    num_heads=3,
    mlp_width=35,
    num_positions=13,
    pad_id=1,
    embed_dim=13,
  ),
  'one head, another padding': XlmRobertaConfig(
    vocab_size=11,
    context_length=5,
    width=10,
    depth=1,
    num_heads=1,
    mlp_width=7,
    num_positions=10,
    pad_id=4,
    embed_dim=17,
    num_token_types=2,
    epsilon=1e-2,
  ),
}
FOLDER = XlmRobertaConfig(
  vocab_size=23,
  context_length=77,
  width=15,
  depth=2,
  num_heads=5,
  mlp_width=31,
  num_positions=79,
  pad_id=1,
  embed_dim=7,
)


def make_twin(config, seed):
  twin = MultilingualCLIP(
    MCLIPConfig(
      transformerDimSize=config.width,
      imageDimSize=config.embed_dim,
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      num_hidden_layers=config.depth,
      num_attention_heads=config.num_heads,
      intermediate_size=config.mlp_width,
      max_position_embeddings=config.num_positions,
      type_vocab_size=config.num_token_types,
      layer_norm_eps=config.epsilon,
      pad_token_id=config.pad_id,
    )
  )
  return twins.randomise(twin, seed)


def make_inputs(config, batch):
  """Captions with no padding, with some and with much; one has padding within, one a mask."""
  rng = np.random.default_rng(batch)
  length = config.context_length
  ends = np.array([length, 2, length - 2, length, 3])[:batch, None]
  mask = np.arange(length)[None] < ends
  ids = rng.integers(0, config.vocab_size - 1, size=(batch, length))
  ids = np.where(mask, ids + (ids >= config.pad_id), config.pad_id).astype(np.int32)
  if batch > 2:
    ids[2, 1] = config.pad_id  # seen, but without a position
    mask[0, 1] = False  # has a position, but is not seen
  return ids, mask


def run_twin(twin, ids, mask):
  """The projected mean, the states of all positions, and every block's keys."""
  keys = []
  hooks = [
    layer.attention.self.key.register_forward_hook(lambda module, x, y: keys.append(y))
    for layer in twin.transformer.encoder.layer
  ]
  with torch.no_grad():
    outputs = twin(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
  for hook in hooks:
    hook.remove()
  return [*outputs, *keys]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, ids, mask):
  text, captured = XlmRoberta(config).apply(
    {'params': params}, ids, mask, capture_intermediates=lambda module, _: module.name == 'qkv'
  )
  keys = [
    captured['intermediates'][f'block_{i}']['qkv']['__call__'][0][:, :, 1]
    for i in range(config.depth)
  ]
  # Nothing depends on the bias of the keys, which softmax cancels: the keys are compared too.
  return [text.z_t, text.states, *(k.reshape(*k.shape[:2], -1) for k in keys)]


@functools.cache
def expected_shapes(config):
  ids = jax.ShapeDtypeStruct((1, config.context_length), 'int32')
  mask = jax.ShapeDtypeStruct(ids.shape, 'bool')
  return jax.eval_shape(XlmRoberta(config).init, jax.random.key(0), ids, mask)['params']


def convert(tensors, config):
  return twins.convert(tensors, multilingual_clip.rules(config), expected_shapes(config))


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('batch', [1, 5])
def test_encoder_agrees_with_diffusers(name, batch):
  config = CONFIGS[name]
  twin = make_twin(config, seed=batch)
  params = convert(twins.tensors_of(twin), config)
  inputs = make_inputs(config, batch)
  worst = twins.worst_deviation(run_ours(config, params, *inputs), run_twin(twin, *inputs))
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', CONFIGS)
def test_encoder_uses_every_tensor_of_diffusers_but_the_pooler(name):
  config = CONFIGS[name]
  twin = make_twin(config, seed=0)
  tensors, inputs = twins.tensors_of(twin), make_inputs(config, 3)
  expected, rules = run_twin(twin, *inputs), multilingual_clip.rules(config)

  def run(changed):
    merged = {**tensors, **changed}
    return run_ours(config, twins.lay_out(merged, rules, expected_shapes(config)), *inputs)

  unused = [name for name in tensors if name.startswith(POOLER)]
  assert unused == [f'{POOLER}.weight', f'{POOLER}.bias']
  used = {name: value for name, value in tensors.items() if name not in unused}
  twins.check_each_tensor_matters(used, run, expected, TOLERANCE)


def test_a_folder_of_diffusers_is_read_and_written_back(tmp_path):
  twin = make_twin(FOLDER, seed=0)
  twin.save_pretrained(tmp_path / 'theirs')
  values = json.loads((tmp_path / 'theirs' / 'config.json').read_text())
  config = multilingual_clip.read_config(values, 'theirs')
  assert config == FOLDER
  tensors = load_file(tmp_path / 'theirs' / 'model.safetensors')
  assert tensors.keys() == twins.tensors_of(twin).keys()
  # As older versions of transformers have written it.
  tensors['transformer.embeddings.position_ids'] = np.arange(79)[None]
  rules, ignored = multilingual_clip.rules(config), multilingual_clip.IGNORED
  params = read_params(twins.Tensors(tensors), rules, expected_shapes(config), 'theirs', ignored)
  again = tmp_path / 'again'
  again.mkdir()
  save_file(write_tensors(params, rules), again / 'model.safetensors', {'format': 'pt'})
  written = multilingual_clip.write_config(config)
  (again / 'config.json').write_text(json.dumps(written))
  opened = MultilingualCLIP.from_pretrained(again)
  for name, tensor in twin.state_dict().items():
    assert torch.equal(opened.state_dict()[name], tensor), name
  ids, mask = make_inputs(config, 5)
  for ours, theirs in zip(run_twin(opened, ids, mask), run_twin(twin, ids, mask), strict=True):
    assert torch.equal(ours, theirs)
  for values in (written, json.loads(opened.config.to_json_string(use_diff=False))):
    assert multilingual_clip.read_config(values, 'again') == config
  with pytest.raises(UnclipError, match='position_ids'):
    read_params(twins.Tensors(tensors), rules, expected_shapes(config), 'theirs')


def test_defaults_are_those_of_diffusers():
  theirs = MCLIPConfig().to_dict() | {'transformerDimensions': 768}  # theirs do not meet
  ours = multilingual_clip.read_config({}, 'an empty config')
  assert multilingual_clip.read_config(theirs, 'defaults') == ours
  written = multilingual_clip.write_config(ours)
  assert written.items() <= (theirs | {'architectures': ['MultilingualCLIP']}).items()


# ---- the tokenizer ----

SPECIAL = ('<s>', '<pad>', '</s>', '<unk>', '<mask>')
NUM_TEXTS = 700
CONTROL = ['<s>', 'a</s>b', '</s></s> <pad>', 'a <mask> of <unk>', '<pad>' * 99, '</S> <s', ' <s>']


def make_charsmap():
  """NFKC of some characters and compositions, white space as ' ', and some taken out.

  It is a double array (Aoe 1989) as darts-clone stores it: a child of label c lies at the parent's
  base ^ c, and label 0 holds a value, here where in the second part the replacement begins.
  """
  letters = [*map(chr, itertools.chain(range(0xA0, 0x180), range(0xFF01, 0xFFA0)))]
  letters += '①½ﬁﷺ㍿\u212b\u2126\u2003\u3000\u2028', 'e\u0301', 'q\u0307\u0323', 'か\u3099'
  letters = [text for part in letters for text in (part if '①' in part else [part])]
  table = {text: unicodedata.normalize('NFKC', text) for text in letters}
  table |= dict.fromkeys('\t\n\r\u200b\u00a0', ' ') | dict.fromkeys('\xad\x7f', '')
  replacements, trie = bytearray(), {}
  for key, replacement in table.items():
    node = trie
    for byte in key.encode():
      node = node.setdefault(byte, {})
    node[0] = len(replacements)
    replacements += replacement.encode() + b'\0'
  units, bases, free = {0: 0}, set(), 1

  def place(node, position):
    nonlocal free
    base = free
    while base in bases or any(base ^ label in units for label in node):
      base += 1
    bases.add(base)
    units[position] |= (position ^ base) << 10 | (0 in node) << 8
    units.update({base ^ label: label for label in node})
    for label, child in node.items():
      if label == 0:
        units[base] = child
      else:
        place(child, base ^ label)

  place(trie, 0)
  array = [units.get(i, 0) for i in range((max(units) | 255) + 1)]
  return struct.pack(f'<I{len(array)}I', 4 * len(array), *array) + bytes(replacements)


CHARSMAP = make_charsmap()


@pytest.fixture(scope='module')
def vocab():
  """Pieces and scores, as float32, with the special ones where XLM-RoBERTa has them."""
  unigram = tokenizers.Tokenizer(models.Unigram())
  unigram.normalizer = normalizers.Sequence([normalizers.Precompiled(CHARSMAP)])
  unigram.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme='always')]
  )
  trainer = trainers.UnigramTrainer(
    vocab_size=900, show_progress=False, special_tokens=['<unk>'], unk_token='<unk>'
  )
  unigram.train_from_iterator([VOCABULARY, VOCABULARY.upper(), VOCABULARY * 2], trainer)
  pieces = json.loads(unigram.to_str())['model']['vocab'][1:]
  words = [(piece, float(np.float32(score))) for piece, score in pieces if piece not in SPECIAL]
  # Of one score, for ties that are to be broken alike.
  words += [(piece, -9.5) for piece in ('aab', 'aba', 'baa') if piece not in dict(words)]
  return [*((name, 0.0) for name in SPECIAL[:-1]), *words, (SPECIAL[-1], 0.0)]


@pytest.fixture(scope='module')
def texts(vocab):
  few = list(itertools.islice(make_texts(seed=3), NUM_TEXTS))
  pieces = [piece for piece, _ in vocab[4:-1]]
  words = [' '.join(pieces[i : i + 25]) for i in range(0, len(pieces), 25)]
  ties = [''.join(letters) for letters in itertools.product('ab', repeat=9)]
  return [*NASTY, *few, *words, *ties]


@pytest.fixture(scope='module', params=[True, False], ids=['table', 'no table'])
def twin(vocab, request):
  return XLMRobertaTokenizer(vocab, _spm_precompiled_charsmap=CHARSMAP if request.param else None)


@pytest.fixture(scope='module')
def json_folder(twin, tmp_path_factory):
  folder = tmp_path_factory.mktemp('json')
  twin.save_pretrained(folder)
  return folder


@pytest.fixture(scope='module')
def model_folder(twin, vocab, tmp_path_factory):
  """What SentencePiece writes: its own special pieces first, with ids of its own."""
  folder = tmp_path_factory.mktemp('model')
  model = sentencepiece.ModelProto()
  for name, kind in (('<unk>', 2), ('<s>', 3), ('</s>', 3)):
    model.pieces.add(piece=name, score=0.0, type=kind)
  for piece, score in vocab[4:-1]:
    model.pieces.add(piece=piece, score=score)
  model.pieces[5].type = sentencepiece.ModelProto.SentencePiece.Type.UNUSED
  model.trainer_spec.model_type = sentencepiece.TrainerSpec.ModelType.UNIGRAM
  model.trainer_spec.vocab_size = len(model.pieces)
  model.trainer_spec.character_coverage = 0.9995
  model.trainer_spec.input.append('a corpus')
  model.normalizer_spec.name = 'nmt_nfkc'
  if twin.backend_tokenizer.normalizer is not None:
    model.normalizer_spec.precompiled_charsmap = CHARSMAP
  (folder / 'sentencepiece.bpe.model').write_bytes(model.SerializeToString())
  return folder


def encode(twin, texts):
  rows = twin(texts, padding='max_length', truncation=True, max_length=77, return_tensors='np')
  return rows.input_ids, rows.attention_mask.astype(bool)


def compare(texts, ours, theirs):
  for one, other in zip(ours, theirs, strict=True):
    wrong = np.flatnonzero((one != other).any(axis=1))
    assert not wrong.size, (texts[wrong[0]], one[wrong[0]], other[wrong[0]])


def test_the_table_normalises():
  normalizer = normalizers.Precompiled(CHARSMAP)
  assert normalizer.normalize_str('Ａｂ\u3000ﬁ①½\te\u0301\u212b\xad日') == 'Ab fi11⁄2 éÅ日'


@pytest.mark.parametrize('kind', ['json_folder', 'model_folder'])
def test_tokens_agree_with_transformers(kind, twin, texts, request, tmp_path):
  tokenizer, theirs = Tokenizer.from_xlm_roberta(request.getfixturevalue(kind)), encode(twin, texts)
  ours = tokenizer.encode(texts)
  compare(texts, ours, theirs)
  assert (tokenizer.vocab_size, tokenizer.context_length) == (len(twin), 77)
  assert (tokenizer.pad_id, tokenizer.end_id) == (twin.pad_token_id, twin.eos_token_id) == (1, 2)
  # The texts reach what they are to test.
  assert len(np.unique(ours.ids)) > 0.9 * len(twin)
  assert 0.1 < ours.mask.all(axis=1).mean() < 0.6
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = Tokenizer.load(tmp_path / 'tokenizer.json')
  compare(texts, loaded.encode(texts), theirs)
  loaded.save(tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == (tmp_path / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize('kind', ['json_folder', 'model_folder'])
def test_a_tokenizer_written_back_is_theirs(kind, twin, texts, request, tmp_path):
  tokenizer = Tokenizer.from_xlm_roberta(request.getfixturevalue(kind))
  tokenizer.save_transformers(tmp_path)
  assert tokenizer.transformers_class == 'XLMRobertaTokenizerFast'
  theirs = encode(twin, texts + CONTROL)
  for cls in (XLMRobertaTokenizer, PreTrainedTokenizerFast):
    again = cls.from_pretrained(tmp_path)
    assert again.special_tokens_map == twin.special_tokens_map
    assert (again.model_max_length, again.get_vocab()) == (77, twin.get_vocab())
    compare(texts + CONTROL, encode(again, texts + CONTROL), theirs)
  compare(texts, Tokenizer.from_xlm_roberta(tmp_path).encode(texts), encode(twin, texts))


def test_special_words_in_a_prompt_are_text(vocab, twin, json_folder):
  """As in SentencePiece, which cannot find them: here a twin in which they have other names."""
  names = [f'{i} {name}' for i, name in enumerate(SPECIAL)]
  renamed = [(name, 0.0) for name in names[:-1]] + vocab[4:-1] + [(names[-1], 0.0)]
  keys = 'bos_token', 'pad_token', 'eos_token', 'unk_token', 'mask_token'
  other = XLMRobertaTokenizer(
    renamed,
    sep_token=names[2],
    cls_token=names[0],
    **dict(zip(keys, names, strict=True)),
    _spm_precompiled_charsmap=CHARSMAP if twin.backend_tokenizer.normalizer is not None else None,
  )
  ours = Tokenizer.from_xlm_roberta(json_folder).encode(CONTROL)
  compare(CONTROL, ours, encode(other, CONTROL))
  assert (ours.ids == 2).sum(axis=1).tolist() == [1] * len(CONTROL)
  assert not np.array_equal(ours.ids, encode(twin, CONTROL)[0])  # there they are control


def test_decoded_text(twin, texts, json_folder):
  tokenizer = Tokenizer.from_xlm_roberta(json_folder)
  ids = tokenizer.encode(texts).ids
  decoded = twin.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  for text, row, theirs in zip(texts, ids, decoded, strict=True):
    assert tokenizer.decode(row) == theirs.strip(), repr(text)
