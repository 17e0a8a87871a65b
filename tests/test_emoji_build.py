"""The builder of the emoji: what it reads, what it writes, and what it refuses."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.emoji import build, builder, captions, compose, packages

SQUARE = '<path fill="{}" d="M8 8h16v16H8z"/>'
WOMAN_PILOT, PILOT = '1f469-200d-2708-fe0f', '1f9d1-200d-2708-fe0f'


def _tarball(path, files: dict[str, bytes]) -> None:
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f'package/{name}')
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def _record(code_points, label, **more):
  record = {'hexcode': code_points, 'label': label, 'tags': [label, 'thing'], 'group': 0}
  return record | {'subgroup': 0} | more


@pytest.fixture
def npm_cache(tmp_path, monkeypatch):
  """A cache of tiny packages whose recorded hashes are theirs."""
  cache = tmp_path / 'npm'
  cache.mkdir()
  animals = {f'{code:x}': f'animal {code:x}' for code in range(0x1F400, 0x1F43F)}
  codes = {'1f34e': 'red-apple', PILOT: 'pilot', WOMAN_PILOT: 'woman-pilot', '1f1e9': 'letter'}
  codes |= {code: label.replace(' ', '-') for code, label in animals.items()}
  bodies = {name: {'body': SQUARE.format('red')} for name in codes.values()}
  icons = json.dumps({'icons': bodies, 'width': 32, 'height': 32}).encode()
  buffer = io.BytesIO()
  Image.new('RGBA', (256, 256), (10, 200, 30, 255)).save(buffer, 'WEBP', lossless=True)
  emoji = [
    _record('1F34E', 'red apple'),
    _record(PILOT.upper(), 'pilot'),
    _record(WOMAN_PILOT.upper(), 'woman pilot'),
    _record('1F1E9', 'flag: Germany', group=9, subgroup=98),
    *(_record(code.upper(), label) for code, label in animals.items()),
  ]
  meta = {'groups': {'0': 'food-drink', '9': 'flags'}}
  meta['subgroups'] = {'0': 'food-fruit', '98': 'country-flag'}
  renamed = {}
  for package in packages.PACKAGES:
    files = {'chars.json': json.dumps(codes).encode(), 'icons.json': icons}
    if package is packages.GRADIENT:
      files['chars.json'] = b'{}'
    elif package is packages.RENDERED_3D:
      files = {'assets/1f34e.webp': buffer.getvalue()}
    elif package is packages.EMOJIBASE:
      files = {'en/data.json': json.dumps(emoji).encode()}
      files['meta/groups.json'] = json.dumps(meta).encode()
    path = cache / package.tarball
    _tarball(path, files)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    renamed[package] = dataclasses.replace(package, sha512=digest)
  for name in ('FLAT', 'GRADIENT', 'NOTO', 'TWEMOJI', 'RENDERED_3D', 'EMOJIBASE'):
    monkeypatch.setattr(packages, name, renamed[getattr(packages, name)])
  monkeypatch.setattr(packages, 'SVG_PACKAGES', tuple(map(renamed.get, packages.SVG_PACKAGES)))
  monkeypatch.setattr(packages, 'PACKAGES', tuple(map(renamed.get, packages.PACKAGES)))
  return cache


def test_build_and_read_back(npm_cache, tmp_path, capsys):
  out = tmp_path / 'built'
  arguments = ['--size', '48', '--out', str(out), '--cache', str(npm_cache)]
  assert build.main(arguments) == 0
  built = compose.load_sprites(out)
  # An apple in five styles and a pilot in four: no woman pilot, no flag.
  drawn = sorted(zip(built.label, built.style, strict=True))
  assert [pair for pair in drawn if not pair[0].startswith('animal')] == sorted(
    [('red apple', style) for style in captions.STYLES]
    + [('pilot', style) for style in captions.STYLES if style != '3d']
  )
  row = np.flatnonzero((built.label == 'red apple') & (built.style == 'gradient'))[0]
  rgba = compose.decode(built.webp[row])
  assert rgba.shape == (48, 48, 4)
  assert tuple(rgba[24, 24]) == (255, 0, 0, 255)
  # The path covers pixels 12 to 36 exactly: 8 to 24 of 32 units.
  assert (rgba[12:36, 12:36, 3] == 255).all()
  assert (rgba[..., 3] > 0).sum() == 24**2
  rendered = np.flatnonzero(built.style == '3d')
  assert tuple(compose.decode(built.webp[rendered[0]])[0, 0]) == (10, 200, 30, 255)
  assert built.keywords[row] == []  # all share 'thing'
  assert {path.name for path in tmp_path.iterdir()} == {'npm', 'built'}
  assert build.main(arguments) == 1
  assert 'not an empty folder' in capsys.readouterr().err


def test_builds_of_other_sizes_keep_their_order_and_splits(npm_cache, tmp_path):
  sizes = {}
  for size in (32, 512):
    out = tmp_path / str(size)
    builder.build(size, out, npm_cache, captions.STYLES, 8, lambda done, total: None)
    sizes[size] = compose.load_sprites(out)
  assert '3d' not in sizes[512].style  # has 256 pixels at most
  kept = sizes[32].style != '3d'
  for name in ('label', 'style', 'split'):
    np.testing.assert_array_equal(getattr(sizes[32], name)[kept], getattr(sizes[512], name))


def test_rounded_colours_are_near():
  image = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(16, 16, 4).astype(np.uint8))
  for bits, error in ((8, 0), (7, 1), (6, 2)):
    rounded = np.asarray(builder.round_colours(image, bits), int)
    assert abs(rounded - np.asarray(image)).max() == error
    assert len(np.unique(rounded)) == 2**bits
    assert {0, 255} <= set(np.unique(rounded))


def test_another_tarball_is_refused(npm_cache, tmp_path, capsys):
  path = npm_cache / packages.NOTO.tarball
  path.write_bytes(path.read_bytes() + b'x')
  assert build.main(['--out', str(tmp_path / 'built'), '--cache', str(npm_cache)]) == 1
  assert f'{path.name} is not @iconify-json/noto@1.2.9' in capsys.readouterr().err
  assert not (tmp_path / 'built').exists()


def test_without_npm(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert build.main(['--out', str(tmp_path / 'out'), '--cache', str(tmp_path / 'npm')]) == 1
  assert 'install Node.js' in capsys.readouterr().err


def test_sizes_out_of_range(npm_cache, tmp_path, capsys):
  out = str(tmp_path / 'built')
  for arguments, message in (
    (['--size', '0'], '16 to 2048'),
    (['--size', '512', '--styles', '3d'], '256 pixels at most'),
    (['--groups', 'food'], "unknown group 'food': choose from food-drink"),
  ):
    assert build.main([*arguments, '--out', out, '--cache', str(npm_cache)]) == 1
    assert message in capsys.readouterr().err
