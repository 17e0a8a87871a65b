"""The scripts of the paper's figures: what they begin from, and where pictures and words stand."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from made_pictures import pixels
from PIL import Image
from tiny_model import CONFIG, TEXTS, write_tiny_model

from experiments.figures import (
  common,
  edits,
  guidance,
  interpolations,
  pca,
  text_diffs,
  typographic_attack,
  variations,
)
from experiments.figures.__main__ import FIGURES
from experiments.figures.typographic_attack import write
from unclip_jax import load
from unclip_jax.manipulate import Drawing, thumbnail
from unclip_jax.types import UnclipError

APPLE, ROCKET, _ = TEXTS


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def model(folder):
  return load(folder)


def test_emoji_are_drawn_by_their_descriptions():
  blue, red = (45, 100, 220), (214, 40, 40)
  one = common.make_emoji('rocket, flat, blue')
  assert one.shape == (64, 64, 3)
  assert (one[0, 0] == blue).all()
  assert (common.make_emoji('rocket, 3d, blue') != one).any()
  above, below = (
    common.make_emoji(f'{x}, flat, red') for x in ('rocket above house', 'house above rocket')
  )
  # Each half is a picture of its own, and they change places.
  assert np.abs(above[:32].astype(int) - below[32:]).mean() < 3
  assert (above[0, 0] == red).all() and (above[:32] != above[32:]).any()
  with pytest.raises(UnclipError, match="no 'rocket, wooden, red'"):
    common.make_emoji('rocket, wooden, red')


def test_a_sheet_has_its_pictures_where_it_names_them(tmp_path, capsys):
  rows = [[np.full((20, 20, 3), level, np.uint8) for level in row] for row in ((0, 90), (180, 40))]
  sheet = common.Sheet(rows, ['one', 'two'], ['', 'a title'], {'figure': 1})
  common.save(tmp_path, 'sheet', sheet, 16)
  with Image.open(tmp_path / 'sheet.webp') as image:
    drawn = np.asarray(image.convert('L'), int)
  assert drawn.shape == (2 * 20 + 16 + 16 + 4, 2 * 20 + 4)
  for y, row in ((16, (0, 90)), (16 + 20 + 16, (180, 40))):
    for x, level in zip((4, 24), row, strict=True):
      assert abs(drawn[y + 2 : y + 14, x + 2 : x + 14] - level).max() < 20
  assert (drawn[:16] < 128).any() and (drawn[36:52] < 128).any()
  assert capsys.readouterr().out == f'{tmp_path}/sheet.webp\n{{"figure": 1}}\n'


def test_a_word_is_written_across_a_picture():
  given = np.full((64, 64, 3), 120, np.uint8)
  written = write(given, 'a long word')
  changed = (written != given).any(axis=2)
  assert changed[25:39, 5:59].mean() > 0.9
  assert not changed[:24].any() and not changed[41:].any()
  inside = written[26:38, 6:58].min(axis=2)
  assert (inside < 100).any() and (inside == 255).mean() > 0.3


def draw_script(monkeypatch, figures, *args):
  monkeypatch.setattr(sys, 'argv', ['figure', *map(str, args)])
  monkeypatch.setattr(common, 'use_cache', lambda wanted: None)
  common.make(figures, 'A figure.')


@pytest.mark.parametrize('fit', [False, True], ids=['of emoji', 'of a folder'])
def test_a_figure_is_drawn_from_given_pictures_by_another_model(
  folder, tmp_path, monkeypatch, capsys, fit
):
  Image.fromarray(pixels(1, 20, 16)).save(tmp_path / 'one.png')
  args = ['--model', folder, '--image', tmp_path / 'one.png', '--out', tmp_path / 'out']
  if fit:
    (tmp_path / 'photos').mkdir()
    for i in range(18):
      Image.fromarray(pixels(i)).save(tmp_path / 'photos' / f'{i}.png')
    args += ['--fit', tmp_path / 'photos']
  monkeypatch.setattr('experiments.figures.pca.NUM_FITTED', 64)
  # Of more components than an embedding has there is no column.
  monkeypatch.setattr('experiments.figures.pca.DIMS', (1, 16, 20))
  draw_script(monkeypatch, pca.FIGURE, *args)
  with Image.open(tmp_path / 'out' / 'pca.webp') as image:
    assert image.size == (3 * (32 + 4) + 4, 16 + 32 + 4 + 4)
  path, measured = capsys.readouterr().out.splitlines()
  assert path == str(tmp_path / 'out' / 'pca.webp')
  measured = json.loads(measured)
  assert measured['fitted'] == (18 if fit else 64)
  ((first, last),) = measured['cosine']
  assert first < last == 1


# Of each figure what is made small, how many pictures and captions it is given, how many rows and
# columns it has, and how many of its first columns after the given picture are of equal latents
# where all that is given is the same.
@pytest.mark.parametrize(
  ('module', 'small', 'images', 'texts', 'shape', 'equal'),
  [
    (variations, {'ETAS': (0.0, 1.0), 'NUM_IMAGES': 2}, 1, (), (1, 4), 1),
    (interpolations, {'FRAMES': 2}, 2, (), (2, 4), 2),
    (text_diffs, {'FRAMES': 2}, 1, (APPLE, ROCKET), (4, 3), 1),
    (typographic_attack, {'NUM_IMAGES': 2}, 1, (APPLE, ROCKET), (2, 3), 0),
    (edits, {}, 1, (APPLE,), (5, 6), 0),
    (guidance, {'SCALES': (2.0, 2.0)}, None, (APPLE, APPLE), (2, 2), 2),
  ],
  ids=lambda value: value.__name__.split('.')[-1] if hasattr(value, '__name__') else '',
)
def test_a_figure_has_its_rows_and_equal_latents_give_equal_pixels(
  model, tmp_path, monkeypatch, module, small, images, texts, shape, equal
):
  for name, value in small.items():
    monkeypatch.setattr(module, name, value)
  figure, given = module.FIGURE, images and [pixels(1, 20, 16)] * images
  figure.check(given, texts or None, None)
  how = Drawing(num_steps=2, iterations=1, size=16)
  sheet = figure.draw(common.Setup(model, how, given, texts or None))
  assert (len(sheet.rows), len(sheet.names)) == shape == (len(sheet.titles), len(sheet.rows[0]))
  common.save(tmp_path, figure.name, sheet, 16)
  titles = sum(map(bool, sheet.titles))
  with Image.open(tmp_path / f'{figure.name}.webp') as image:
    assert image.size == (shape[1] * 20 + 4, shape[0] * 20 + 16 * titles + 16 + 4)
  first = 0 if given is None else 1
  for row in sheet.rows:
    for picture in row[first + 1 : first + equal]:
      np.testing.assert_array_equal(picture, row[first])
    # The picture that was given is not what was drawn, nor are those of other latents.
    assert first == 0 or (thumbnail(row[0], 16) != thumbnail(row[1], 16)).any()
    for picture in row[first + equal : len(row) - (module is interpolations)]:
      assert equal == 0 or (picture != row[first]).any()
  if figure is guidance.FIGURE:  # the same caption
    np.testing.assert_array_equal(sheet.rows[0], sheet.rows[1])
  if figure is text_diffs.FIGURE:  # the same picture, told from four things
    firsts = {row[1].tobytes() for row in sheet.rows}
    lasts = {row[2].tobytes() for row in sheet.rows}
    assert (len(firsts), len(lasts)) == (1, 4)
    assert sheet.titles[-1] == f'-> {ROCKET}'


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ('variations --text a', 'the figure variations takes no --text'),
    ('guidance --image a', 'the figure guidance takes no --image'),
    ('words --fit a', 'the figure words takes no --fit'),
    ('interpolations --image a --image b c', 'takes an even number of --image, not 3'),
    ('typographic_attack --text a', 'takes two or more of --text, not 1'),
    ('typographic_attack --image a b --text a b', 'takes one of --image, not 2'),
    ('text_diffs --image a', 'are of its pictures: give --text with --image'),
    ('text_diffs --image a --text a b c d', 'takes 2 of --text for each --image: 2, not 4'),
    ('--image a', 'name one of them'),
    ('variations pca --image a', 'name one of them'),
    ('any', 'there is no figure any: take of variations, '),
  ],
)
def test_pictures_and_captions_that_a_figure_has_no_use_for_are_refused(monkeypatch, args, message):
  monkeypatch.setattr('unclip_jax.load', None)  # no model is opened for them
  with pytest.raises(SystemExit) as stop:
    draw_script(monkeypatch, FIGURES, *args.split())
  assert str(stop.value).startswith('error: ') and message in str(stop.value)


def test_figures_are_drawn_by_their_names(tmp_path, monkeypatch, capsys):
  drawn = []
  figures = [
    common.Figure(lambda setup, name=name: drawn.append((name, setup.texts)), texts=common.ONE)
    for name in 'abc'
  ]
  for figure, name in zip(figures, 'abc', strict=True):
    figure.draw.__name__ = name
  monkeypatch.setattr(
    common, 'make_setup', lambda args: common.Setup(preset, None, None, args.text)
  )
  monkeypatch.setattr(common, 'save', lambda *args: None)
  preset = SimpleNamespace(config=CONFIG)
  draw_script(monkeypatch, figures, 'c', 'a')
  draw_script(monkeypatch, figures, 'b', '--text', 'words')
  draw_script(monkeypatch, figures)
  assert drawn == [(name, None) for name in 'ca'] + [('b', ['words'])] + [(n, None) for n in 'abc']


def test_all_figures_have_names_of_their_own():
  assert len({figure.name for figure in FIGURES}) == len(FIGURES) == 11
