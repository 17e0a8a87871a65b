"""The scripts of the paper's figures: what they begin from, and where pictures and words stand."""

import sys

import numpy as np
import pytest
from made_pictures import pixels
from PIL import Image
from tiny_model import write_tiny_model

from experiments.figures import common
from experiments.figures.__main__ import FIGURES
from experiments.figures.pca import pca
from experiments.figures.typographic_attack import write
from unclip_jax.types import UnclipError


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


def test_a_figure_is_drawn_from_given_pictures_by_another_model(tmp_path, monkeypatch, capsys):
  model = write_tiny_model(tmp_path / 'model')
  Image.fromarray(pixels(1, 20, 16)).save(tmp_path / 'one.png')
  args = ['--model', model, '--image', tmp_path / 'one.png', '--out', tmp_path / 'out']
  monkeypatch.setattr(sys, 'argv', ['pca', *map(str, args)])
  monkeypatch.setattr('experiments.figures.common.use_cache', lambda wanted: None)
  monkeypatch.setattr('experiments.figures.pca.NUM_FITTED', 64)
  monkeypatch.setattr('experiments.figures.pca.DIMS', (1, 16))
  common.make(pca, 'A figure.')
  with Image.open(tmp_path / 'out' / 'pca.webp') as image:
    assert image.size == (3 * (32 + 4) + 4, 16 + 32 + 4 + 4)
  assert '"cosine": [[' in capsys.readouterr().out


def test_all_figures_have_names_of_their_own():
  assert len({figure.__name__ for figure in FIGURES}) == len(FIGURES) == 10
