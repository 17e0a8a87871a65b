"""Tar files as img2dataset and WebDataset write them, against tarfile read from start to end."""

import os
import pickle
import tarfile

import numpy as np
import pytest
from fake_store import BUCKET, serve
from made_pictures import encoded, pixels, write_shard, write_tar

from unclip_jax.data import shards
from unclip_jax.data.examples import BrokenExample
from unclip_jax.data.shards import TarShards, expand
from unclip_jax.types import UnclipError


@pytest.fixture
def folder(tmp_path):
  """Three shards of 3, 1 and 2 examples, with what img2dataset leaves beside them."""
  for shard, (first, count) in enumerate(((0, 3), (3, 1), (4, 2))):
    write_shard(tmp_path / f'{shard:05d}.tar', first, count)
    (tmp_path / f'{shard:05d}.parquet').write_bytes(b'PAR1')
    (tmp_path / f'{shard:05d}_stats.json').write_text('{}')
  return tmp_path


def test_examples_are_those_of_the_files_in_order(folder):
  source = TarShards(str(folder))
  expected = []
  for shard in range(3):
    with tarfile.open(folder / f'{shard:05d}.tar') as tar:
      names = [name for name in tar.getnames() if name.endswith('.png')]
      expected += [tar.extractfile(name).read() for name in names]
  assert len(source) == 6
  assert [source[i].image for i in range(6)] == expected
  assert [source[i].captions for i in range(6)] == [(f'picture {i}',) for i in range(6)]
  assert source[4].id == '00002.tar/000000004'
  assert [example.id for example in source] == [source[i].id for i in range(6)]
  with pytest.raises(IndexError, match=r'index 6 is not within 0\.\.5'):
    source[6]


def test_members_are_read_alone(folder, monkeypatch):
  """The bytes of one example, its unread .json between them, and no others."""
  source = TarShards(str(folder))
  asked = []
  fetcher = shards._fetcher

  def noting(path):
    fetch = fetcher(path)
    return lambda start, end: asked.append(end - start) or fetch(start, end)

  monkeypatch.setattr(shards, '_fetcher', noting)
  example = source[1]
  assert len(asked) == 1
  assert len(example.image) < asked[0] < len(example.image) + 5 * 512


def test_the_index_is_made_once(folder, monkeypatch):
  before = list(TarShards(str(folder)))
  monkeypatch.setattr(shards, '_scan', None)
  assert list(TarShards(str(folder))) == before
  monkeypatch.undo()
  # Another file under the same name has another index.
  write_shard(folder / '00001.tar', 3, 2)
  assert len(TarShards(str(folder))) == 7


def test_an_index_folder(folder, tmp_path):
  source = TarShards(str(folder), tmp_path / 'index')
  assert len(list((tmp_path / 'index').iterdir())) == 3
  assert not list(folder.glob('*.npy'))
  assert source[5].captions == ('picture 5',)
  # Two of one name and size.
  for name in 'ab':
    write_tar(tmp_path / name / '00001.tar', {f'{name}.png': b'0', f'{name}.txt': b'x'})
  source = TarShards([f'{tmp_path}/{name}/00001.tar' for name in 'ab'], tmp_path / 'index')
  assert [example.id for example in source] == ['a/00001.tar/a', 'b/00001.tar/b']


def test_patterns(folder):
  names = [f'{shard:05d}.tar' for shard in range(3)]
  for pattern in ('{00000..00002}.tar', '0000{0,1,2}.tar', '*.tar', '0000?.tar'):
    assert [path.name for path in expand(f'{folder}/{pattern}')] == names
  assert [path.name for path in expand(f'{folder}/0000{{1..2}}.tar')] == names[1:]
  # Shards that several patterns name are read once.
  assert len(TarShards([f'{folder}/00000.tar', f'{folder}/0000{{0..1}}.tar'])) == 4
  with pytest.raises(UnclipError, match=r'there is no .*00003\.tar: check'):
    TarShards(f'{folder}/{{00000..00003}}.tar')
  with pytest.raises(UnclipError, match=r'9\*\.tar has no tar files'):
    TarShards(f'{folder}/9*.tar')
  with pytest.raises(UnclipError, match='no tar files are given'):
    TarShards([])


