"""The commands that manipulate pictures: a row and what was measured, and files that are none."""

import json

import numpy as np
import pytest
from commands import run
from known_words import KNOWN, add_vocabulary
from made_pictures import encoded, pixels
from PIL import Image
from tiny_model import TEXTS, write_tiny_model

import unclip_jax
from unclip_jax import manipulate
from unclip_jax.images import read_picture
from unclip_jax.manipulate import Drawing

APPLE, ROCKET, _ = TEXTS
SIZE = 16


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture
def pictures(tmp_path):
  """Two files, of other sizes and modes."""
  Image.fromarray(pixels(1, 20, 16)).save(tmp_path / 'one.png')
  Image.fromarray(pixels(2, 16, 24)).convert('L').save(tmp_path / 'other.jpg')
  return tmp_path / 'one.png', tmp_path / 'other.jpg'


def call(model, out, command, *args, steps=2) -> int:
  common = ('--model', model, '--out', out, '--no-cache', '--size', SIZE, '--steps', steps)
  return run(command, *args, *common)


def frames(path) -> np.ndarray:
  """The pictures of a row."""
  with Image.open(path) as row:
    grid = np.asarray(row)
  return np.stack([grid[4 : 4 + SIZE, x : x + SIZE] for x in range(4, grid.shape[1], SIZE + 4)])


def test_a_row_is_what_the_function_gives_between_the_pictures_that_were_given(
  model, pictures, tmp_path, capsys
):
  out = tmp_path / 'out'
  assert call(model, out, 'interpolate', *pictures, '-n', 3, '--iterations', 2) == 0
  shown = capsys.readouterr()
  names = ['interpolate-one-other.png', 'interpolate-one-other.json']
  assert shown.out.split() == [str(out / name) for name in names]
  row = frames(out / names[0])
  one, other = map(read_picture, pictures)
  how = Drawing(2, iterations=2, size=SIZE)
  expected = manipulate.interpolate(unclip_jax.load(model), one, other, 3, how=how)
  np.testing.assert_array_equal(row[1:4], expected.images)
  for frame, picture in ((0, one), (4, other)):
    np.testing.assert_array_equal(row[frame], manipulate.thumbnail(picture, SIZE))
  about = json.loads((out / names[1]).read_text())
  assert about['measured'] == expected.measured
  assert (about['command'], about['num_steps'], about['noise']) == ('interpolate', 2, 'inverted')
  assert 'error levels: [' in shown.err


@pytest.mark.parametrize(
  ('args', 'count', 'measured'),
  [
    (('variations', 'ONE', '-n', 2, '--eta', 0.5), 3, {'error_levels', 'eta'}),
    (('text-diff', 'ONE', APPLE, ROCKET, '-n', 2), 3, {'cosine_of_direction'}),
    (('text-diff', 'ONE', ROCKET, '--baseline', 'none', '-n', 2), 3, {'cosine_of_direction'}),
    (('reconstruct', 'ONE', 'OTHER'), 2, {'error_levels', 'x_T_std'}),
    (('inpaint', 'ONE', ROCKET, '--margin', 0.25, '-n', 1), 2, {'share_painted'}),
    (('redraw', 'ONE', ROCKET, '-n', 2), 3, {'mean_change_levels'}),
  ],
  ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_each_command_writes_its_row(model, pictures, tmp_path, args, count, measured):
  files = dict(zip(('ONE', 'OTHER'), pictures, strict=True))
  assert call(model, tmp_path / 'out', *(files.get(arg, arg) for arg in args)) == 0
  (path,) = (tmp_path / 'out').glob('*.png')
  assert len(frames(path)) == count
  about = json.loads(path.with_suffix('.json').read_text())
  assert about['measured'].keys() >= measured


def test_a_text_diff_reads_its_source_where_it_counts(model, pictures, tmp_path, capsys):
  given = ('text-diff', pictures[0], '-n', 2)
  for texts, words in (((ROCKET,), 'there are 1 captions'), ((APPLE,) * 3, 'there are 3 captions')):
    assert call(model, tmp_path / 'out', *given, *texts) == 2
    assert words in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_words_that_the_model_never_saw_are_named(pictures, tmp_path, capsys):
  model = add_vocabulary(write_tiny_model(tmp_path / 'model'), KNOWN.to_json())
  for args, words in (
    (('text-diff', pictures[0], 'a rokcet', 'a laptop', '-n', 2), ('rokcet', 'laptop')),
    (('inpaint', pictures[0], 'a rokcet', '--margin', 0.25, '-n', 1), ('rokcet',)),
    (('redraw', pictures[0], 'a rokcet', '-n', 2), ('rokcet',)),
  ):
    assert call(model, tmp_path / 'out', *args) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if 'never saw' in line]
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
      assert line.startswith(f"unclip-jax: warning: 'a {word}': the model never saw '{word}'")


