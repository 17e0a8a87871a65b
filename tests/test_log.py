"""The record of a run: rows, resumption, pictures, and life without the optional packages."""

import csv
import io
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from unclip_jax.train.log import RunLog
from unclip_jax.types import UnclipError


def quiet() -> Console:
  return Console(file=io.StringIO())


def read(folder) -> list[dict[str, str]]:
  with (folder / 'metrics.csv').open() as file:
    return list(csv.DictReader(file))


@pytest.fixture
def without_extras(monkeypatch):
  # As where the `train` extra is not installed.
  for name in ('tensorboardX', 'matplotlib', 'matplotlib.figure'):
    monkeypatch.setitem(sys.modules, name, None)


def test_rows(tmp_path):
  with RunLog(tmp_path, 30, console=quiet()) as log:
    log.write(10, {'loss': np.array([1.0, 2.0]), 'lr': np.float32(0.1)}, num_examples=64)
    log.write(20, {'loss': 0.5, 'lr': 0.2})
    log.write(20, {'val_loss': 0.75})
  first, second = read(tmp_path)
  assert (first['step'], first['loss'], first['val_loss']) == ('10', '1.5', '')
  assert float(first['examples_per_s']) > 0
  assert np.float32(first['lr']) == np.float32(0.1)
  assert (second['step'], second['loss'], second['val_loss']) == ('20', '0.5', '0.75')


def test_a_continued_run_has_the_rows_of_an_uninterrupted_one(tmp_path):
  def run(folder, start, stop, resume_step):
    with RunLog(folder, 9, resume_step, quiet()) as log:
      for step in range(start, stop):
        log.write(step, {'loss': 1 / step} | ({'val_loss': 2.0} if step % 3 == 0 else {}))

  run(tmp_path / 'whole', 1, 9, 0)
  run(tmp_path / 'parts', 1, 6, 0)
  run(tmp_path / 'parts', 5, 9, 4)  # Killed after 5, its checkpoint is of 4.
  assert read(tmp_path / 'parts') == read(tmp_path / 'whole')


def test_a_new_run_in_an_old_folder_starts_afresh(tmp_path):
  for _ in range(2):
    with RunLog(tmp_path, 9, console=quiet()) as log:
      log.write(1, {'loss': 1.0})
  assert len(read(tmp_path)) == 1


def test_half_a_row_of_a_killed_process_is_dropped(tmp_path):
  with RunLog(tmp_path, 9, console=quiet()) as log:
    for step in (1, 2):
      log.write(step, {'loss': 0.5, 'accuracy': 0.25})
  path = tmp_path / 'metrics.csv'
  path.write_text(path.read_text()[: -len('5\n')])
  with RunLog(tmp_path, 9, 2, quiet()) as log:
    log.write(3, {'loss': 0.5, 'accuracy': 0.25})
  assert [row['step'] for row in read(tmp_path)] == ['1', '3']


def test_a_file_of_something_else_is_named(tmp_path):
  (tmp_path / 'metrics.csv').write_text('name,colour\napple,red\n')
  with pytest.raises(UnclipError, match=r'metrics\.csv does not look like'):
    RunLog(tmp_path, 9, console=quiet())


def test_pictures_and_curves(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
  with RunLog(tmp_path, 9, console=quiet()) as log:
    log.write(1, {'loss': 1.0, 'val_loss': 2.0})
    log.write(2, {'loss': 0.5})
    path = log.write_image(2, 'samples', image)
    curves = log.write_curves(['loss', 'val_loss', 'absent'])
  assert path == tmp_path / 'samples' / 'samples_0000002.png'
  with Image.open(path) as opened:
    np.testing.assert_array_equal(np.asarray(opened), image)
  with Image.open(curves) as opened:
    assert opened.size == (840, 480)
    assert len(opened.convert('RGB').getcolors(100_000)) > 10
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 1


def test_without_the_extra_a_run_still_has_its_csv(tmp_path, without_extras):
  console = quiet()
  with RunLog(tmp_path, 9, console=console) as log:
    log.write(1, {'loss': 1.0})
    assert log.write_curves(['loss']) is None
  assert read(tmp_path) == [{'step': '1', 'loss': '1'}]
  said = console.file.getvalue()
  assert "tensorboardX: pip install 'unclip-jax[train]'" in said
  assert "matplotlib: pip install 'unclip-jax[train]'" in said


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path):
  console = quiet()
  with RunLog(tmp_path, 2, console=console) as log:
    log.write(1, {'loss': 1.0})
    log.write(2, {'loss': 0.25}, num_examples=8)
  lines = console.file.getvalue().splitlines()
  assert len(lines) == 1
  assert lines[0].startswith('step 2/2  loss 0.25  examples_per_s ')


def test_unwritable_folder_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UnclipError, match=r'cannot write to the run folder .*file/run'):
    RunLog(tmp_path / 'file' / 'run', 9, console=quiet())