def test_layouts_of_other_writers(tmp_path):
  """Folders within, upper case, long names, captions in the .json, several of them, none."""
  image, long = encoded(pixels(0)), 'a' * 150
  members = {
    'x/1.JPG': image,
    'x/1.json': '{"caption": "with a café"}'.encode(),
    'x/2.seg.png': b'not the picture',
    'x/2.webp': image,
    'x/2.txt': b' spaces \n',
    'y/2.jpg': image,
    'y/2.json': b'{"caption": ["one", "", "two"]}',
    f'{long}.png': image,
    f'{long}.txt': 'ü'.encode(),
    '.hidden.png': image,
    'z.png': image,
    'README': b'',
  }
  for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    name = f'{kind}.tar'
    source = TarShards(str(write_tar(tmp_path / name, members, format=kind)))
    assert [example.captions for example in source] == [
      ('with a café',),
      ('spaces',),
      ('one', 'two'),
      ('ü',),
      (),
    ]
    assert {example.image for example in source} == {image}
    assert [example.id.removeprefix(f'{name}/') for example in source] == [
      'x/1',
      'x/2',
      'y/2',
      long,
      'z',
    ]


def test_what_is_broken_is_one_example(tmp_path):
  image = encoded(pixels(0))
  path = write_tar(
    tmp_path / 'a.tar',
    {'1.txt': b'no picture', '2.png': image, '2.txt': b'\xff', '3.png': image, '3.json': b'{"'},
  )
  source = TarShards(str(path))
  for index, reason in enumerate(('has no picture', 'its caption cannot', 'its caption cannot')):
    with pytest.raises(BrokenExample, match=f'a.tar/{index + 1}: {reason}'):
      source[index]


@pytest.mark.parametrize('size', [0, 100, 512, 700, 1500, 9000, -10240])
def test_a_shard_cut_short_is_named(folder, size):
  path = folder / '00000.tar'
  whole = path.read_bytes()
  path.write_bytes(whole[:size])
  with pytest.raises(UnclipError, match=r'00000\.tar is cut short') as error:
    TarShards(str(folder))
  assert '\n' not in str(error.value)
  path.write_bytes(whole)
  assert len(TarShards(str(folder))) == 6


def test_damaged_shards_are_named(folder, tmp_path):
  path = folder / '00001.tar'
  whole = bytearray(path.read_bytes())
  second = whole.index(b'000000003.json')
  path.write_bytes(bytes(whole[:second]) + b'\x07' * 512 + bytes(whole[second + 512 :]))
  with pytest.raises(UnclipError, match=rf'00001\.tar is cut short .*damaged at byte {second:,}'):
    TarShards(str(folder))
  write_tar(path, {'README': b'nothing'})
  with pytest.raises(UnclipError, match=r'00001\.tar holds no pictures'):
    TarShards(str(folder))
  with tarfile.open(path, 'w:gz') as tar:
    tar.add(folder / '00000.tar', 'x.png')
  with pytest.raises(UnclipError, match=r'00001\.tar is compressed: unpack'):
    TarShards(str(folder))
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  with pytest.raises(UnclipError, match='pointer of Git LFS'):
    TarShards(str(folder))


def test_a_shard_that_vanishes_or_shrinks_is_named(folder):
  source = TarShards(str(folder))
  assert source[0].captions == ('picture 0',)
  path = folder / '00000.tar'
  os.truncate(path, 1000)
  with pytest.raises(UnclipError, match=r'00000\.tar can no longer be read \(it ends at byte'):
    source[1]
  path.unlink()
  with pytest.raises(
    UnclipError, match=r'00000\.tar can no longer be read \(No such file'
  ) as error:
    source[0]
  assert not isinstance(error.value, BrokenExample)
  assert source[3].captions == ('picture 3',)


def test_a_damaged_index_and_a_folder_that_cannot_be_written(folder, tmp_path):
  TarShards(str(folder))
  index = next(folder.glob('00000*.npy'))
  index.write_bytes(index.read_bytes()[:50])
  with pytest.raises(UnclipError, match=r'index .*00000.* cannot be read .*: remove it'):
    TarShards(str(folder))
  (tmp_path / 'file').write_text('')
  with pytest.raises(UnclipError, match='name an index folder that can be written'):
    TarShards(str(folder), tmp_path / 'file')


def test_a_source_is_pickled_without_what_it_has_open(folder):
  source = TarShards(str(folder))
  source[0]
  copy = pickle.loads(pickle.dumps(source))
  assert list(copy) == list(source)


def test_a_store_is_asked_for_the_bytes_of_an_example(folder, monkeypatch):
  noise = np.random.default_rng(0).bytes(2**21)
  big = {f'{i}.{suffix}': noise for i in range(4) for suffix in ('png',)}
  write_tar(folder / 'big' / '0.tar', big)
  store = serve(folder, monkeypatch)
  here, there = TarShards(str(folder)), TarShards(f'{BUCKET}/{{00000..00002}}.tar')
  assert list(there) == list(here)
  assert [str(path) for path in expand(f'{BUCKET}/*.tar')] == there.paths
  source = TarShards(f'{BUCKET}/big/0.tar')
  source[0]  # reads the index
  before = store.num_fetched
  assert source[2].image == noise
  assert store.num_fetched - before == len(noise)
