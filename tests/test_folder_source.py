import json
import pickle

import pytest
from fake_store import BUCKET, serve
from made_pictures import encoded, pixels

from unclip_jax.data.examples import BrokenExample
from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.types import UnclipError

NAMES = ('a.png', 'b.PNG', 'inside/v1.0/c.png')


@pytest.fixture
def folder(tmp_path):
  for seed, name in enumerate(NAMES):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(encoded(pixels(seed)))
  (tmp_path / 'a.txt').write_text(' a café\n', encoding='utf-8')
  (tmp_path / 'inside' / 'v1.0' / 'c.txt').write_text('inside')
  (tmp_path / '.cache').mkdir()
  (tmp_path / '.cache' / 'd.png').write_bytes(b'')
  (tmp_path / 'notes.md').write_text('')
  return tmp_path


def test_pictures_beside_their_captions(folder):
  source = PictureFolder(folder)
  assert [example.id for example in source] == [*NAMES]
  assert [example.captions for example in source] == [('a café',), (), ('inside',)]
  assert [example.image for example in source] == [encoded(pixels(seed)) for seed in range(3)]
  assert list(pickle.loads(pickle.dumps(source))) == list(source)
  with pytest.raises(IndexError):
    source[3]


def test_a_store(folder, monkeypatch):
  expected = list(PictureFolder(folder))
  serve(folder, monkeypatch)
  assert list(PictureFolder(BUCKET)) == expected


def test_a_list_in_json_lines(folder):
  rows = [
    {'file_name': 'inside/v1.0/c.png', 'text': 'one\u2028line'},
    {'file_name': 'a.png', 'caption': 'first', 'width': 3},
    {'file_name': 'a.png', 'caption': ' second '},
    {'file_name': 'gone.png', 'text': 'not there'},
  ]
  lines = '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
  (folder / 'metadata.jsonl').write_text(lines + '\n', encoding='utf-8')
  source = PictureFolder(folder)
  assert len(source) == 3
  assert source[0].captions == ('first', 'second')
  assert source[2].captions == ('one\u2028line',)
  with pytest.raises(BrokenExample, match=r'gone\.png: cannot be read: No such file'):
    source[1]


@pytest.mark.parametrize('name', ['metadata.csv', 'captions.csv'])
def test_a_list_in_csv(folder, name):
  text = '\ufefffile_name,width,caption\na.png,3,"a ""red"",\napple"\nb.PNG,4,\n'
  (folder / name).write_text(text, encoding='utf-8')
  source = PictureFolder(folder)
  assert [example.captions for example in source] == [('a "red",\napple',), ()]


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('metadata.jsonl', '{"file_name": "a.png"}\n{"file', 'line 2 of .*jsonl is not JSON'),
    ('metadata.jsonl', '[1]', 'line 1 of .*jsonl is no JSON object'),
    ('metadata.jsonl', '{"text": "a"}', "line 1 of .*jsonl names no file: give it as 'file_name'"),
    ('metadata.jsonl', '{"file_name": "../a.png"}', 'only files inside of the folder'),
    ('metadata.jsonl', '{"file_name": "/a.png"}', 'only files inside of the folder'),
    ('metadata.jsonl', '{"file_name": "a.png", "text": 3}', 'has 3 for a caption: give text'),
    ('metadata.jsonl', '', 'metadata.jsonl has no pictures'),
    ('metadata.csv', 'path,words\n', 'begins with path, words: give the header file_name,text'),
    ('metadata.csv', '', 'begins with nothing'),
    ('captions.csv', 'file_name,text\n,a\n', 'line 2 of .*captions.csv names no file'),
  ],
)
def test_damaged_lists_are_named(folder, name, text, message):
  (folder / name).write_text(text)
  with pytest.raises(UnclipError, match=message) as error:
    PictureFolder(folder)
  assert '\n' not in str(error.value)


def test_what_is_missing_is_named(folder, tmp_path):
  with pytest.raises(UnclipError, match=r'there is no folder .*nowhere'):
    PictureFolder(tmp_path / 'nowhere')
  with pytest.raises(UnclipError, match=r'\.cache has no pictures'):
    (folder / '.cache' / 'd.png').unlink()
    PictureFolder(folder / '.cache')
  (folder / 'metadata.jsonl').write_bytes(b'\xff')
  with pytest.raises(UnclipError, match='is not UTF-8 text'):
    PictureFolder(folder)


def test_one_broken_example_and_a_folder_that_vanishes(folder):
  (folder / 'b.txt').write_bytes(b'\xff')
  source = PictureFolder(folder)
  with pytest.raises(BrokenExample, match=r'b\.PNG: its caption is not UTF-8'):
    source[1]
  (folder / 'a.png').unlink()
  with pytest.raises(BrokenExample, match=r'a\.png: cannot be read'):
    source[0]
  folder.rename(folder.with_name('elsewhere'))
  with pytest.raises(UnclipError, match='is gone') as error:
    source[2]
  assert not isinstance(error.value, BrokenExample)
