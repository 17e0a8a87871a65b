import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from experiments.emoji import captions, compose, concepts, packages, pool
from unclip_jax.types import UnclipError


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
