"""Files of prompts: what is read of them, the pictures, and what happens as it is done again."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_store import BUCKET, serve
from PIL import Image
from rich.console import Console
from tiny_model import TEXTS, levels_apart, write_tiny_model

import unclip_jax
from unclip_jax.cli import main
from unclip_jax.cli.series import open_series
from unclip_jax.display import SeriesDisplay
from unclip_jax.images import read_text
from unclip_jax.systems.prompt_file import Line, read_lines, scan
from unclip_jax.types import UnclipError

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, CATS = TEXTS
# Levels between pictures that are the same but for rounding.
SAME = 1


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def model(folder):
  return unclip_jax.load(folder)


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('\n'.join([APPLE, '', ROCKET, CATS, APPLE]), 'utf-8')
  return path


def command(folder: Path, prompts: Path, out: Path, *args: object) -> list[str]:
  fixed = ('--prompts', prompts, '--model', folder, '--out', out, '--size', 16, '--batch-size', 2)
  return ['generate', *map(str, (*fixed, *args))]


def run(*args: object) -> int:
  """The exit status of `command`, in this process."""
  with pytest.raises(SystemExit) as stop:
    main([*command(*args), '--no-cache'])
  return stop.value.code


def complaint(capsys, *args: object) -> str:
  """The only line that a command says which fails."""
  assert run(*args) == 1
  shown = capsys.readouterr()
  assert shown.out == ''
  (line,) = shown.err.splitlines()
  return line.removeprefix('unclip-jax: error: ')


def pictures(out: Path) -> dict[str, np.ndarray]:
  return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob('*.png'))}


def times(out: Path) -> dict[str, int]:
  return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def assert_same_pictures(one: Path, other: Path) -> None:
  assert {*os.listdir(one)} == {*os.listdir(other)}
  for path in one.iterdir():
    assert path.read_bytes() == (other / path.name).read_bytes()


# --- Files of prompts.


def test_lines_of_text(tmp_path):
  path = tmp_path / 'prompts'
  path.write_bytes('\ufeffa fox\r\n\r\n  \n ein Äpfelchen \na fox'.encode())
  lines = [Line(1, 'a fox'), Line(4, 'ein Äpfelchen'), Line(5, 'a fox')]
  assert list(read_lines(path)) == lines
  found = scan(path, 2)
  assert (found.num_prompts, found.num_blank, found.num_images) == (3, 2, 6)
  assert (found.most_images, found.last_line) == (2, 5)
  path.write_bytes(path.read_bytes() + b'es')
  assert scan(path, 2).digest != found.digest


def test_lines_of_json(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(
    '{"prompt": "a fox", "seed": 7, "num_images": 3}\n\n{"name": "B", "prompt": "\\u00c4"}\n'
  )
  assert list(read_lines(path)) == [Line(1, 'a fox', None, 7, 3), Line(3, 'Ä', 'B')]
  assert scan(path, 2).num_images == 5
  assert scan(path, 2).most_images == 3


BAD_FILES = {
  'missing': (None, '', ['there is no file of prompts', 'check the path']),
  'a folder': ('folder', '', ['is a folder', 'a prompt a line']),
  'empty': (b'', '', ['no prompt', 'nothing']),
  'blank': (b'\n  \n\r\n', '', ['no prompt', 'only 3 empty lines']),
  'bad bytes': (b'a fox\nan \xe4pple\n', '', ['line 2', 'byte 4 (0xE4)', 'UTF-8']),
  'UTF-16': ('a fox'.encode('utf-16'), '', ['line 1', 'UTF-16', 'UTF-8']),
  'UTF-16 without a mark': ('a fox'.encode('utf-16-le'), '', ['line 1', 'UTF-16?', 'as UTF-8']),
  'old line ends': (b'a fox\ran owl\r', '', ['line 1', 'carriage return', 'line feeds']),
  'cut within a character': ('a fox\nÄ'.encode()[:-1], '', ['line 2', 'byte 1 (0xC3)']),
  'a control character': (b'a fox\n\na\tb\n', '', ['line 3', 'U+0009', 'character 2']),
  'no lines': (b'a' * (2**20 + 1), '', ['line 1', '1,048,576 bytes']),
  'one JSON': (b'[]', '.json', ['.jsonl']),
  'no JSON': (b'{"prompt": "a"}\n{"prompt', '.jsonl', ['line 2', 'not valid JSON']),
  'no object': (b'["a fox"]', '.jsonl', ['line 1', 'no JSON object']),
  'a key': (b'{"prompt": "a", "steps": 3}', '.jsonl', ['line 1', "'steps'", 'num_images']),
  'no prompt': (b'{"name": "a"}', '.jsonl', ['line 1', '"prompt"']),
  'an empty one': (b'{"prompt": " "}', '.jsonl', ['prompt in line 1', 'is empty']),
  'a number': (b'{"prompt": 7}', '.jsonl', ['prompt in line 1', 'not int']),
  'a seed': (b'{"prompt": "a", "seed": -1}', '.jsonl', ['seed in line 1', 'is -1']),
  'a count': (b'{"prompt": "a", "num_images": 1.5}', '.jsonl', ['images in line 1', '1.5']),
  'a large count': (
    b'{"prompt": "a"}\n{"prompt": "a", "num_images": 5000000000}',
    '.jsonl',
    ['last image of line 2', '4999999999'],
  ),
  'a name': (b'{"prompt": "a", "name": ["b"]}', '.jsonl', ['name in line 1', 'not list']),
}


def test_a_folder_with_the_name_of_a_picture_is_none(prompts, tmp_path):
  series = open_series(str(prompts), str(tmp_path / 'out'), 0, 1, 0)
  item = next(series.items())
  (series.folder / item.name).mkdir(parents=True)
  assert not series.is_drawn(item)


def test_what_can_be_read_only_once_is_refused(capsys, tmp_path):
  path = tmp_path / 'pipe'
  os.mkfifo(path)
  line = complaint(capsys, tmp_path / 'no model', path, tmp_path / 'out')
  assert str(path) in line and 'only once' in line


@pytest.mark.parametrize('kind', BAD_FILES)
def test_a_file_that_cannot_be_used(capsys, tmp_path, kind):
  content, suffix, parts = BAD_FILES[kind]
  path = tmp_path / f'prompts{suffix}'
  if content == 'folder':
    path.mkdir()
  elif content is not None:
    path.write_bytes(content)
  # Found before the model is looked for.
  line = complaint(capsys, tmp_path / 'no model', path, tmp_path / 'out')
  assert str(path) in line
  for part in parts:
    assert part in line
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('args', 'part'),
  [
    ([APPLE], '--prompts goes without'),
    (['--image', 'fox.png'], '--prompts goes without'),
    (['--num-images', 0], 'the number of images is 0'),
    (['--seed', -1], 'the seed is -1'),
    (['--first-image', 2**32 - 1, '--num-images', 2], 'the index of the last image is 4294967296'),
    (['--batch-size', 0], 'the batch size is 0'),
    (['--decoder-steps', 1001], 'decoder'),
    (['--devices', 999], '999 devices'),
    (['--coordinator', 'a:1'], 'give all'),
    (['--coordinator', 'a', '--num-processes', 2, '--process-id', 0], 'HOST:PORT'),
    (['--coordinator', 'a:1', '--num-processes', 2, '--process-id', 2], 'not within 0..1'),
    (['--coordinator', 'a:1', '--num-processes', 0, '--process-id', 0], 'take 1 or more'),
  ],
)
def test_arguments_that_cannot_be(capsys, folder, prompts, tmp_path, args, part):
  assert run(folder, prompts, tmp_path / 'out', *args) in (1, 2)
  *_, line = capsys.readouterr().err.splitlines()
  assert part in line
  assert not (tmp_path / 'out').exists()


def test_several_processes_are_for_files_of_prompts(capsys):
  with pytest.raises(SystemExit) as stop:
    main(['generate', APPLE, '--distributed'])
  assert stop.value.code == 2
  assert 'give a file of them' in capsys.readouterr().err


# --- Series from the command line.


def test_pictures_are_named_by_their_lines_and_described(model, folder, prompts, tmp_path, capsys):
  out = tmp_path / 'new' / 'out'
  assert run(folder, prompts, out, '--seed', 7, '--num-images', 2, '--first-image', 9) == 0
  shown = capsys.readouterr()
  assert shown.out.splitlines() == [str(out)]
  assert '8 pictures in' in shown.err and '8 drawn now; empty lines skipped: 1' in shown.err
  drawn = pictures(out)
  assert list(drawn) == [
    '00001-09-a-red-apple-flat-style.png',
    '00001-10-a-red-apple-flat-style.png',
    '00003-09-a-rocket-on-a-blue-background.png',
    '00003-10-a-rocket-on-a-blue-background.png',
    '00004-09-two-cats-beside-a-tree.png',
    '00004-10-two-cats-beside-a-tree.png',
    '00005-09-a-red-apple-flat-style.png',
    '00005-10-a-red-apple-flat-style.png',
  ]
  assert {*os.listdir(out)} == {*drawn, 'series.json'}
  expected = model.sample([APPLE, ROCKET, CATS, APPLE], 7, 2, first_image=9, size=16, batch_size=2)
  assert levels_apart(np.stack([*drawn.values()]), expected.images) <= SAME
  about = read_text(out / '00004-10-two-cats-beside-a-tree.png')
  assert (about['prompt'], about['index'], about['seed']) == (CATS, '10', '7')
  assert json.loads(about['settings'])['size'] == 16


def test_lines_of_json_say_how_they_are_drawn(model, folder, tmp_path):
  path, out = tmp_path / 'prompts.jsonl', tmp_path / 'out'
  lines = [
    {'prompt': APPLE, 'name': '../An Apple', 'num_images': 11},
    {'prompt': ROCKET, 'seed': 5},
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  assert run(folder, path, out, '--seed', 7) == 0
  drawn = pictures(out)
  assert len(drawn) == 12
  apples, rockets = '00001-10-an-apple.png', '00002-00-a-rocket-on-a-blue-background.png'
  alone = model.sample([APPLE, ROCKET], [7, 5], first_image=[10, 0], size=16, batch_size=2)
  for name, image in zip((apples, rockets), alone.images, strict=True):
    assert levels_apart(drawn[name], image) <= SAME
  assert read_text(out / rockets)['seed'] == '5'


def test_only_what_is_missing_is_drawn_again(folder, prompts, tmp_path, capsys):
  out, args = tmp_path / 'out', ('--num-images', 3)
  assert run(folder, prompts, out, *args) == 0
  first, before = times(out), pictures(out)
  empty, gone = '00003-1-a-rocket-on-a-blue-background.png', '00005-2-a-red-apple-flat-style.png'
  (out / empty).write_bytes(b'')  # as a loss of power may leave it
  (out / gone).unlink()
  (out / f'.{gone}.01234567.part').write_bytes(b'half')
  capsys.readouterr()
  assert run(folder, prompts, out, *args) == 0
  assert '12 pictures in' in (said := capsys.readouterr().err) and '2 drawn now' in said
  again = times(out)
  assert again.keys() == first.keys()
  assert {name for name in first if again[name] != first[name]} == {empty, gone}
  for name, image in pictures(out).items():
    np.testing.assert_array_equal(image, before[name])
  assert run(folder, prompts, out, *args) == 0
  assert '0 drawn now' in capsys.readouterr().err
  assert times(out) == again


def test_a_run_that_was_killed_continues_where_it_was(folder, tmp_path, capsys):
  prompts, out, whole = tmp_path / 'prompts.txt', tmp_path / 'out', tmp_path / 'whole'
  prompts.write_text('\n'.join([*TEXTS] * 40))
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  args = [sys.executable, '-m', 'unclip_jax', *command(folder, prompts, out), '--no-cache']
  with subprocess.Popen(args, env=env, stderr=subprocess.DEVNULL) as process:
    while process.poll() is None and len(list(out.glob('*.png'))) < 7:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  before = {name: at for name, at in times(out).items() if name[0] != '.'}
  assert run(folder, prompts, out) == 0
  num_missing = 121 - len(before)  # of 120 and series.json
  assert 0 < num_missing < 115
  assert f'{num_missing} drawn now' in capsys.readouterr().err
  after = times(out)
  assert {name: after[name] for name in before} == before
  assert run(folder, prompts, whole) == 0
  assert_same_pictures(out, whole)


def test_a_folder_of_another_run_is_refused(folder, prompts, tmp_path, capsys):
  out = tmp_path / 'out'
  assert run(folder, prompts, out) == 0
  capsys.readouterr()
  before = times(out)
  other_prompts = tmp_path / 'others.txt'
  other_prompts.write_text(APPLE)
  for args, differing in (
    ((folder, other_prompts, out), 'prompts'),
    ((folder, prompts, out, '--seed', 1), 'seed'),
    ((folder, prompts, out, '--num-images', 2, '--first-image', 1), 'num_images, first_image'),
    ((folder, prompts, out, '--decoder-steps', 2, '--negative-prompt', 'x'), 'decoder.num_steps'),
    ((folder, prompts, out, '--size', 32), 'size'),
    ((folder, prompts, out, '--lora-strength', 2, '--lora', tmp_path / 'none'), 'none'),
  ):
    line = complaint(capsys, *args)
    if differing != 'none':
      assert f'{out} has the pictures of another run (another {differing}' in line
      assert 'choose another --out' in line
  # The same model from elsewhere is the same.
  assert run(write_tiny_model(tmp_path / 'copy'), prompts, out) == 0
  capsys.readouterr()
  (out / 'series.json').write_text('{')
  assert 'series.json cannot be read' in complaint(capsys, folder, prompts, out)
  (out / 'series.json').write_text('[]')
  assert 'format_version' in complaint(capsys, folder, prompts, out)
  (out / 'series.json').unlink()
  assert 'no series.json that says how' in complaint(capsys, folder, prompts, out)
  (out / 'series.json').touch()
  after = times(out)
  assert all(after[name] == at for name, at in before.items() if name != 'series.json')


def test_prompts_that_change_while_they_are_drawn_are_not_mixed(prompts, tmp_path):
  series = open_series(str(prompts), str(tmp_path / 'out'), 0, 1, 0)
  before = [*series.items()]
  items = series.items()
  assert next(items) == before[0]
  text = prompts.read_text('utf-8')
  prompts.write_text(text.replace(ROCKET, CATS), 'utf-8')
  with pytest.raises(UnclipError, match='has changed since it was read first'):
    next(items)
  prompts.write_text(text, 'utf-8')
  again = open_series(str(prompts), str(tmp_path / 'out'), 0, 1, 0)
  assert [*again.items()] == before


def test_a_disk_that_fills_up_halfway(folder, prompts, tmp_path, capsys):
  """A limit on the size of files stands in for it; the largest picture does not fit."""
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  assert run(folder, prompts, whole, '--num-images', 2) == 0
  capsys.readouterr()
  sizes = {path.name: path.stat().st_size for path in sorted(whole.glob('*.png'))}
  largest = max(sizes.values())
  first_of_it = next(name for name, size in sizes.items() if size == largest)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
  try:
    assert run(folder, prompts, out, '--num-images', 2) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  shown = capsys.readouterr()
  assert shown.out == ''
  *_, line = shown.err.splitlines()
  assert line.startswith(f'unclip-jax: error: cannot write {out / first_of_it} (')
  assert 'free some space' in line
  kept = times(out)
  assert {*kept} == {'series.json', *(name for name in sizes if name < first_of_it)}
  assert run(folder, prompts, out, '--num-images', 2) == 0
  assert f'{8 - len(kept) + 1} drawn now' in capsys.readouterr().err
  after = times(out)
  assert {name: after[name] for name in kept} == kept
  assert_same_pictures(out, whole)


def test_prompts_and_pictures_in_a_store(folder, prompts, tmp_path, monkeypatch, capsys):
  store, whole = serve(tmp_path, monkeypatch), tmp_path / 'whole'
  path, out = f'{BUCKET}/prompts.txt', f'{BUCKET}/out'
  store.local(path).write_bytes(prompts.read_bytes())
  assert run(folder, path, out) == run(folder, prompts, whole) == 0
  assert_same_pictures(store.local(out), whole)
  (store.local(out) / '00003-0-a-rocket-on-a-blue-background.png').unlink()
  capsys.readouterr()
  assert run(folder, path, out) == 0
  assert f'4 pictures in {out}, 1 drawn now' in capsys.readouterr().err
  assert_same_pictures(store.local(out), whole)
  assert 'another seed' in complaint(capsys, folder, path, out, '--seed', 1)
  assert 'there is no file of prompts gs://' in complaint(capsys, folder, f'{path}2', out)


def test_many_warnings_are_counted(folder, tmp_path, capsys):
  path = tmp_path / 'prompts.txt'
  long = ' and a very long story about everything else'
  path.write_text('\n'.join(f'{APPLE} {i}{long}' for i in range(24)))
  assert run(folder, path, tmp_path / 'out') == 0
  said = capsys.readouterr().err.splitlines()
  lines = [line for line in said if line.startswith('unclip-jax: warning')]
  assert len(lines) == 21
  assert lines[-1] == 'unclip-jax: warning: 4 more warnings'


# --- What is shown.


@pytest.mark.parametrize('is_terminal', [True, False])
def test_progress_tells_how_much_is_left(capsys, monkeypatch, is_terminal):
  clock = iter([100.0, 110.0, 130.0])
  monkeypatch.setattr('unclip_jax.display.time', SimpleNamespace(monotonic=lambda: next(clock)))
  console = Console(force_terminal=is_terminal, width=100, color_system=None)
  display = SeriesDisplay(console, 2000, 'process 1: ')
  with display:
    display(0, 4)
    display(400, 8)
    display(400, 100)
  shown = capsys.readouterr().out
  assert 'process 1: 500 of 2,000 pictures, 3.2 a second, 0:07:49 left' in shown
  if not is_terminal:
    assert shown.splitlines()[:2] == [
      'process 1: 4 of 2,000 pictures',
      'process 1: 408 of 2,000 pictures, 0.4 a second, 1:06:20 left',
    ]