def test_components_come_from_a_folder_and_each_picture_has_a_row(
  model, pictures, tmp_path, capsys
):
  photos = tmp_path / 'photos'
  photos.mkdir()
  # Of 18 some are of another batch, which is filled up: what fills it must not count.
  given = [pixels(seed, 16, 16) for seed in range(18)]
  for i, picture in enumerate(given):
    Image.fromarray(picture).save(photos / f'{i:02}.png')
  out = tmp_path / 'out'
  args = ('pca', *pictures, '--fit', photos)
  assert call(model, out, *args, '--dims', '2,16') == 0
  drawn = read_picture(out / 'pca-one-other.png')
  assert drawn.shape == (2 * (SIZE + 4) + 4, 3 * (SIZE + 4) + 4, 3)
  loaded = unclip_jax.load(model)
  expected = manipulate.pca_reconstruct(
    loaded,
    list(map(read_picture, pictures)),
    [2, 16],
    manipulate.fit_pca(loaded, [np.stack(given)]),
    Drawing(2, size=SIZE),
  )
  about = json.loads((out / 'pca-one-other.json').read_text())
  assert about['measured'].pop('dims') == [2, 16]
  np.testing.assert_allclose(about['measured']['cosine'], expected.measured['cosine'], atol=1e-3)
  second = drawn[SIZE + 8 : 2 * SIZE + 8]
  np.testing.assert_array_equal(
    second[:, 4 : 4 + SIZE], manipulate.thumbnail(read_picture(pictures[1]), SIZE)
  )
  tile = second[:, 2 * (SIZE + 4) + 4 : 3 * (SIZE + 4)].astype(int)
  assert np.abs(tile - expected.images[3]).mean() < 2
  capsys.readouterr()
  (photos / '17.png').unlink()
  (photos / '16.png').unlink()
  assert call(model, out, *args) == 1
  assert '16 embeddings are too few' in capsys.readouterr().err
  assert call(model, out, 'pca', *pictures) == 1
  assert '--fit FOLDER' in capsys.readouterr().err


def test_a_mask_of_any_mode_says_what_is_painted(model, pictures, tmp_path, capsys):
  mask = np.zeros((20, 16), np.uint8)
  mask[:, 8:] = 255
  white, out = np.full((20, 16, 3), 255, np.uint8), tmp_path / 'out'
  modes = {
    '1': Image.fromarray(mask).convert('1'),
    'RGB': Image.fromarray(mask).convert('RGB'),
    'RGBA': Image.fromarray(np.dstack([white, mask])),  # white strokes on nothing
    'I;16': Image.fromarray(mask.astype(np.uint16) * 257),
  }
  for image in modes.values():
    image.save(tmp_path / 'mask.png')
    assert call(model, out, 'inpaint', pictures[0], '--mask', tmp_path / 'mask.png', '-n', 1) == 0
    given, painted = frames(out / 'inpaint-one.png')
    np.testing.assert_array_equal(painted[:, :8], given[:, :8])
    assert (painted[:, 8:] != given[:, 8:]).any()
  capsys.readouterr()
  assert call(model, out, 'inpaint', pictures[1], '--mask', tmp_path / 'mask.png') == 1
  assert 'they must be of one size' in capsys.readouterr().err
  assert call(model, out, 'inpaint', pictures[0]) == 2
  assert 'give a --mask' in capsys.readouterr().err


def test_files_that_are_no_pictures_are_refused(model, pictures, tmp_path, capsys, monkeypatch):
  whole = encoded(pixels(1), 'JPEG')
  (tmp_path / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'text.png').write_text('no picture')
  refused = {'none.png': 'no picture', 'cut.jpg': 'cannot|can be read', 'text.png': 'is not a pic'}
  for name, words in refused.items():
    assert call(model, tmp_path / 'out', 'reconstruct', tmp_path / name) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and any(word in line for word in words.split('|'))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
  assert call(model, tmp_path / 'out', 'reconstruct', pictures[0]) == 1
  assert 'more pixels than Pillow takes for safe' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_of_an_animation_the_first_frame_is_read(tmp_path):
  first, *others = (Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (200, 10, 90))
  first.save(tmp_path / 'moving.gif', save_all=True, append_images=others)
  assert (read_picture(tmp_path / 'moving.gif') == 200).all()
