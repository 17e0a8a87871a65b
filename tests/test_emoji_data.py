import base64
import dataclasses
import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.emoji import build, builder, captions, compose, concepts, packages, pool
from unclip_jax.types import UnclipError

SQUARE = '<path fill="{}" d="M8 8h16v16H8z"/>'
WOMAN_PILOT, PILOT = '1f469-200d-2708-fe0f', '1f9d1-200d-2708-fe0f'


@pytest.fixture(scope='module')
def sprites() -> compose.Sprites:
  return compose.load_sprites()


# What an emoji is.


@pytest.mark.parametrize(
  ('variant', 'plain'),
  [
    ('1F44D-1F3FF', '1f44d'),  # thumbs up: dark skin tone
    ('1f469-200d-2708-fe0f', '1f9d1-200d-2708'),  # woman pilot, pilot
    ('1f468-1f3fb-200d-1f680', '1f9d1-200d-1f680'),  # man astronaut: light skin tone, astronaut
    ('1f3c3-200d-2640-fe0f-200d-27a1-fe0f', '1f3c3'),  # woman running facing right, person running
    ('2764-FE0F', '2764'),  # red heart
    ('1f469-200d-2764-fe0f-200d-1f468', '1f491'),  # couple with heart
    ('1f478', '1f934'),  # princess, prince
    ('1f936', '1f385'),  # Mrs. Claus, Santa Claus
  ],
)
def test_variants_share_their_concept(variant, plain):
  assert concepts.concept_of(variant) == concepts.concept_of(plain)


def test_what_differs_beyond_modifiers_is_another_concept():
  code_points = ['1f468', '1f466', '2764', '2764-200d-1f525', '2640', '27a1', '1f3fb', '0031-20e3']
  assert len({concepts.concept_of(points) for points in code_points}) == len(code_points)
  assert concepts.concept_of('39_fe0f_20e3') == '0039-20e3'


@pytest.mark.parametrize(
  ('label', 'cleaned'),
  [
    ('A button (blood type)', 'a button'),
    ('Japanese “here” button', 'japanese here button'),
    ('one o’clock', "one o'clock"),
    ('woman: red hair', 'woman with red hair'),
    ('keycap: 3', 'keycap 3'),
    ('pin\u0303ata', 'pi\u00f1ata'),
  ],
)
def test_labels_are_plain_words(label, cleaned):
  assert concepts.clean_label(label) == cleaned


# Splits.


def test_splits_depend_on_names_alone():
  pairs = [(f'concept {i}', style) for i in range(2000) for style in captions.STYLES]
  splits = concepts.assign_splits(pairs)
  assert splits == concepts.assign_splits(reversed(pairs))
  some = concepts.assign_splits(pairs[: 5 * 100])
  assert all(splits[pair] == split for pair, split in some.items())
  shares = {name: np.mean([split == name for split in splits.values()]) for name in concepts.SPLITS}
  assert shares['val_concepts'] == pytest.approx(0.05, abs=0.015)
  assert shares['val_pairs'] == pytest.approx(0.095, abs=0.015)


def test_nothing_held_out_is_trained_on(sprites):
  of_split = {name: sprites.split == name for name in concepts.SPLITS}
  assert all(mask.any() for mask in of_split.values())
  trained = set(sprites.concept[of_split['train']])
  held_out = set(sprites.concept[of_split['val_concepts']])
  assert not held_out & (trained | set(sprites.concept[of_split['val_pairs']]))
  pairs = {
    name: set(zip(sprites.concept[mask], sprites.style[mask], strict=True))
    for name, mask in of_split.items()
  }
  assert not pairs['val_pairs'] & pairs['train']
  assert {concept for concept, _ in pairs['val_pairs']} <= trained
  np.testing.assert_array_equal(sprites.concept, [concepts.concept_of(c) for c in sprites.concept])


def test_documented_prompts_are_in_training(sprites):
  for label in ('red apple', 'rocket', 'cat', 'birthday cake'):
    assert set(sprites.split[sprites.label == label]) == {'train'}


# Captions.


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('red apple', 'a red apple'),
    ('octopus', 'an octopus'),
    ('unicorn', 'a unicorn'),
    ('hourglass done', 'an hourglass done'),
    ('umbrella with rain drops', 'an umbrella with rain drops'),
    ('grinning face with smiling eyes', 'a grinning face with smiling eyes'),
    ('grapes', 'grapes'),
    ('glasses', 'glasses'),
    ('wine glass', 'a wine glass'),
    ('thumbs up', 'thumbs up'),
  ],
)
def test_articles(name, words):
  assert captions.article(name) + name == words


