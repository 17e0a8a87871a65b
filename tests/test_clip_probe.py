"""A CLIP measured by itself: on a made one whose answers are known, and by the command."""

import json
import re

import numpy as np
import pytest
from commands import run
from PIL import Image
from tiny_model import write_tiny_model

from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.data.vocabulary import Vocabulary, split_words
from unclip_jax.systems.clip_probe import TEMPLATES, notices, probe
from unclip_jax.systems.feature_networks import ClipJudge, FeatureNetwork
from unclip_jax.types import UnclipError

COLOURS = {'dark_red': (150, 20, 20), 'green': (20, 150, 20), 'blue': (20, 20, 150)}


def encode(images):
  """The mean colour."""
  z = images.reshape(len(images), -1, 3).mean(axis=1)
  return np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))


def encode_text(texts):
  """A caption is of the colour whose name it ends in."""
  told = [
    COLOURS[f' {text}'.rstrip('.').rpartition(' a ')[2].strip().replace(' ', '_')] for text in texts
  ]
  return encode(np.array(told)[:, None, None])


JUDGE = ClipJudge(FeatureNetwork('clip', 'colours', 3, 8, '8 px', encode), encode_text)


def write(folder, counts, seed, noise=30, said=None):
  """Pictures in folders by their colours; those of `said` are of the next colour in truth."""
  draw = np.random.default_rng(seed)
  names = list(COLOURS)
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for i in range(count):
      is_odd = said is not None and i < said
      colour = COLOURS[names[(names.index(name) + is_odd) % 3]]
      level = np.clip(colour + draw.normal(0, noise, 3), 0, 255)
      Image.fromarray(np.full((5, 9, 3), level, np.uint8)).save(folder / name / f'{i:02d}.png')
  return folder


@pytest.fixture(scope='module')
def train(tmp_path_factory):
  return write(tmp_path_factory.mktemp('train'), dict.fromkeys(COLOURS, 12), 0)


def test_classes_are_told_by_prompts_and_learned(tmp_path, train):
  # One of five pictures of each class is of another colour in truth: nothing can get it right.
  source = write(tmp_path, dict.fromkeys(COLOURS, 5), 1, said=1)
  results = probe(PictureFolder(source), PictureFolder(train), JUDGE, ['a {}', '{}.'], batch_size=4)
  zero_shot, learned = results['figures']
  assert (zero_shot['figure'], zero_shot['count']) == ('zero-shot top 1', 15)
  assert zero_shot['value'] == learned['value'] == pytest.approx(0.8)
  assert zero_shot['settings'] == '3 classes, 2 templates'
  assert learned['figure'] == 'linear probe'
  assert learned['settings'].startswith('3 classes learned from 36 pictures, l2 ')
  for entry in results['figures']:
    assert (entry['features'], entry['resolution'], entry['resize']) == ('colours', 8, 'bicubic')


def test_captions_are_retrieved_both_ways(tmp_path):
  names = list(COLOURS)
  for i, name in enumerate([*names, *names[:2]]):  # two colours are there twice
    Image.fromarray(np.full((8, 8, 3), COLOURS[name], np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{i}.txt').write_text(name.replace('_', ' '))
  figures = probe(PictureFolder(tmp_path), None, JUDGE)['figures']
  found = {entry['figure']: entry['value'] for entry in figures}
  # Of two that are equally near, the one of another picture comes first: blue alone is found.
  assert found == {
    'captions of pictures, R@1': 0.2,
    'pictures of captions, R@1': 0.2,
  }
  assert {entry['settings'] for entry in figures} == {'among 5'}


def test_the_command_measures_a_clip(tmp_path, train, capsys):
  model = write_tiny_model(tmp_path / 'tiny')
  folder = write(tmp_path / 'pictures', dict.fromkeys(COLOURS, 4), 2)
  out = tmp_path / 'probe.json'
  args = ['probe', folder, '--train', train, '--model', model, '--json', out]
  assert run(*args, '--template', '{}', '--template', 'a {}.') == 0
  shown = capsys.readouterr().out
  figures = json.loads(out.read_text())['figures']
  assert [entry['figure'] for entry in figures] == ['zero-shot top 1', 'linear probe']
  for entry in figures:
    assert 0 <= entry['value'] <= 1 and entry['count'] == 12
    assert f'{entry["value"]:.4f}' in shown
  # Random weights tell colours apart, if not by name.
  assert figures[1]['value'] > 0.9
  assert '3 classes, 2 templates' in shown
  assert re.search(r'CLIP tiny [0-9a-f]{8}: 16 dimensions', shown)


def test_prompts_in_words_that_a_clip_never_saw_are_told(tmp_path):
  lists = {'styles': ('flat',), 'concepts': ('green',)}
  judge = JUDGE._replace(vocabulary=Vocabulary(lists, frozenset(split_words('a green of')), '{}'))
  results = probe(PictureFolder(write(tmp_path, {'green': 3, 'blue': 4}, 0)), None, judge)
  assert results['figures'][0]['settings'] == '2 classes, 1 template'
  (said,) = notices(results, judge, (*TEMPLATES, 'a large {}'))
  assert "words that the CLIP never saw, 'photo', 'large': give others" in said
  assert notices(results, judge, ['a {}']) == notices(results, JUDGE, TEMPLATES) == []
  assert notices({'figures': []}, judge, TEMPLATES) == []


def test_what_cannot_be_measured_is_named(tmp_path, train):
  one = PictureFolder(write(tmp_path / 'one', {'green': 3}, 0))
  two = PictureFolder(write(tmp_path / 'two', {'green': 3, 'blue': 4}, 0))
  three = PictureFolder(train)
  with pytest.raises(UnclipError, match='nothing to measure: put pictures into 2 folders'):
    probe(one, None, JUDGE)
  with pytest.raises(UnclipError, match='needs pictures in 2 folders or more'):
    probe(one, three, JUDGE)
  with pytest.raises(UnclipError, match='at least 5 pictures of a class'):
    probe(two, two, JUDGE)
  with pytest.raises(UnclipError, match='nothing to learn the class dark_red from'):
    probe(three, two, JUDGE)
  with pytest.raises(UnclipError, match=r"template 'a photo': it has no \{\}"):
    probe(two, None, JUDGE, ['a photo'])
