"""What a model knows: its vocabulary as a file, as a list, as a sheet, and against prompts."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from known_words import KNOWN, add_vocabulary
from PIL import Image
from tiny_model import write_tiny_model

import unclip_jax
from experiments.emoji import captions
from experiments.emoji.compose import CaptionedEmoji, load_sprites
from experiments.emoji.domain import make_vocabulary
from unclip_jax import manipulate
from unclip_jax.cli import main
from unclip_jax.data.vocabulary import Vocabulary, split_words
from unclip_jax.demo.work import hint
from unclip_jax.images import make_sheet, read_text
from unclip_jax.systems.formats import read_vocabulary
from unclip_jax.systems.loading import DEFAULT_FOLDER
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import UnclipError

APPLE = 'a red apple, flat style'
FEW_STEPS = {
  'prior': unclip_jax.Sampling(2),
  'decoder': unclip_jax.Sampling(2),
  'num_candidates': 1,
  'size': 16,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  return add_vocabulary(write_tiny_model(tmp_path_factory.mktemp('model')), KNOWN.to_json())


@pytest.fixture(scope='module')
def model(folder):
  return unclip_jax.load(folder)


@pytest.fixture(autouse=True)
def _leave_the_cache_as_it_is(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  names = [name for name in jax.config.values if 'cache' in name]
  before = {name: jax.config.values[name] for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def info(*args: object) -> int:
  try:
    main(['info', *map(str, args)])
  except SystemExit as stop:
    return stop.code or 0
  return 0


def notices(model, prompts, **options) -> list[str]:
  """What is said of prompts; nothing is drawn."""
  with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
    warnings.simplefilter('always')
    patch.setattr(Unclip, '_run', lambda *_: None)
    model.sample(prompts, **options)
  assert all(notice.filename == __file__ for notice in caught), 'it points into the package'
  return [str(notice.message) for notice in caught]


# --- Words.


@pytest.mark.parametrize(('text', 'words'), [
  ('A Red  apple, FLAT style!', ['a', 'red', 'apple', 'flat', 'style']),
  ('a 3d t-rex on grey', ['a', '3d', 't', 'rex', 'on', 'grey']),
  ("the bird's-eye “view”", ['the', 'birds', 'eye', 'view']),
  ('a bird’s nest', ['a', 'birds', 'nest']),
  ('cre\u0302pe, りんご 🍎', ['crêpe', 'りんご', '🍎']),
  (' ,.-_ ', []),
  ('', []),
])  # fmt: skip
def test_a_text_is_split_into_words(text, words):
  assert split_words(text) == words


@pytest.mark.parametrize(('prompt', 'unseen'), [
  (APPLE, []),
  ('', []),
  ('A GRAY T-Rex; on... grey', []),
  ('apples, a berry, t-rexes', []),
  ('a zebra, a Zebra on a laptop', ['zebra', 'laptop']),
  ('red hot', ['hot']),
  ('appl', ['appl']),
])  # fmt: skip
def test_words_that_training_never_saw_are_found(prompt, unseen):
  assert KNOWN.unseen(prompt) == unseen


@pytest.mark.parametrize(('word', 'meant'), [
  ('rokcet', 'rocket'), ('appel', 'apple'), ('trex', 't-rex'), ('laptop', None), ('', None),
])  # fmt: skip
def test_a_slip_of_the_fingers_is_understood(word, meant):
  assert KNOWN.spelled_like(word) == meant


# --- The file.


def test_a_vocabulary_comes_out_of_its_file_as_it_went_in(folder, model):
  assert Vocabulary.load(folder / 'words.json') == KNOWN
  assert read_vocabulary(folder) == KNOWN
  assert model.vocabulary == KNOWN


@pytest.mark.parametrize(('content', 'message'), [
  ('{"lists":', 'is not valid JSON'),
  ('[' * 100_000, 'is not valid JSON'),
  ([], 'must be a JSON object of lists, prompt, words'),
  ({'words': []}, 'must be a JSON object of lists, prompt, words'),
  (KNOWN.to_json() | {'verbs': []}, 'must be a JSON object of lists, prompt, words'),
  (KNOWN.to_json() | {'lists': ['a']}, 'lists must be a JSON object'),
  (KNOWN.to_json() | {'lists': {'concepts': ['a']}}, 'lists has no styles'),
  (KNOWN.to_json() | {'lists': {'concepts': [], 'styles': ['a']}}, 'lists has no concepts'),
  (KNOWN.to_json() | {'lists': {'concepts': 'ab', 'styles': ['a']}}, "'concepts' must be a list"),
  (KNOWN.to_json() | {'words': {'a': 1}}, "'words' must be a list of texts"),
  (KNOWN.to_json() | {'words': ['a', 3]}, "'words' must be a list of texts"),
  (KNOWN.to_json() | {'words': ['a', ' ']}, "'words' must be a list of texts, none of them empty"),
  (KNOWN.to_json() | {'words': ['\x1b[2J']}, 'control characters'),
  (KNOWN.to_json() | {'prompt': 3}, 'prompt must be a text'),
  (KNOWN.to_json() | {'prompt': 'a picture'}, 'prompt must be a text with {concept}'),
])  # fmt: skip
def test_a_vocabulary_that_is_none_is_refused(content, message, tmp_path):
  text = content if isinstance(content, str) else json.dumps(content)
  (tmp_path / 'words.json').write_text(text, encoding='utf-8')
  with pytest.raises(UnclipError, match=message) as error:
    Vocabulary.load(tmp_path / 'words.json')
  assert 'words.json' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_model_with_a_broken_vocabulary_is_not_opened(tmp_path):
  add_vocabulary(write_tiny_model(tmp_path), {})
  with pytest.raises(UnclipError, match=r'words\.json: it must be a JSON object'):
    unclip_jax.load(tmp_path)


# --- Prompts.


def test_a_prompt_of_known_words_is_not_spoken_of(model):
  negative = {'negative_prompt': 'a grey rocket'}
  assert notices(model, [APPLE, 'apples on a T-rex'], **negative) == []
  assert notices(model, '', z_i=np.ones((1, model.config.clip.embed_dim))) == []


def test_words_never_seen_are_named_once_with_what_is_nearest(model):
  said = notices(model, [APPLE, 'a rokcet', 'laptop rokcet'], num_images=2)
  said = [notice for notice in said if 'was cut off' not in notice]
  assert said[0] == "'a rokcet': the model never saw 'rokcet'; the nearest it knows is 'rocket'"
  z_t = np.stack([model.encode_text(text)[0] for text in ('laptop', *KNOWN.concepts)])
  z_t /= np.linalg.norm(z_t, axis=1, keepdims=True)
  nearest = KNOWN.concepts[int((z_t[1:] @ z_t[0]).argmax())]
  assert said[1:] == [
    "'laptop rokcet': the model never saw 'laptop', 'rokcet'; the nearest it knows are "
    f"'{nearest}', 'rocket'"
  ]


def test_a_negative_prompt_is_spoken_of_too(model):
  (said,) = notices(model, APPLE, negative_prompt='a rokcet')
  assert said.startswith("'a rokcet': the model never saw 'rokcet'")


def test_both_captions_of_a_text_diff_are_spoken_of(model):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', UserWarning)
    manipulate.text_direction(model, 'a rokcet', 'a laptop')
    manipulate.text_direction(model, 'a laptop', 'a rokcet', 'dummy')
    manipulate.text_direction(model, 'a laptop', APPLE, 'none')
  lines = [str(one.message) for one in caught if 'was cut off' not in str(one.message)]
  # What was told from is named where it was read.
  assert [line.split(';')[0] for line in lines] == [
    "'a rokcet': the model never saw 'rokcet'",
    "'a laptop': the model never saw 'laptop'",
    "'a photo': the model never saw 'photo'",
    "'a rokcet': the model never saw 'rokcet'",
  ]
  assert {Path(one.filename).name for one in caught} == {Path(__file__).name}


def test_a_prompt_in_another_language_makes_one_short_line(model):
  text = ' '.join(f'{letter}{letter}qq' for letter in 'abcdefghijklmnopqrstuvwxyz')
  *cut, said = notices(model, text)
  assert "'eeqq' and 21 more; the nearest it knows are" in said
  assert '\n' not in said and len(said) < 300
  assert len(cut) == 1 and 'was cut off' in cut[0]


def test_a_prompt_with_unseen_words_is_drawn_as_by_a_model_that_says_nothing(model, tmp_path):
  silent = unclip_jax.load(write_tiny_model(tmp_path))
  assert silent.vocabulary is None
  assert notices(silent, 'a laptop') == []
  with pytest.warns(UserWarning, match="never saw 'laptop'"):
    ours = model.sample('a laptop', 7, 2, **FEW_STEPS)
  theirs = silent.sample('a laptop', 7, 2, **FEW_STEPS)
  np.testing.assert_array_equal(ours.images, theirs.images)
  np.testing.assert_array_equal(ours.z_i, theirs.z_i)


def test_the_command_line_says_it_in_one_line_and_draws(folder, tmp_path, capsys):
  options = ('--size', '16', '--no-cache', '--decoder-steps', '2', '--out', str(tmp_path))
  with pytest.raises(SystemExit) as stop:
    main(['generate', 'a rokcet', APPLE, '--model', str(folder), *options])
  assert not stop.value.code
  (line,) = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
  assert line == (
    "unclip-jax: warning: 'a rokcet': the model never saw 'rokcet'; the nearest it knows is "
    "'rocket'"
  )
  assert (tmp_path / 'a-rokcet-00.png').exists()


def test_a_page_hints_at_a_few_objects_and_at_lists_that_are_short():
  assert hint(None) == ''
  assert hint(KNOWN) == (
    'It knows 4 concepts such as berries, red apple, rocket, t-rex; styles: flat, 3d; '
    'colours: grey. `unclip-jax info --vocabulary` lists all.'
  )
  many = tuple(f'c{i}' for i in range(1001))
  shown = hint(dataclasses.replace(KNOWN, lists={**KNOWN.lists, 'concepts': many, 'long': many}))
  assert '1,001 concepts such as c0, c126' in shown and shown.count(', c') == 7
  assert 'long' not in shown


# --- Lists and sheets.


def test_lists_are_shown_with_their_lengths_and_wrapped_between_items(folder, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '24')
  assert info('--vocabulary', '--model', folder) == 0
  assert capsys.readouterr().out.splitlines() == [
    *('styles (2)', '  flat, 3d', ''),
    *('colours (1)', '  grey', ''),
    *('concepts (4)', '  berries, red apple,', '  rocket, t-rex'),
  ]


def test_concepts_can_be_restricted(folder, capsys):
  assert info('--vocabulary', '--matching', 'R', '--model', folder) == 0
  shown = capsys.readouterr().out
  assert "concepts with 'R' (4)" in shown
  assert info('--vocabulary', '--matching', 'RED', '--model', folder) == 0
  shown = capsys.readouterr().out
  assert "concepts with 'RED' (1)\n  red apple\n" in shown
  assert 'rocket' not in shown


def test_concepts_are_drawn_once_in_each_style(folder, model, tmp_path, capsys):
  path = tmp_path / 'new' / 'sheet.png'
  assert info('--vocabulary', '--matching', 'r', '--pictures', path, '--model', folder) == 0
  shown = capsys.readouterr()
  assert shown.out.splitlines()[-1] == str(path)
  assert shown.err.startswith('drawing 8 pictures\n')
  assert 'decoder: done' in shown.err
  assert 'upsampler' not in shown.err
  assert 'never saw' not in shown.err
  prompts = [f'{style} {concept}' for concept in KNOWN.concepts for style in KNOWN.styles]
  images = model.sample(prompts, size=16).images.reshape(4, 2, 16, 16, 3)
  with Image.open(path) as sheet:
    np.testing.assert_array_equal(
      np.asarray(sheet), make_sheet(images, KNOWN.concepts, 'from left to right: flat, 3d')
    )
  assert read_text(path)['prompt'].splitlines() == prompts


def test_a_sheet_holds_every_picture_enlarged_beside_its_label():
  images = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32, 3), np.uint8)
  sheet = make_sheet(images, ['ant', 'fork and knife with plate and spoon', 'owl'], 'flat, 3d')
  windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (64, 128))
  for group in images:
    wanted = np.concatenate(list(group), axis=1).repeat(2, axis=0).repeat(2, axis=1)[..., 0]
    found = (windows[:, :, 0] == wanted[0]).all(axis=-1)
    assert any((windows[tuple(place)] == wanted).all() for place in np.argwhere(found))
  blank = make_sheet(images, ['', '', ''], '')
  assert (make_sheet(images, ['ant', '', ''], '') != blank).any()


@pytest.mark.parametrize(('arguments', 'status', 'message'), [
  (('--matching', 'a'), 2, '--matching and --pictures go with --vocabulary'),
  (('--pictures', 'a.png'), 2, '--matching and --pictures go with --vocabulary'),
  (('--vocabulary', '--matching', 'kangaroo'), 1, "no concept contains 'kangaroo'"),
  (('--vocabulary', '--pictures', 'a.jpg'), 1, "'a.jpg': give the name of a file that ends in"),
  (('--vocabulary', '--pictures', '/proc/a.png'), 1, 'cannot write to the folder /proc'),
])  # fmt: skip
def test_wrong_options_are_named_before_anything_is_drawn(
  arguments, status, message, folder, capsys
):
  assert info(*arguments, '--model', folder) == status
  shown = capsys.readouterr()
  (line,) = shown.err.splitlines()
  assert line.startswith('unclip-jax: error: ')
  assert message in line


def test_a_model_without_a_vocabulary_says_so(tmp_path, capsys):
  write_tiny_model(tmp_path)
  assert info('--vocabulary', '--model', tmp_path) == 1
  shown = capsys.readouterr()
  assert shown.out == ''
  assert shown.err.startswith(f'unclip-jax: error: the model {tmp_path} has no vocabulary: ')
  assert len(shown.err.splitlines()) == 1


# --- Of the emoji.


def options_of_the_domain() -> dict:
  """Two styles, one group and two objects, as the embedded model has more of."""
  return {'styles': ['flat', '3d'], 'groups': ['food-drink'], 'labels': ['rocket', 't-rex']}


@pytest.mark.parametrize('domain', [options_of_the_domain(), dict.fromkeys(['styles', 'groups'])])
def test_every_caption_of_a_domain_is_of_known_words(domain):
  sprites = load_sprites()
  domain = {'labels': (), **domain}
  vocabulary = make_vocabulary(sprites, **domain)
  source = CaptionedEmoji(sprites, 8, 2000, seed=1, scene_fraction=0.3, **domain)
  for index in range(2000):
    caption = source.truth(index).caption
    missing = set(split_words(caption)) - vocabulary.words
    assert not missing, f'{caption!r} has {missing}'


def test_a_vocabulary_is_of_its_domain_alone():
  sprites = load_sprites()
  vocabulary = make_vocabulary(sprites, **options_of_the_domain())
  assert vocabulary.styles == ('flat', '3d')
  assert vocabulary.lists['colours'] == captions.COLOUR_NAMES
  assert vocabulary.lists['relations'] == captions.RELATIONS
  assert {'rocket', 't-rex', 'red apple'} <= set(vocabulary.concepts)
  assert 'zebra' not in vocabulary.concepts
  assert vocabulary.unseen('a twemoji zebra') == ['twemoji', 'zebra']
  held_out = set(sprites.label[sprites.split == 'val_concepts']) - set(
    sprites.label[sprites.split == 'train']
  )
  assert held_out and not held_out & set(vocabulary.concepts)
  everything = make_vocabulary(sprites, None, None, (), np.unique(sprites.split))
  assert held_out <= set(everything.concepts)


def test_the_embedded_model_knows_what_it_draws():
  vocabulary = read_vocabulary(DEFAULT_FOLDER)
  for prompt in ('a red apple, flat style', 'a rocket on a blue background', 'a 3d gray owl'):
    assert vocabulary.unseen(prompt) == []
  for concept in vocabulary.concepts:
    assert vocabulary.unseen(vocabulary.ask(concept, 'flat')) == []
  assert vocabulary.unseen('a laptop') == ['laptop']