def test_captions_cover_what_users_type():
  rng = np.random.default_rng(0)
  blue = captions.COLOUR_NAMES.index('blue')

  def said(colour):
    draws = range(1500)
    return {captions.object_caption(rng, 'red apple', [], 'flat', colour) for _ in draws}

  assert said(captions.WHITE) >= {'a red apple, flat style', 'a flat red apple', 'red apple'}
  assert said(blue) >= {'a flat red apple on a blue background', 'a red apple on a blue background'}
  assert all('blue' in caption for caption in said(blue))
  scenes = {
    captions.scene_caption(rng, 'cat', 'rocket', 'left of', '3d', captions.WHITE)
    for _ in range(300)
  }
  assert {'a cat to the left of a rocket', 'a 3d cat to the left of a 3d rocket'} <= scenes


def test_captions_are_well_formed(sprites):
  source = compose.CaptionedEmoji(sprites, 8, 3000, seed=9, splits=concepts.SPLITS)
  for index in range(len(source)):
    caption = source.truth(index).caption
    assert caption == caption.lower().strip(), caption
    assert '  ' not in caption, caption
    assert not re.search(r'[{}]|\ba (orange|a|an)\b(?! button)|\ban a\b(?! button)', caption), (
      caption
    )


def test_colours_are_distinct():
  values = np.array(list(captions.COLOURS.values()), float)
  distance = np.linalg.norm(values[:, None] - values[None], axis=-1)
  assert distance[~np.eye(len(values), dtype=bool)].min() > 60
  assert captions.COLOURS['white'] == (255, 255, 255)


# Pictures.


def test_example_depends_on_seed_and_index_alone(sprites):
  first = compose.CaptionedEmoji(sprites, 32, 10, seed=4)
  longer = compose.CaptionedEmoji(sprites, 32, 99, seed=4)
  for index in (7, 0):
    assert first.truth(index) == first[index][1:] == longer[index][1:]
    np.testing.assert_array_equal(first[index].image, longer[index].image)
  assert first.truth(7) != compose.CaptionedEmoji(sprites, 32, 10, seed=5).truth(7)


def test_pool_holds_what_its_captions_say(sprites):
  examples = pool.make_pool(32, 300, seed=1, scene_fraction=0.3)
  assert examples.images.shape == (300, 32, 32, 3)
  assert examples.images.dtype == np.uint8
  assert 0.2 < examples.is_scene.mean() < 0.4
  values = np.array(list(captions.COLOURS.values()))
  # Sprites may reach into a corner, seldom into most of them.
  corners = examples.images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
  background = values[examples.background][:, None]
  assert ((corners == background).all(-1).sum(1) >= 3).mean() > 0.95
  rows = zip(*examples[1:], strict=True)
  for caption, first, second, is_scene, relation, colour in rows:
    assert sprites.split[first] == 'train'
    named = re.search(r'(?:on|with|,)(?: an?)? (\w+)(?: background)?$', caption)
    if colour != captions.WHITE:
      assert named[1].replace('gray', 'grey') == captions.COLOUR_NAMES[colour]
    if is_scene:
      assert sprites.style[first] == sprites.style[second]
      assert sprites.concept[first] != sprites.concept[second]
      words = '|'.join(captions._RELATION_WORDS[captions.RELATIONS[relation]])
      names = (re.escape(sprites.label[first]), re.escape(sprites.label[second]))
      assert re.search(f'{names[0]} ({words}) .*{names[1]}', caption)
    else:
      assert first == second


def _square(colour: tuple[int, int, int], hidden: tuple[int, int, int]) -> bytes:
  """A square of one colour whose transparent surroundings hide another."""
  rgba = np.zeros((64, 64, 4), np.uint8)
  rgba[..., :3] = hidden
  rgba[16:48, 16:48] = (*colour, 255)
  buffer = io.BytesIO()
  Image.fromarray(rgba).save(buffer, 'WEBP', lossless=True, exact=True)
  return buffer.getvalue()


def test_objects_of_a_scene_stand_where_the_caption_says(sprites):
  red, blue = (_square(colour, (0, 0, 0)) for colour in ((255, 0, 0), (0, 0, 255)))
  squares = dataclasses.replace(sprites, webp=[(red, blue)[i % 2] for i in range(len(sprites))])
  source = compose.CaptionedEmoji(squares, 48, 600, seed=2, styles=['flat'], scene_fraction=1.0)
  towards = dict(enumerate([(0, -1), (0, 1), (-1, 0), (1, 0)]))  # row, column of the first
  seen = set()
  for index in range(len(source)):
    truth = source.truth(index)
    first_is_red, second_is_red = truth.sprite_index % 2 == 0, truth.second_index % 2 == 0
    if first_is_red == second_is_red or truth.background != captions.WHITE:
      continue
    image = source[index].image.astype(int)
    centre_of_red = np.argwhere(image[..., 2] < 100).mean(axis=0) - 23.5
    sign = 1 if first_is_red else -1
    assert np.dot(centre_of_red, towards[truth.relation]) * sign > 8, truth
    seen.add((truth.relation, first_is_red))
  assert len(seen) == 8


def test_transparent_colours_do_not_bleed(sprites):
  square = _square((255, 0, 0), hidden=(0, 255, 0))
  squares = dataclasses.replace(sprites, webp=[square] * len(sprites))
  source = compose.CaptionedEmoji(squares, 32, 40, seed=0, scene_fraction=0.0)
  white = [index for index in range(40) if source.truth(index).background == captions.WHITE]
  assert len(white) > 5
  for index in white:
    image = source[index].image.astype(int)
    # Between white and red, green and blue fall together.
    assert abs(image[..., 1] - image[..., 2]).max() <= 2


def test_large_and_small_pictures_show_the_same(sprites):
  large = compose.CaptionedEmoji(sprites, 64, 30, seed=3)
  small = compose.CaptionedEmoji(sprites, 32, 30, seed=3)
  for index in range(30):
    assert large.truth(index) == small.truth(index)
    reduced = large[index].image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert abs(reduced - small[index].image).mean() < 6


@pytest.mark.parametrize('split', concepts.SPLITS)
def test_scene_belongs_to_the_strictest_split(sprites, split):
  source = compose.CaptionedEmoji(sprites, 8, 200, seed=6, splits=(split,), scene_fraction=1.0)
  order = concepts.SPLITS.index
  for index in range(200):
    truth = source.truth(index)
    objects = sprites.split[[truth.sprite_index, truth.second_index]]
    assert max(objects, key=order) == split


def test_styles_and_groups_restrict(sprites):
  examples = pool.make_pool(
    16, 60, seed=0, styles=('flat', '3d'), groups=('food-drink',), scene_fraction=0.5
  )
  drawn = np.concatenate([examples.sprite_index, examples.second_index])
  assert set(sprites.style[drawn]) == {'flat', '3d'}
  assert set(sprites.group[drawn]) == {'food-drink'}
  labelled = pool.make_pool(16, 200, seed=0, groups=('flags',), labels=('rocket', 'sun'))
  assert set(sprites.label[labelled.sprite_index]) >= {'rocket', 'sun'}
  others = set(sprites.label[labelled.sprite_index]) - {'rocket', 'sun'}
  assert others == set(sprites.label[(sprites.group == 'flags') & (sprites.split == 'train')])
  with pytest.raises(UnclipError, match="unknown label 'rockets': choose from rocket"):
    pool.make_pool(16, 1, seed=0, groups=('flags',), labels=('rockets',))
  with pytest.raises(UnclipError, match='labels add to groups'):
    pool.make_pool(16, 1, seed=0, labels=('rocket',))
  with pytest.raises(UnclipError, match=r"unknown style 'oil'.*noto"):
    pool.make_pool(16, 1, seed=0, styles=('oil',))
  with pytest.raises(UnclipError, match="unknown split 'test'"):
    pool.make_pool(16, 1, seed=0, splits=('test',))
  with pytest.raises(UnclipError, match="unknown group 'food'"):
    pool.make_pool(16, 1, seed=0, groups=('food',))
  with pytest.raises(UnclipError, match='build it first'):
    pool.make_pool(16, 1, seed=0, data_dir='nowhere')


def test_shipped_build_is_small_and_has_its_licences():
  folder = compose.SHIPPED.parent
  assert sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) <= 10 * 2**20
  attribution = (folder / 'ATTRIBUTION.md').read_text()
  for package in packages.PACKAGES:
    assert f'`{package.name}` {package.version}' in attribution
    assert package.licence in attribution
  for name in re.findall(r'\((licences/.*?)\)', attribution):
    assert (folder / name).stat().st_size > 500


# Building.


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
